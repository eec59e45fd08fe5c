"""From measured costs to the memory, traffic and time of one optimizer step on a cluster."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from atr_scale.planner import gpus
from atr_scale.planner.costs import BatchSplit, Costs
from atr_scale.planner.gpus import GPU
from atr_scale.planner.step_memory import memory_at_peak
from atr_scale.planner.traffic import transfers
from atr_scale.planner.zero_memory import FP32, Transfer

ADAM_BYTES = 7 * FP32  # of one parameter: it, its gradient and both moments are read, all but the gradient written


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
        """Bytes/s that a GPU sends in a ring over all GPUs, at the ring's slowest hop."""
        inside = self.world_size <= self.gpus_per_node
        return gpus.LINK_SHARE * (self.gpu.link if inside else min(self.gpu.link, self.gpu.network))


@dataclass(frozen=True)
class StepEstimate:
    """One optimizer step on a cluster.

    memory: bytes by part at the moment of the peak. seconds: by bound; "loader" runs beside the others, which add up.
    samples: pairs that the step is trained on.
    """

    split: BatchSplit
    memory: dict[str, float]
    transfers: list[Transfer]
    seconds: dict[str, float]
    samples: int

    @property
    def peak(self) -> float:
        return sum(self.memory.values())

    @property
    def step(self) -> float:
        return max(sum(self.seconds.values()) - self.seconds["loader"], self.seconds["loader"])

    @property
    def rate(self) -> float:
        """Clips a second over all GPUs."""
        return self.samples / self.step

    @property
    def bound(self) -> str:
        """The name of the largest part of `seconds`."""
        if self.seconds["loader"] >= self.step:
            return "loader"
        return max((name for name in self.seconds if name != "loader"), key=self.seconds.__getitem__)


def estimate_step(costs: Costs, cluster: Cluster, global_batch: int, micro_batch: int | None = None) -> StepEstimate:
    """One optimizer step on `cluster`. micro_batch: rows of a forward pass, by default the whole local batch."""
    size, accum = cluster.world_size, costs.config.train.accum_steps
    split = BatchSplit(size, global_batch, micro_batch or global_batch // size)
    sent = transfers(costs, split)
    seconds = _seconds(costs, cluster, split)
    latency = max(1.0, np.log2(size)) * gpus.COLLECTIVE_S
    seconds["network"] = sum(t.sent(size) / cluster.bandwidth + t.calls * latency for t in sent)
    seconds["loader"] = accum * split.local_batch * cluster.clip_s / max(1, cluster.workers)
    return StepEstimate(split, memory_at_peak(costs, split), sent, seconds, accum * global_batch)


def largest_local_batch(costs: Costs, cluster: Cluster, micro: int | None = None, limit: int = 1 << 20) -> int:
    """Most pairs that fit on a rank, in one forward pass or in micro-batches of `micro`; 0 if none fits."""
    unit = micro or 1

    def fits(units: int) -> bool:
        rows = units * unit
        return _fits(costs, cluster, BatchSplit(cluster.world_size, rows * cluster.world_size, micro or rows))

    low, high = 0, 1
    while high * unit <= limit and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * unit


def fitting_micro_batch(costs: Costs, cluster: Cluster, global_batch: int) -> int | None:
    """The largest micro-batch that fits, a divisor of the local batch; None if not even one pair fits."""
    size = cluster.world_size
    local = global_batch // size
    divisors = (rows for rows in range(local, 0, -1) if local % rows == 0)
    return next((rows for rows in divisors if _fits(costs, cluster, BatchSplit(size, global_batch, rows))), None)


def _fits(costs: Costs, cluster: Cluster, split: BatchSplit) -> bool:
    return sum(memory_at_peak(costs, split).values()) <= gpus.USABLE_SHARE * cluster.gpu.memory


def _seconds(costs: Costs, cluster: Cluster, split: BatchSplit) -> dict[str, float]:
    """Seconds of the GPU in one step, each operation counted under its bound: compute, memory or launch."""
    gpu, train, table = cluster.gpu, costs.config.train, costs.encoders.at(split.micro_batch)
    compute = table.low / gpu.low + (table.flops - table.low) / gpu.full
    bounds = np.stack(
        [
            compute / gpus.COMPUTE_SHARE,
            table.nbytes / (gpu.bandwidth * gpus.MEMORY_SHARE),
            np.full(len(table.names), gpus.LAUNCH_S),
        ]
    )
    largest, longest = bounds.argmax(0), bounds.max(0)
    again = max(0, split.chunks - train.kept_chunks) if split.chunks > 1 else 0  # forward passes that run twice
    forward = np.arange(len(table.names)) < costs.encoders.ends[1]
    counts = split.chunks + again * forward
    seconds = {
        name: float((longest * counts)[largest == number].sum())
        for number, name in enumerate(("compute", "memory", "launch"))
    }
    texts, audios = split.global_batch, split.local_batch
    heads = costs.heads(texts)
    seconds["compute"] += heads.at("flops", texts, audios) / (gpu.full * gpus.COMPUTE_SHARE)
    seconds["memory"] += heads.at("nbytes", texts, audios) / (gpu.bandwidth * gpus.MEMORY_SHARE)
    tiles = -(-texts * audios // costs.pairs_at_once(texts, audios))
    seconds["launch"] += tiles * heads.ops * gpus.LAUNCH_S
    seconds = {name: train.accum_steps * value for name, value in seconds.items()}
    learned = sum(costs.parameters.trainable) / (split.world_size if train.zero_stage else 1)
    seconds["memory"] += ADAM_BYTES * learned / (gpu.bandwidth * gpus.MEMORY_SHARE)
    return seconds
