"""Gradients that travel during the backward pass: optimizer steps of two ranks over a network of 1 Gbit/s, against the
same steps with one reduction at the end, and against the plan. Needs root (tools/shaped_link.py).

A text encoder holds most gradients, small_cnn takes most time. Times are wall-clock seconds of the slower rank, medians
of turns. The plan takes the network's rate from the reduction alone, and the machine's from what the step with the
reduction at the end takes besides.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from atr_scale.config import RunConfig
from atr_scale.distributed.world import World
from atr_scale.planner import gpus, zero_memory
from atr_scale.planner.estimate import StepEstimate, estimate_step
from atr_scale.planner.gpus import GPU, Rates
from atr_scale.planner.ops import Recorder
from atr_scale.planner.planner import measure_costs
from atr_scale.planner.timeline import Cluster
from atr_scale.training.gradient_reduction import BUCKET_BYTES
from atr_scale.training.passes import ReducedPasses
from tools.bench import steps
from tools.bench.table import Row, run
from tools.ranks import run_ranks
from tools.shaped_link import ShapedLink, shaped_link, why_not

TURNS = 5
LATE_S = 0.5  # by which an operation may be late and the next ones catch up
# A core, roughly: the ratio of its rates; one factor for all follows from the measurement.
CORE = Rates(low=80e9, tf32=80e9, full=80e9, memory=10e9, launch=5e-6)


@dataclass(frozen=True)
class Case:
    """gbit: rate of the network. pace: rates that operations are slowed down to, so that they take no processor time;
    None for this machine's own."""

    config: RunConfig
    seconds: float
    gbit: float
    bucket_bytes: int
    pace: Rates | None = None
    turns: int = TURNS


@dataclass(frozen=True)
class Found:
    """Seconds of the reduction alone, of a step with the reduction at the end, and of one with it beside the backward
    pass. nbytes: of the gradients.
    """

    reduction: float
    at_end: float
    beside: float
    nbytes: int

    @property
    def hidden(self) -> float:
        """The share of the reduction that runs beside the backward pass."""
        return (self.at_end - self.beside) / self.reduction


class Paced(Recorder):
    """Slows operations down to `rates`, so that a step takes as long as planned without the network.

    Waiting takes no processor time: like a GPU, it leaves the processor to the network.
    """

    def __init__(self, rates: Rates) -> None:
        super().__init__()
        self.rates = rates
        self._due = time.perf_counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        begun, known = time.perf_counter(), len(self.rows)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        for _, flops, _, nbytes, _, _ in self.rows[known:]:
            # What an earlier operation was late is caught up; what the step has waited in between is not.
            self._due = max(self._due, begun - LATE_S) + max(flops / self.rates.full, nbytes / self.rates.memory)
            time.sleep(max(0.0, self._due - time.perf_counter()))
        return out


def measure(case: Case) -> Found:
    """Real updates of two ranks; the slower rank counts."""
    with shaped_link(case.gbit) as link:
        ranks = run_ranks(_on_rank, 2, link, case)
    reduction, at_end, beside = (max(times) for times in zip(*(seconds for seconds, _ in ranks), strict=True))
    return Found(reduction, at_end, beside, ranks[0][1])


def _on_rank(link: ShapedLink, case: Case) -> tuple[list[float], int]:
    link.join()
    engines = [steps.start(case.config) for _ in range(2)]
    for engine, most in zip(engines, (sys.maxsize, case.bucket_bytes), strict=True):
        assert isinstance(engine._passes, ReducedPasses)
        engine._passes._reduction.bucket_bytes = most
    batch = steps.noise(
        case.config.train.global_batch_size, case.seconds, engines[0].model.sample_rate, World.current()
    )
    sizes = [parameter.numel() for parameter in engines[0].model.parameters() if parameter.requires_grad]
    buffers = torch.zeros(sum(sizes)).split(case.bucket_bytes // 4)

    def reduce_alone() -> None:
        for work in [dist.all_reduce(buffer, async_op=True) for buffer in buffers]:
            work.wait()

    def step(engine: Any) -> Callable[[], object]:
        return lambda: steps.update(engine, batch).gradient_norm

    ways = (reduce_alone, *map(step, engines))
    taken = [_timed(ways, case.pace) for _ in range(case.turns + 1)][1:]
    return [median(times) for times in zip(*taken, strict=True)], 4 * sum(sizes)


def _timed(ways: Sequence[Callable[[], object]], pace: Rates | None) -> list[float]:
    taken = []
    for way in ways:
        dist.barrier()
        slowed: AbstractContextManager[object] = Paced(pace) if pace else nullcontext()
        with slowed:
            start = time.perf_counter()
            way()
            taken.append(time.perf_counter() - start)
    return taken


def plan(case: Case, found: Found) -> StepEstimate:
    """The plan of the step on this machine, at the measured rate of the network."""
    costs, _ = measure_costs(case.config, case.seconds, steps.NUM_WORDS, gpu=False)
    pairs = case.config.train.global_batch_size
    network = found.nbytes / found.reduction / gpus.LINK_SHARE  # two ranks send what they reduce
    core = GPU("core", 2**34, 0.0, 0.0, 0.0, 0.0, network, network, 0.0, case.pace or CORE)
    if case.pace is None:
        alone = sum(estimate_step(costs, Cluster(core, 2, 1, 0.0, 1), pairs).phases.values())
        factor = alone / (found.at_end - found.reduction)
        values = {name: getattr(CORE, name) * factor for name in ("low", "tf32", "full", "memory")}
        core = replace(core, rates=replace(CORE, **values, launch=CORE.launch / factor))
    with patch.object(zero_memory, "BUCKET_BYTES", case.bucket_bytes):
        return estimate_step(costs, Cluster(core, 2, 1, 0.0, 1), pairs)


def rows() -> Iterator[Row]:
    if reason := why_not():
        print(f"not measured: {reason}")
        return
    with tempfile.TemporaryDirectory() as folder:
        config = steps.configuration(Path(folder), "small_cnn", dim=512, layers=6, global_batch_size=64)
        case = Case(config, 20.0, 1.0, BUCKET_BYTES)
        found = measure(case)
        planned = plan(case, found)
    yield Row("step, gradients beside the backward pass", found.beside, found.at_end, "at its end", "s")
    yield Row(
        "hidden share of the reduction", found.hidden, planned.network.hidden / planned.network.busy, "planned", ""
    )
    yield Row(
        f"step: planned {planned.step:.4g}, off by",
        abs(planned.step - found.beside),
        found.beside,
        "measured",
        "s",
        0.15,
    )


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    run(__doc__, rows)
