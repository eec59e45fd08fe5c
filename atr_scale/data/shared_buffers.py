"""Reused shared memory for the waveforms of batches.

The operating system provides fresh memory page by page and zeroed, which costs several times as much as reading and
converting 16-bit samples. So a piece of a batch is decoded directly into a buffer, processes exchange the buffer's
number instead of the samples, and the buffer is free again when the last tensor that uses it is gone.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from atr_scale.batch import Batch, DroppedSample
from atr_scale.data.assembly import Piece
from atr_scale.data.audio_source import from_int16

CACHE_LINE = 64  # bytes


@dataclass(frozen=True)
class Buffer:
    """Memory, float32 [size], to write a batch into. `number` is None for fresh memory, used if no buffer was free."""

    number: int | None
    memory: np.ndarray


class SharedBuffers:
    """`each` buffers of `size` float32 for every writer: `workers` processes, or only this process if that is 0.

    Only its writer takes a buffer and only the reader frees it, so one byte for each buffer is enough to synchronise.
    """

    def __init__(self, size: int, each: int, workers: int = 0) -> None:
        self.size, self.each = size, each
        total = each * max(1, workers)
        self._busy = torch.zeros(total, dtype=torch.uint8)
        if workers:
            self._busy.share_memory_()
            # As torch's collate function allocates: the pages stay untouched, while a copy would touch them.
            pieces = [torch.UntypedStorage._new_shared(4 * size) for _ in range(total)]
            self._memory = [torch.empty(0, dtype=torch.float32).set_(piece) for piece in pieces]
            self._memory = [piece.resize_(size) for piece in self._memory]
        else:
            self._memory = [torch.from_numpy(_aligned(size)) for _ in range(total)]

    def take(self, writer: int = 0) -> Buffer:
        """A free buffer of the writer, or fresh memory if there is none."""
        first = writer * self.each
        for number in range(first, first + self.each):
            if not self._busy[number]:
                self._busy[number] = 1
                return Buffer(number, self._memory[number].numpy())
        return Buffer(None, _aligned(self.size))

    def tensor(self, number: int, shape: tuple[int, int], dtype: np.dtype) -> Tensor:
        """The beginning of a taken buffer. The buffer is free again when no tensor shares this memory any longer."""
        # A tensor's storage keeps the array that it was made from alive, for all views of the tensor.
        array = self._memory[number].numpy().view(dtype)[: shape[0] * shape[1]]
        weakref.finalize(array, self._busy.numpy().__setitem__, number, 0).atexit = False
        return torch.from_numpy(array).view(shape)


def _aligned(size: int) -> np.ndarray:
    """Fresh float32 [size] that begins at a cache line: reading a file into such memory is a quarter faster."""
    memory = np.empty(size + CACHE_LINE // 4, np.float32)
    first = -memory.ctypes.data % CACHE_LINE // 4
    return memory[first : first + size]


class WaveformRows:
    """The waveforms of a batch in the memory of a buffer.

    `array` [b, width] is float32. With `int16` it is int16 until `widen` is called, for a clip that does not fit.
    """

    def __init__(self, memory: np.ndarray, width: int, int16: bool) -> None:
        self._wide = memory.reshape(-1, width)
        self.array = memory.view(np.int16)[: memory.size].reshape(-1, width) if int16 else self._wide

    def widen(self, filled: int) -> None:
        """Make `array` float32 in place, and convert its first `filled` rows."""
        assert self.array.dtype == np.int16
        # From the last row on: a row doubles its width, and must not cover a row that is still to be converted.
        for row in reversed(range(filled)):
            from_int16(self.array[row].copy() if row == 0 else self.array[row], self._wide[row])
        self.array = self._wide


@dataclass(frozen=True)
class Parcel:
    """A piece of a batch on its way between two processes.

    places: rows of the local batch that it holds, ascending. buffer: number of the buffer with its waveform (shape
    [places, samples]), or None if it is sent as `waveform` because no buffer was free. arrays: the other tensors as
    NumPy arrays, as torch would send each small tensor in its own file.
    """

    buffer: int | None
    shape: tuple[int, int]
    dtype: np.dtype
    waveform: Tensor | None
    arrays: dict[str, np.ndarray]
    keys: list[str]
    dropped: list[DroppedSample]
    places: list[int]

    @staticmethod
    def pack(piece: Piece, buffer: int | None) -> Parcel:
        """A parcel of `piece`, whose waveform lies in the buffer `buffer` (None: in none)."""
        places, batch = piece
        tensors = {f.name: getattr(batch, f.name) for f in fields(batch) if f.name not in ("keys", "dropped")}
        waveform = tensors.pop("waveform")
        arrays = {name: value.numpy() for name, value in tensors.items()}
        dtype, alone = waveform.numpy().dtype, waveform if buffer is None else None
        return Parcel(buffer, waveform.shape, dtype, alone, arrays, batch.keys, batch.dropped, places)

    def open(self, buffers: SharedBuffers) -> Piece:
        """The piece, in the process that reads."""
        waveform = self.waveform if self.buffer is None else buffers.tensor(self.buffer, self.shape, self.dtype)
        assert waveform is not None
        tensors = {name: torch.from_numpy(value) for name, value in self.arrays.items()}
        batch = Batch(waveform=waveform, **tensors, keys=self.keys, dropped=self.dropped)
        return Piece(self.places, batch)
