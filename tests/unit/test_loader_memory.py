"""What a loader takes of /dev/shm and of main memory: bounded by a budget, however large the global batch is."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from atr_scale.batch import DroppedSample
from atr_scale.data import loader_memory as module
from atr_scale.data.loader_memory import PIECE, loader_memory, loader_memory_here
from atr_scale.data.options import DataSection, TrainingSource
from atr_scale.distributed.world import World
from atr_scale.errors import UserError
from atr_scale.training.heartbeat import Heartbeat
from atr_scale.training.loop import Training
from atr_scale.training.profile import StepProfile
from atr_scale.training.record import Taken

TEN_S = 320_000  # at 32 kHz
GB = 10**9


class Node(World):
    """One of 8 ranks of a machine, whose ranks all measure the same."""

    def ranks_here(self) -> int:
        return 8

    def gather_ints(self, value: int) -> list[int]:
        return [value, 2 * value]


@pytest.mark.parametrize(
    ("batch", "ranks", "seconds", "workers"),
    [(32_768, 8, 10, 2), (32_768, 8, 10, 6), (1024, 16, 30, 6), (65_536, 1, 10, 2)],
)
def test_large_batches_take_little_shared_memory(batch: int, ranks: int, seconds: int, workers: int) -> None:
    """7 buffers of the whole local batch for each worker were 587 GB a machine in the first case."""
    memory = loader_memory(seconds * 32_000, batch // ranks, workers, pinned=True)
    assert memory.shared <= 5 * workers * PIECE and min(ranks, 8) * memory.shared < 20 * GB
    assert memory.rows * (memory.pieces - 1) < batch // ranks <= memory.rows * memory.pieces
    one = 4 * seconds * 32_000 * batch // ranks
    assert 3 * one <= memory.batches < 6 * one, "three whole batches, each rounded up to a power of two"


def test_a_small_batch_is_used_where_it_was_decoded() -> None:
    memory = loader_memory(TEN_S, 32, 2, pinned=False)
    assert (memory.rows, memory.pieces, memory.buffers, memory.batches) == (32, 1, 14, 0)
    assert memory.describe() == (
        "loader buffers: 14 of 41.0 MB a rank (32 clips each, 1 to a batch), 0.6 GB of shared memory"
    )


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("workers", [1, 2, 6])
@pytest.mark.parametrize("budget", [32 << 20, 64 << 20, 0.3 * GB, 2 * GB])
def test_the_budget_holds(budget: float, workers: int, pinned: bool) -> None:
    memory = loader_memory(TEN_S, 4096, workers, pinned=pinned, budget=budget)
    assert memory.rows >= 1 and memory.shared <= budget and memory.each > memory.prefetch >= 1


def test_too_little_is_one_line() -> None:
    with pytest.raises(UserError) as caught:
        loader_memory(TEN_S, 64, 8, pinned=True, budget=8e6)
    line = str(caught.value)
    assert "data.buffer_gb" in line and "data.workers = 8" in line and "20.5 MB" in line and "8.0 MB" in line


def data(workers: int = 2, buffer_gb: float | None = None) -> DataSection:
    source = TrainingSource(shards="somewhere", weight=None)
    return DataSection(train=[source], workers=workers, buffer_gb=buffer_gb)


def test_ranks_share_the_memory_of_their_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_free_shared_memory", lambda: 8 * GB)
    monkeypatch.setattr(module, "free_memory", lambda: 200 * GB)

    def found(**keys: float) -> module.LoaderMemory:
        return loader_memory_here(TEN_S, 4096, data(**keys), Node(), pinned=True)  # type: ignore[arg-type]

    assert 0.4 * GB < found().shared <= 0.5 * GB, "half of it, for 8 ranks"
    assert 0.2 * GB < found(buffer_gb=0.3).shared <= 0.3 * GB
    with pytest.raises(UserError, match=r"data.buffer_gb = 3, but 1.0 GB of /dev/shm are free"):
        found(buffer_gb=3)
    monkeypatch.setattr(module, "free_memory", lambda: 60 * GB)
    with pytest.raises(UserError, match=r"main memory that are free for each rank.*global_batch_size"):
        found()


def test_reading_in_the_training_process_takes_no_shared_memory() -> None:
    memory = loader_memory(TEN_S, 32, 0, pinned=False)
    assert (memory.shared, memory.pieces, memory.rows) == (0, 1, 32) and memory.total == 2 * 32 * TEN_S * 4
    assert "no workers" in memory.describe()


class Numbered:
    """What the loop reads of a batch."""

    def __init__(self, number: int) -> None:
        self.keys, self.dropped = [str(number)], [DroppedSample(f"corpus/shard/{number}", "broken", "")]
        self.ids, self.lengths = torch.tensor([number]), torch.tensor([8000])


def test_a_step_of_several_losses_holds_one_batch_at_a_time() -> None:
    """train.accum_steps batches at once would be as many whole batches in memory."""
    alive: list[weakref.ref] = []

    def batches() -> Iterator[Any]:
        for number in range(4):
            assert all(made() is None for made in alive)
            batch = Numbered(number)
            alive.append(weakref.ref(batch))
            yield batch
            del batch

    training: Any = SimpleNamespace(
        config=SimpleNamespace(train=SimpleNamespace(accum_steps=3)),
        heartbeat=Heartbeat(),
        profile=StepProfile(None, Path("run"), 0, torch.device("cpu"), 1),
        parts=SimpleNamespace(model=SimpleNamespace(sample_rate=16_000)),
    )
    taken = Taken()
    for batch in Training._take(training, batches(), taken):
        assert batch.keys == taken.keys[-1:]
        del batch
    assert taken.keys == ["0", "1", "2"] and len(alive) == 3
    assert taken.audio == 1.5 and [ids.tolist() for ids in taken.ids] == [[0], [1], [2]]
    assert [sample.place[-1] for sample in taken.dropped] == taken.keys
