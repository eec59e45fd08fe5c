"""One process against two at the same global batch, and the planner's figures against what such updates do.

Real updates under DeepSpeed (small_cnn on clips of 10 s, a text encoder of two layers, 64 pairs) on noise. CPU time is
that of all processes together, so that two of them may share a core; the efficiency is what dividing the batch costs.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.autograd.profiler import profile

from atr_scale.config import RunConfig, parse_config
from atr_scale.data.batch import Batch
from atr_scale.data.demo.text_encoder import build_demo_text_encoder
from atr_scale.model import Retriever
from atr_scale.parallel.world import World
from atr_scale.planner.estimate import Cluster, estimate, transfers
from atr_scale.planner.gpus import GPU
from atr_scale.planner.ops import Recorder
from atr_scale.planner.planner import measure
from atr_scale.training.engine import Engine
from atr_scale.training.schedule import seeds
from tools.bench.table import Row, run
from tools.ranks import run_ranks

PAIRS, TOKENS, WARM_UP, REPEATS = 64, 24, 3, 5
RATES = {"audio": 1e-4, "text": 1e-4, "heads": 1e-4}
BUCKET = 4 * 500_000_000  # of ZeRO 1 and 2: it would hide all else
# A core, roughly; only ratios of its times are used.
CORE = GPU("core", 2**34, 80e9, 80e9, 10e9, 1e9, 1e9, 0.0)


@dataclass(frozen=True)
class Found:
    """Of one rank: CPU seconds of an update, bytes that it handed to collectives by their names, peak bytes."""

    seconds: float
    given: dict[str, int]
    peak: int


def rows() -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        build_demo_text_encoder(["a dog barks at a passing car"], Path(folder))
        yield from _rows(Path(folder))


def _rows(folder: Path) -> Iterator[Row]:
    config = configuration(folder, seconds=10.0)
    one, two = (run_ranks(updates, size, config) for size in (1, 2))
    both = sum(rank.seconds for rank in two)
    yield Row("CPU time, 1 over 2 processes", one[0].seconds, both, "2 processes", "s", 0.97, at_least=True)
    for stage in range(4):
        staged = configuration(folder, seconds=10.0, zero_stage=stage)
        found = two[0] if stage == 0 else run_ranks(updates, 2, staged)[0]
        yield from _planned(f"ZeRO {stage}", staged, found)
    for name, other in (
        ("clips of 10 s over 4 s", configuration(folder, seconds=4.0)),
        ("lgmm over pooled", configuration(folder, seconds=10.0, scorer="lgmm")),
    ):
        measured = run_ranks(updates, 1, other)[0].seconds
        longer, shorter = (one[0].seconds, measured) if "clips" in name else (measured, one[0].seconds)
        steps = [_plan(c, 1).step for c in ((config, other) if "clips" in name else (other, config))]
        yield Row(f"time, {name}", steps[0] / steps[1], longer / shorter, "measured", "x")


def _planned(name: str, config: RunConfig, found: Found) -> Iterator[Row]:
    """Bytes and memory of rank 0 of 2."""
    costs, _ = measure(config, config.data.crop_seconds, TOKENS, gpu=False)
    planned = sum(
        t.nbytes * (2 if t.collective == "reduce_scatter" else 1) for t in transfers(costs, 2, PAIRS, PAIRS // 2)
    )
    yield Row(f"bytes to collectives, {name}", planned / 2**20, sum(found.given.values()) / 2**20, "counted", "MiB", 1)
    bucket = BUCKET if config.train.zero_stage else 0
    peak = _plan(config, 2).peak - bucket
    yield Row(f"peak memory, {name}", peak / 2**20, (found.peak - bucket) / 2**20, "measured", "MiB")


def _plan(config: RunConfig, world_size: int) -> Any:
    costs, _ = measure(config, config.data.crop_seconds, TOKENS, gpu=False)
    return estimate(costs, Cluster(CORE, world_size, 8, 0.0, 1), PAIRS)


def configuration(folder: Path, seconds: float, scorer: str = "mean", zero_stage: int = 0) -> RunConfig:
    return parse_config(
        {
            "run": {"dir": str(folder / "run")},
            "data": {"train": [{"shards": "none"}], "crop_seconds": seconds},
            "model": {
                "audio": {"name": "small_cnn"},
                "text": {"name": str(folder), "pooling": "mean", "dropout": 0.0},
                "scorer": {"name": scorer},
            },
            "train": {"steps": 1, "global_batch_size": PAIRS, "precision": "fp32", "zero_stage": zero_stage},
        },
        "this benchmark",
    )


def updates(config: RunConfig) -> Found:
    """Some updates of this rank on its share of the same noise."""
    world = World.current()
    with profile(profile_memory=True) as recorded:
        torch.manual_seed(0)
        engine = Engine(Retriever(config.model, config.objective), config.train, world, torch.device("cpu"))
        batch = noise(config, world, engine.model.sample_rate)
        for number in range(WARM_UP):
            with Recorder() as recorder:
                engine.update([batch], RATES, seeds(0, number, 1, world.rank))
    times = []
    for number in range(WARM_UP, WARM_UP + REPEATS):
        start = time.process_time()
        engine.update([batch], RATES, seeds(0, number, 1, world.rank))
        times.append(time.process_time() - start)
    given: dict[str, int] = {}
    for one in recorder.collectives:
        given[one.name] = given.get(one.name, 0) + one.nbytes
    assert recorded.kineto_results is not None
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return Found(median(times), given, max(accumulate(event.nbytes() for event in events)))


def noise(config: RunConfig, world: World, sample_rate: int) -> Batch:
    """This rank's rows of a batch that is the same for any number of ranks."""
    draws = torch.Generator().manual_seed(0)
    samples = round(config.data.crop_seconds * sample_rate)
    share = PAIRS // world.size
    mine = slice(world.rank * share, (world.rank + 1) * share)
    ids, words = torch.arange(PAIRS), torch.randint(5, 30, (PAIRS, TOKENS), generator=draws)
    waveform = 0.1 * torch.randn(PAIRS, samples, generator=draws)
    lengths = torch.full((PAIRS,), samples)
    whole = Batch(waveform, lengths, words, torch.ones_like(words), ids, ids, torch.zeros_like(ids))
    return whole.take(ids[mine])


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    run(__doc__, rows)
