"""What the stream gives to training.

Shape suffixes: b rows of this rank, L word pieces.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor


def stable_id(text: str) -> int:
    """A 63-bit id of a string: the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def caption_id(caption: str) -> int:
    """Id of a caption's text: captions that read the same (letter case and spacing aside) share it."""
    return stable_id(" ".join(unicodedata.normalize("NFC", caption).casefold().split()))


FULL_SCALE = 1 / 32768  # of 16-bit samples, a power of two: scaling by it is exact


@dataclass(frozen=True)
class Batch:
    """One rank's rows of one global batch.

    waveform:       [b, samples] float32 at the audio encoder's rate, zeros after each clip's end. On its way to a GPU
                    int16 where every clip is stored so: half of the bytes to read and move, and `to` scales them.
    lengths:        [b] int64, samples of each clip.
    input_ids, attention_mask: [b, L] int64.
    clip_ids, caption_ids: [b] int64, stable over processes and runs; rows that agree in either are positives.
    caption_index:  [b] int64, which of the sample's captions it is.
    keys:           where each row came from, "corpus/shard/key", for audits and error reports.
    dropped:        unreadable samples by reason; each row they left holds a copy of a good one.
    """

    waveform: Tensor
    lengths: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    clip_ids: Tensor
    caption_ids: Tensor
    caption_index: Tensor
    keys: list[str] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)

    @property
    def ids(self) -> Tensor:
        """[b, 2] int64 (clip, caption text): the columns that decide which pairs are positives."""
        return torch.stack([self.clip_ids, self.caption_ids], 1)

    def to(self, device: torch.device) -> Batch:
        """On `device`, the waveform as float32, but for `lengths`: the host cuts waveforms by them and would wait for
        the device."""
        moved = self._map(lambda x: x.to(device, non_blocking=True))
        waveform = moved.waveform
        if waveform.dtype == torch.int16:
            waveform = torch.mul(waveform, FULL_SCALE, out=torch.empty_like(waveform, dtype=torch.float32))
        return replace(moved, waveform=waveform, lengths=self.lengths)

    def take(self, rows: Tensor) -> Batch:
        """Copies of the rows `rows` (int64); pinned memory stays pinned."""

        def chosen(x: Tensor) -> Tensor:
            out = torch.empty(len(rows), *x.shape[1:], dtype=x.dtype, device=x.device, pin_memory=x.is_pinned())
            return torch.index_select(x, 0, rows, out=out)

        return replace(self._map(chosen), keys=[self.keys[row] for row in rows.tolist()] if self.keys else [])

    def pin_memory(self) -> Batch:
        return self._map(lambda x: x.pin_memory())

    def _map(self, change) -> Batch:  # type: ignore[no-untyped-def]
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **{name: change(value) for name, value in tensors.items()})
