"""Slots of memory: never handed out while a tensor still reads them, used again afterwards."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from atr_scale.data.batch import Batch
from atr_scale.data.slots import Parcel, Slots
from atr_scale.data.stream import _pinned


def test_a_slot_is_free_when_its_last_tensor_is_gone() -> None:
    slots = Slots(size=6, each=2)
    first, second, third = slots.take(), slots.take(), slots.take()
    assert (first.number, second.number, third.number) == (0, 1, None), "of two slots the third is fresh memory"
    first.memory[:] = range(6)
    whole = slots.tensor(0, (2, 3))
    view = whole[1, 1:]
    del first, whole
    gc.collect()
    assert slots.take().number is None and view.tolist() == [4, 5], "a view holds the slot as well"
    del view
    assert slots.take().number == 0


def test_writers_have_slots_of_their_own() -> None:
    slots = Slots(size=4, each=1, workers=2)
    assert slots.take(1).number == 1 and slots.take(0).number == 0 and slots.take(0).number is None


@pytest.mark.parametrize("slot", [0, None])
def test_a_parcel_holds_the_batch(slot: int | None) -> None:
    slots = Slots(size=20, each=1)
    memory = slots.take().memory
    memory[:] = range(20)
    ids = torch.arange(3)
    waveform = torch.from_numpy(memory[:12].reshape(3, 4))
    batch = Batch(waveform, ids, ids[:, None], ids[:, None], ids, ids, ids, ["a", "b", "c"], Counter(bad=1))
    opened = Parcel.pack(batch, slot).open(slots)
    assert torch.equal(opened.waveform, waveform) and torch.equal(opened.ids, batch.ids)
    assert (opened.keys, opened.dropped) == (batch.keys, batch.dropped)


def test_pinning_keeps_order_and_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(Batch, "pin_memory", lambda batch: batch)
    ids = torch.zeros(1, dtype=torch.int64)
    batches = [Batch(torch.full((1, 2), float(k)), ids, ids, ids, ids, ids, ids) for k in range(4)]

    def failing() -> Iterator[Batch]:
        yield from batches
        raise ValueError("broken")

    assert [float(b.waveform[0, 0]) for b in _pinned(iter(batches))] == [0, 1, 2, 3]
    found = _pinned(failing())
    assert [float(next(found).waveform[0, 0]) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="broken"):
        next(found)
