"""What real updates send and hold against what the plan says of them."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from torch.autograd.profiler import profile

from atr_scale.config import RunConfig
from atr_scale.planner.costs import BatchSplit, Costs
from atr_scale.planner.estimate import estimate_step
from atr_scale.planner.gpus import find_gpu
from atr_scale.planner.ops import Collective, Recorder
from atr_scale.planner.planner import measure_costs
from atr_scale.planner.timeline import Cluster
from atr_scale.planner.traffic import transfers
from atr_scale.training.schedule import seeds
from tests.tiny_run import tiny_config
from tools.parity import start, with_train
from tools.ranks import run_ranks

pytestmark = pytest.mark.slow
SECONDS = 0.5
RATES = {"audio": 1e-3, "text": 1e-3, "heads": 1e-3}
PAIRS = 40
UPDATES = 3  # the first two of stage 3 learn in which order parameters are used


@pytest.fixture(scope="module")
def config(folder: Path) -> RunConfig:
    return tiny_config(folder, folder / "run")


@contextmanager
def collector_off() -> Iterator[None]:
    """What the garbage collector frees while a run is recorded would be taken from its peak: engines hold cycles."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def run(config: RunConfig) -> dict[str, Any]:
    """Collectives of the last of some updates, its longest caption, and the bytes held at the most."""
    with collector_off(), profile(profile_memory=True) as recorded:
        engine, batches = start(config)
        for number in range(UPDATES):
            batch = next(batches)
            with Recorder() as recorder:
                engine.update([batch], RATES, seeds(0, number, 1, engine.world.rank))
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return {
        "collectives": recorder.collectives,
        "tokens": batch.input_ids.shape[1],
        "peak": max(accumulate(event.nbytes() for event in events)),
    }


def runs(configs: list[RunConfig]) -> list[dict[str, Any]]:
    """One start of the ranks serves all."""
    return [run(config) for config in configs]


def sent(collectives: list[Collective], world_size: int) -> dict[str, int]:
    """Bytes by kind of collective, counted as `Transfer.nbytes` is."""
    sums: Counter[str] = Counter()
    for one in collectives:
        if one.name.startswith("allgather"):
            sums["all_gather"] += one.nbytes
        elif one.name.startswith("reduce_scatter"):
            sums["reduce_scatter"] += one.nbytes // world_size
        else:
            sums[{"allreduce": "all_reduce", "reduce": "reduce"}[one.name]] += one.nbytes
    return dict(sums)


def planned(costs: Costs, world_size: int) -> dict[str, int]:
    train = costs.config.train
    sums: Counter[str] = Counter()
    micro = train.micro_batch_size or train.global_batch_size // world_size
    for transfer in transfers(costs, BatchSplit(world_size, train.global_batch_size, micro)):
        sums[transfer.collective] += transfer.nbytes
    return dict(sums)


def cases(config: RunConfig) -> dict[str, RunConfig]:
    """ZeRO's stages, forwards in chunks, and a scorer whose words travel."""
    found = {f"ZeRO {stage}": with_train(config, zero_stage=stage) for stage in range(4)}
    found["chunks"] = with_train(config, zero_stage=1, micro_batch_size=2)
    found["bf16"] = with_train(config, zero_stage=1, gradient_dtype="bf16")
    words = config.model_copy(deep=True)
    words.model.scorer.name, words.objective.pmr.weight = "lgmm", 1.0
    return {**found, "words": words}


@pytest.mark.parametrize("world_size", [2, 3])
def test_bytes_are_exact(config: RunConfig, world_size: int) -> None:
    chosen = cases(config)
    for rank in run_ranks(runs, world_size, list(chosen.values())):
        for (name, one), found in zip(chosen.items(), rank, strict=True):
            costs, _ = measure_costs(one, SECONDS, found["tokens"], gpu=False)
            assert sent(found["collectives"], world_size) == planned(costs, world_size), name
        break  # all ranks call the same collectives


def test_memory_is_within_a_tenth(config: RunConfig) -> None:
    """States, gradients, activations and buckets of a whole update, on one rank."""
    chosen = [with_train(config, zero_stage=stage, global_batch_size=PAIRS) for stage in (0, 1, 2)]
    for one, found in zip(chosen, run_ranks(runs, 1, chosen)[0], strict=True):
        costs, _ = measure_costs(one, SECONDS, found["tokens"], gpu=False)
        peak = estimate_step(costs, Cluster(find_gpu("H100"), 1, 8, 0.0, 1), PAIRS).peak
        assert peak == pytest.approx(found["peak"], rel=0.1), f"ZeRO {one.train.zero_stage}"
