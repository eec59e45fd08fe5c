"""From measured costs to the memory, traffic and time of one optimizer step on a cluster."""

from __future__ import annotations

from dataclasses import dataclass

from atr_scale.planner import gpus
from atr_scale.planner.costs import BatchSplit, Costs
from atr_scale.planner.step_memory import memory_at_peak
from atr_scale.planner.timeline import Cluster, Network, gpu_work, network
from atr_scale.planner.traffic import transfers
from atr_scale.planner.transfer import Transfer
from atr_scale.training.passes import STAGE_2_BUCKETS


@dataclass(frozen=True)
class StepEstimate:
    """One optimizer step on a cluster.

    memory: bytes by part at the moment of the peak. network: of `transfers`. seconds: by bound; "network" is
    the exposed part; "loader" runs beside the others, which add up. phases: seconds of the GPU by phase. samples: pairs
    that the step is trained on.
    """

    split: BatchSplit
    memory: dict[str, float]
    transfers: list[Transfer]
    network: Network
    seconds: dict[str, float]
    phases: dict[str, float]
    samples: int

    @property
    def peak(self) -> float:
        return sum(self.memory.values())

    @property
    def step(self) -> float:
        return max(sum(self.seconds.values()) - self.seconds["loader"], self.seconds["loader"])

    @property
    def exposed(self) -> float:
        """The share of the step during which the GPU waits for the network."""
        return self.network.exposed / self.step

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
    sent, work = transfers(costs, split), gpu_work(costs, cluster.gpu.rates, split)
    found = network(sent, work, cluster, STAGE_2_BUCKETS if costs.config.train.zero_stage == 2 else None)
    loader = accum * split.local_batch * cluster.clip_s / max(1, cluster.workers)
    seconds = {**work.bounds, "network": found.exposed, "loader": loader}
    return StepEstimate(split, memory_at_peak(costs, split), sent, found, seconds, work.phases, accum * global_batch)


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
