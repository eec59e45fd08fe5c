"""SharedBuffers: a buffer is never handed out while a tensor still uses it, and is used again afterwards."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from atr_scale.batch import Batch, DroppedSample, to_float
from atr_scale.data.assembly import Piece
from atr_scale.data.shared_buffers import CACHE_LINE, Parcel, SharedBuffers, WaveformRows
from atr_scale.data.stream import _one_ahead


def test_a_slot_is_free_when_its_last_tensor_is_gone() -> None:
    buffers = SharedBuffers(size=6, each=2)
    first, second, third = buffers.take(), buffers.take(), buffers.take()
    assert (first.number, second.number, third.number) == (0, 1, None), "of two buffers the third is fresh memory"
    first.memory[:] = range(6)
    whole = buffers.tensor(0, (2, 3), np.dtype(np.float32))
    view = whole[1, 1:]
    del first, whole
    gc.collect()
    assert buffers.take().number is None and view.tolist() == [4, 5], "a view holds the buffer as well"
    del view
    assert buffers.take().number == 0


def test_memory_begins_with_a_cache_line() -> None:
    buffers = SharedBuffers(size=1001, each=3)
    taken = [buffers.take().memory for _ in range(4)]
    assert all(memory.ctypes.data % CACHE_LINE == 0 and memory.shape == (1001,) for memory in taken)


@pytest.mark.parametrize("filled", range(5))
def test_rows_widen_in_place(filled: int) -> None:
    """int16 rows are in the first half of the memory that their float32 values fill."""
    samples = np.random.default_rng(0).integers(-32768, 32768, (4, 1000)).astype(np.int16)
    memory = np.zeros(4000, np.float32)
    rows = WaveformRows(memory, 1000, int16=True)
    rows.array[:filled] = samples[:filled]
    rows.widen(filled)
    assert rows.array.dtype == np.float32 and rows.array.shape == (4, 1000) and np.shares_memory(rows.array, memory)
    np.testing.assert_array_equal(rows.array[:filled], samples[:filled] / np.float32(32768))


def test_16_bit_samples_are_scaled_exactly() -> None:
    """Every int16 value, as libsndfile does; a batch on the device still holds the int16 samples."""
    ids = torch.zeros(1, dtype=torch.int64)
    samples = torch.arange(-32768, 32768).to(torch.int16)[None]
    moved = Batch(samples, ids, ids, ids, ids, ids, ids, ids).to(torch.device("cpu"))
    assert moved.waveform.dtype == torch.int16
    waveform = to_float(moved.waveform)
    assert waveform.dtype == torch.float32 and torch.equal(waveform.double() * 32768, samples.double())


def test_writers_have_slots_of_their_own() -> None:
    buffers = SharedBuffers(size=4, each=1, workers=2)
    assert buffers.take(1).number == 1 and buffers.take(0).number == 0 and buffers.take(0).number is None


@pytest.mark.parametrize("dtype", [np.float32, np.int16])
@pytest.mark.parametrize("buffer", [0, None])
def test_a_parcel_holds_the_batch(buffer: int | None, dtype: type) -> None:
    buffers = SharedBuffers(size=20, each=1)
    memory: np.ndarray = buffers.take().memory.view(dtype)[:20]
    memory[:] = range(20)
    ids = torch.arange(3)
    waveform = torch.from_numpy(memory[:12].reshape(3, 4))
    dropped = DroppedSample("corpus/shard/d", "silent_audio", "no sound")
    batch = Batch(waveform, ids, ids[:, None], ids[:, None], ids, ids, ids, ids, list("abc"), [dropped])
    places, opened = Parcel.pack(Piece([1, 2, 4], batch), buffer).open(buffers)
    assert places == [1, 2, 4]
    assert opened.waveform.dtype == waveform.dtype and torch.equal(opened.waveform, waveform)
    assert torch.equal(opened.ids, batch.ids)
    assert (opened.keys, opened.dropped) == (batch.keys, batch.dropped)


def test_reading_ahead_keeps_order_and_errors() -> None:
    ids = torch.zeros(1, dtype=torch.int64)
    batches = [Batch(torch.full((1, 2), float(k)), ids, ids, ids, ids, ids, ids, ids) for k in range(4)]

    def failing() -> Iterator[Batch]:
        yield from batches
        raise ValueError("broken")

    assert [float(b.waveform[0, 0]) for b in _one_ahead(iter(batches))] == [0, 1, 2, 3]
    found = _one_ahead(failing())
    assert [float(next(found).waveform[0, 0]) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="broken"):
        next(found)
