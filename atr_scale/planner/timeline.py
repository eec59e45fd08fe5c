"""The GPU's work in one optimizer step, and the transfers that run beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from atr_scale.planner import gpus
from atr_scale.planner.costs import BatchSplit, Costs
from atr_scale.planner.gpus import GPU, Rates
from atr_scale.planner.ops import OpTable
from atr_scale.planner.transfer import Transfer
from atr_scale.planner.zero_memory import FP32

ADAM_BYTES = 7 * FP32  # of one parameter: it, its gradient and both moments are read, all but the gradient written
BOUNDS = ("matrix products", "memory bandwidth", "launches")
SECOND_FORWARDS = "second forwards"  # of GradCache: what too little GPU memory costs


@dataclass(frozen=True)
class Cluster:
    """GPUs of one kind. clip_s: seconds of one core to read and decode a clip. workers: loader processes of a GPU."""

    gpu: GPU
    world_size: int
    gpus_per_node: int
    clip_s: float
    workers: int

    @property
    def bandwidth(self) -> float:
        """Bytes/s that a GPU sends in one ring over all GPUs, at the ring's slowest hop."""
        inside = self.world_size <= self.gpus_per_node
        return gpus.LINK_SHARE * (self.gpu.link if inside else min(self.gpu.link, self.gpu.network))

    def seconds(self, transfer: Transfer) -> float:
        """All calls of a transfer, one after the other."""
        latency = max(1.0, np.log2(self.world_size)) * gpus.COLLECTIVE_S
        return float(transfer.sent(self.world_size) / self.bandwidth + transfer.calls * latency)


@dataclass(frozen=True)
class Work:
    """Seconds of the GPU in one optimizer step.

    bounds: by what limits the operations, BOUNDS and SECOND_FORWARDS. phases: the same seconds by phase: those of
    transfer.Phase, "scores and loss" and "optimizer". ready, gradients: after each operation of the last backward pass,
    seconds since the pass began, and bytes of finished gradients.
    """

    bounds: dict[str, float]
    phases: dict[str, float]
    ready: NDArray[np.float64]
    gradients: NDArray[np.float64]


def gpu_work(costs: Costs, rates: Rates, split: BatchSplit) -> Work:
    """The work of one optimizer step; an operation takes the longest of its products, its bytes and a launch."""
    train, table, encoders = costs.config.train, costs.encoders.at(split.micro_batch), costs.encoders
    each = _by_bound(table, rates, train.tf32)
    forward = each[:, : encoders.ends[1]].sum()
    again = max(0, split.chunks - train.kept_chunks) if split.chunks > 1 else 0  # forward passes that run twice
    heads = _heads(costs, rates, split)
    learned = sum(costs.parameters.trainable) / (split.world_size if train.zero_stage else 1)
    optimizer = ADAM_BYTES * learned / rates.memory
    bounds = dict(zip(BOUNDS, train.accum_steps * (split.chunks * each.sum(1) + heads), strict=True))
    bounds["memory bandwidth"] += optimizer
    bounds[SECOND_FORWARDS] = train.accum_steps * again * forward
    phases: dict[str, float] = {}
    for name in encoders.phases:
        passes = split.chunks + (again if name.endswith("forward") else 0)
        phases[name] = train.accum_steps * passes * float(each[:, encoders.phase(name)].sum())
    phases |= {"scores and loss": train.accum_steps * float(heads.sum()), "optimizer": optimizer}
    back = slice(encoders.ends[1], None)
    return Work(
        {name: float(value) for name, value in bounds.items()},
        phases,
        each[:, back].sum(0).cumsum(),
        table.gradients[back],
    )


def _by_bound(table: OpTable, rates: Rates, tf32: bool) -> NDArray[np.float64]:
    """Seconds of each operation in the row of its bound, [len(BOUNDS), operations]."""
    products = table.low / rates.low + (table.flops - table.low) / (rates.tf32 if tf32 else rates.full)
    times = np.stack([products, table.nbytes / rates.memory, np.full(len(table.names), rates.launch)])
    return np.where(np.arange(len(BOUNDS))[:, None] == times.argmax(0), times, 0.0)


def _heads(costs: Costs, rates: Rates, split: BatchSplit) -> NDArray[np.float64]:
    """Seconds of scorer and loss by bound, forward and backward."""
    texts, audios = split.global_batch, split.local_batch
    heads, kind = costs.heads(texts), getattr(costs.config.train, "head_products", "ieee")
    products = {"ieee": rates.full, "tf32": rates.tf32, "bf16x3": rates.low / 3}[kind]
    tiles = -(-texts * audios // costs.pairs_at_once(texts, audios))
    flops, nbytes = (heads.at(name, texts, audios) for name in ("flops", "nbytes"))
    return np.array([flops / products, nbytes / rates.memory, tiles * heads.ops * rates.launch])


@dataclass(frozen=True)
class Network:
    """Seconds of transfers in one optimizer step: of all, and of those during which the GPU waits."""

    busy: float
    exposed: float

    @property
    def hidden(self) -> float:
        return self.busy - self.exposed


def network(transfers: Sequence[Transfer], work: Work, cluster: Cluster, in_flight: int | None) -> Network:
    """Transfers beside the work of an optimizer step. in_flight: most buckets of gradients that wait at a time."""
    exposed = 0.0
    for transfer in transfers:
        seconds = cluster.seconds(transfer)
        if transfer.behind == "buckets":
            exposed += reduction_tail(work.ready, work.gradients, transfer.calls, seconds, in_flight)
        else:
            exposed += max(0.0, seconds - (work.phases[transfer.behind] if transfer.behind else 0.0))
    return Network(sum(map(cluster.seconds, transfers)), exposed)


def reduction_tail(
    ready: NDArray[np.float64],
    gradients: NDArray[np.float64],
    buckets: int,
    seconds: float,
    in_flight: int | None = None,
) -> float:
    """Seconds by which the reduction of equal buckets prolongs a backward pass.

    ready, gradients: as in Work. seconds: of all buckets on the network, one after the other. in_flight: the backward
    pass waits while so many buckets are full and not yet reduced.
    """
    sizes = gradients[-1] * np.arange(1, buckets + 1) / buckets
    full = ready[np.searchsorted(gradients, sizes * (1 - 1e-9))]
    ends: list[float] = []
    waited = 0.0
    for number, moment in enumerate(full):
        if in_flight is not None and number >= in_flight:
            waited = max(waited, ends[number - in_flight] - moment)
        ends.append(max(ends[-1] if ends else 0.0, moment + waited) + seconds / buckets)
    return float(max(waited, ends[-1] - ready[-1])) if ends else 0.0
