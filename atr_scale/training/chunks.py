"""A batch of the host on a device, chunk by chunk; each is copied while the one before it is computed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from atr_scale.batch import Batch


def side_stream(device: torch.device) -> Any:
    """A stream for copies to `device`, None if they cannot run beside other work."""
    return torch.cuda.Stream(device) if device.type == "cuda" and torch.cuda.is_available() else None


class Chunks:
    """The rows of a batch in the order of their lengths, `size` in a chunk, so that clips of one length run together.

    table: all rows on the device, in that order, without waveforms.
    """

    def __init__(self, batch: Batch, size: int, device: torch.device, side: Any = None) -> None:
        """batch: on the host, where it stays. side: the device's stream for copies of waveforms."""
        order = batch.lengths.argsort(stable=True)
        self._rows, self._size = order.split(size), size
        self._waveform, self._device, self._side = batch.waveform, device, side
        self._host = replace(batch, waveform=batch.waveform[:, :0]).take(order)
        self.table = self._host.to(device)

    def __len__(self) -> int:
        return len(self._rows)

    def start_at(self, first: int) -> Iterator[Batch]:
        """The chunks from number `first` on, each cut to its longest clip and its longest caption.

        The memory of a chunk is the current stream's. Its copy waits for what that stream was given before, and the
        stream waits for the copy: so at most two chunks have memory, and none is overwritten while it is in use.
        """
        ahead = self._copy(first)
        try:
            for number in range(first, len(self)):
                waveform, copied = ahead
                if copied is not None:
                    torch.cuda.current_stream(self._device).wait_event(copied)
                ahead = self._copy(number + 1)
                yield self._chunk(number, waveform)
        finally:
            if self._side is not None:
                torch.cuda.current_stream(self._device).wait_stream(self._side)

    def _copy(self, number: int) -> tuple[Tensor, Any]:
        """The waveforms of a chunk on the device, and the event after which they are there (None: now)."""
        if number == len(self):
            return self._waveform[:0], None
        rows, samples = self._rows[number], int(self._part(self._host, number).lengths.max())
        first, one_piece = int(rows[0]), samples == self._waveform.shape[1] and bool((rows.diff() == 1).all())
        if self._side is None and one_piece:
            return self._waveform[first : first + len(rows)].to(self._device), None
        out = torch.empty(len(rows), samples, dtype=self._waveform.dtype, device=self._device)
        if self._side is not None:
            self._side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._side):
            if one_piece:
                out.copy_(self._waveform[first : first + len(rows)], non_blocking=True)
            else:  # rows of pinned memory; gathered on the host they would have to be pinned again
                for place, row in zip(out, rows.tolist(), strict=True):
                    place.copy_(self._waveform[row, :samples], non_blocking=True)
        return out, None if self._side is None else self._side.record_event()

    def _chunk(self, number: int, waveform: Tensor) -> Batch:
        part = self._part(self.table, number)
        tokens = int(self._part(self._host, number).attention_mask.any(0).nonzero().max()) + 1
        ids, mask = part.input_ids[:, :tokens], part.attention_mask[:, :tokens]
        return replace(part, waveform=waveform, input_ids=ids, attention_mask=mask).to(self._device)

    def _part(self, batch: Batch, number: int) -> Batch:
        return batch.between(number * self._size, (number + 1) * self._size)
