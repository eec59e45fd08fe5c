"""One process against two at the same global batch, and the planner's figures against those of real steps.

Real optimizer steps under DeepSpeed on noise: small_cnn on clips of 10 s, a text encoder of two layers, 64 pairs. CPU
time is summed over all processes, so that two of them may share a core. The efficiency is the cost of dividing a batch.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from atr_scale.config import RunConfig
from atr_scale.distributed.world import World
from atr_scale.planner.costs import BatchSplit
from atr_scale.planner.estimate import StepEstimate, estimate_step
from atr_scale.planner.gpus import GPU, Rates
from atr_scale.planner.ops import Recorder
from atr_scale.planner.planner import measure_costs
from atr_scale.planner.timeline import Cluster
from atr_scale.planner.traffic import transfers
from atr_scale.planner.zero_memory import BUCKET, FP32
from tools.bench import steps
from tools.bench.measure import peak_mib
from tools.bench.table import Row, run
from tools.parity import with_train
from tools.ranks import run_ranks

PAIRS, SECONDS, SHORTER = 64, 10.0, 4.0
WARM_UP, REPEATS, TURNS = 3, 5, 5
BUCKET_MIB = FP32 * BUCKET / 2**20  # of ZeRO 3
# A core, roughly; only ratios of its times are used.
CORE_RATES = Rates(low=40e9, tf32=40e9, full=40e9, memory=8e9)
CORE = GPU("core", 2**34, 80e9, 80e9, 80e9, 10e9, 1e9, 1e9, 0.0, CORE_RATES)


@dataclass(frozen=True)
class Found:
    """Of one rank: CPU seconds of an optimizer step, bytes handed to collectives, peak memory in MiB."""

    seconds: float
    given: int
    peak: float


def rows() -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        config, lgmm = (
            steps.configuration(Path(folder) / scorer, "small_cnn", scorer=scorer, global_batch_size=PAIRS)
            for scorer in ("mean", "lgmm")
        )
        yield from efficiency(config)
        wide = steps.configuration(Path(folder) / "wide", "small_cnn", dim=768, layers=4, global_batch_size=4)
        for name, one, seconds in (("activations most", config, SECONDS), ("parameters most", wide, 1.0)):
            for stage in range(4):
                yield from planned(f"{name}, ZeRO {stage}", with_train(one, zero_stage=stage), seconds)
        yield from ratios(config, lgmm)


def efficiency(config: RunConfig) -> Iterator[Row]:
    """In turns, so that a slow minute slows both."""
    turns = [[sum(rank.seconds for rank in run_ranks(measured, n, config)) for n in (1, 2)] for _ in range(TURNS)]
    one, two = (median(times) for times in zip(*turns, strict=True))
    yield Row("CPU time, 1 over 2 processes", one, two, "2 processes", "s", 0.97, at_least=True)


def planned(name: str, config: RunConfig, seconds: float) -> Iterator[Row]:
    """Bytes and memory of rank 0 of 2; the bucket of ZeRO 3, which would hide all else, is left out of both sides."""
    found = run_ranks(measured, 2, config, seconds)[0]
    costs, _ = measure_costs(config, seconds, steps.NUM_WORDS, gpu=False)
    pairs = config.train.global_batch_size
    given = sum(
        t.nbytes * (2 if t.collective == "reduce_scatter" else 1)
        for t in transfers(costs, BatchSplit(2, pairs, pairs // 2))
    )
    yield error(f"bytes to collectives, {name}", given / 2**20, found.given / 2**20, "counted", 0.0)
    bucket = BUCKET_MIB if config.train.zero_stage == 3 else 0.0
    peak = planned_step(config, world_size=2, seconds=seconds).peak / 2**20
    yield error(f"peak memory, {name}", peak - bucket, found.peak - bucket, "measured", 0.1)


def error(name: str, planned: float, found: float, found_is: str, target: float) -> Row:
    """Absolute error of the plan, relative to the measured value."""
    return Row(f"{name}: planned {planned:.4g}, off by", abs(planned - found), found, found_is, "MiB", target)


def ratios(config: RunConfig, lgmm: RunConfig) -> Iterator[Row]:
    """The plan's ratios of times against measured ones."""
    base, short, pairs = (
        run_ranks(measured, 1, *given)[0].seconds for given in ((config,), (config, SHORTER), (lgmm,))
    )
    step = planned_step(config).step
    by_length = step / planned_step(config, seconds=SHORTER).step
    yield Row(f"time, clips of {SECONDS:g} s over {SHORTER:g} s", by_length, base / short, "measured", "x")
    yield Row("time, lgmm over mean", planned_step(lgmm).step / step, pairs / base, "measured", "x")


def planned_step(config: RunConfig, world_size: int = 1, seconds: float = SECONDS) -> StepEstimate:
    costs, _ = measure_costs(config, seconds, steps.NUM_WORDS, gpu=False)
    return estimate_step(costs, Cluster(CORE, world_size, 8, 0.0, 1), config.train.global_batch_size)


def measured(config: RunConfig, seconds: float = SECONDS) -> Found:
    """Some optimizer steps of this rank on its local batch of the same noise."""
    kept: list[Any] = []

    def first_updates() -> None:
        engine = steps.start(config)
        batch = steps.noise(config.train.global_batch_size, seconds, engine.model.sample_rate, World.current())
        for _ in range(WARM_UP):
            with Recorder() as recorder:
                steps.update(engine, batch)
        kept.extend((engine, batch, recorder.collectives))

    peak = peak_mib(first_updates)
    engine, batch, collectives = kept
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        steps.update(engine, batch)
        times.append(time.process_time() - start)
    return Found(median(times), sum(one.nbytes for one in collectives), peak)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    run(__doc__, rows)
