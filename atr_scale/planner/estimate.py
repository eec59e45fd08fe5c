"""From measured costs to what a step takes of a GPU, of the network and of time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from atr_scale.config import RunConfig
from atr_scale.losses.terms import DEFAULT_BUDGET
from atr_scale.planner import gpus
from atr_scale.planner.gpus import GPU
from atr_scale.planner.measure import EncoderCosts, HeadCosts, features
from atr_scale.planner.ops import OpTable
from atr_scale.planner.zero_memory import FP32, Parameters, Transfer
from atr_scale.score_block import STRIPE_COLUMNS

ADAM_BYTES = 7 * FP32  # a parameter's: it, its gradient and both moments are read, all but the gradient written


@dataclass(frozen=True)
class Costs:
    """All that was measured of a configuration.

    tiled_heads, dense_heads: with the losses of large and of small batches. pairwise: scores are stored, [B, b].
    pairs_per_tile: of the scorer.
    """

    config: RunConfig
    encoders: EncoderCosts
    tiled_heads: HeadCosts
    dense_heads: HeadCosts
    parameters: Parameters
    pairwise: bool
    pairs_per_tile: int | None

    def heads(self, texts: int) -> HeadCosts:
        """Those of so many texts in the global batch."""
        return self.dense_heads if DEFAULT_BUDGET.allows_dense(texts) else self.tiled_heads

    def pairs_at_once(self, texts: int, audios: int) -> int:
        """Of scores that are looked at together."""
        columns = audios if DEFAULT_BUDGET.allows_dense(texts) else min(audios, STRIPE_COLUMNS)
        return min(texts * columns, self.pairs_per_tile or texts * columns)


@dataclass(frozen=True)
class Cluster:
    """GPUs of one kind. clip_s: seconds of one core to read and decode a clip; workers: processes a GPU that do."""

    gpu: GPU
    world_size: int
    gpus_per_node: int
    clip_s: float
    workers: int

    @property
    def bandwidth(self) -> float:
        """Bytes/s that a GPU sends in a ring over all GPUs, its slowest hop deciding."""
        inside = self.world_size <= self.gpus_per_node
        return gpus.LINK_SHARE * (self.gpu.link if inside else min(self.gpu.link, self.gpu.network))


@dataclass(frozen=True)
class StepEstimate:
    """One update on a cluster.

    memory: bytes by part at the moment of the peak. transfers: with their kinds. seconds: by bound, those of the GPU
    and the network add up; "loader" runs beside them.
    """

    world_size: int
    global_batch: int
    micro_batch: int
    memory: dict[str, float]
    transfers: list[Transfer]
    seconds: dict[str, float]
    samples: int = field(default=0)

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
        """What limits the step."""
        if self.seconds["loader"] >= self.step:
            return "loader"
        return max((name for name in self.seconds if name != "loader"), key=self.seconds.__getitem__)


def estimate_step(costs: Costs, cluster: Cluster, global_batch: int, micro_batch: int | None = None) -> StepEstimate:
    """micro_batch: rows of a forward; below a rank's share (the default) that is GradCache."""
    share = global_batch // cluster.world_size
    micro = micro_batch or share
    table = costs.encoders.at(micro)
    sent = transfers(costs, cluster.world_size, global_batch, micro)
    seconds = _seconds(costs, cluster, global_batch, micro, table)
    hops = max(1.0, np.log2(cluster.world_size)) * gpus.COLLECTIVE_S
    seconds["network"] = sum(t.sent(cluster.world_size) / cluster.bandwidth + t.calls * hops for t in sent)
    accum = costs.config.train.accum_steps
    seconds["loader"] = accum * share * cluster.clip_s / max(1, cluster.workers)
    memory = max(_moments(costs, cluster.world_size, global_batch, micro, table), key=lambda parts: sum(parts.values()))
    return StepEstimate(cluster.world_size, global_batch, micro, memory, sent, seconds, accum * global_batch)


def peak_of_step(costs: Costs, world_size: int, global_batch: int, micro: int) -> float:
    """Bytes of a GPU at the most."""
    table = costs.encoders.at(micro)
    return max(sum(parts.values()) for parts in _moments(costs, world_size, global_batch, micro, table))


def largest_share(costs: Costs, cluster: Cluster, micro: int | None = None, limit: int = 1 << 20) -> int:
    """Most rows a rank that fit, in one forward or in forwards of `micro`; 0 where none does."""
    room = gpus.USABLE_SHARE * cluster.gpu.memory
    unit = micro or 1

    def fits(units: int) -> bool:
        rows = units * unit
        return peak_of_step(costs, cluster.world_size, rows * cluster.world_size, micro or rows) <= room

    low, high = 0, 1
    while high * unit <= limit and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * unit


def fitting_micro_batch(costs: Costs, cluster: Cluster, global_batch: int) -> int | None:
    """The most rows of a forward, a divisor of the rank's share, that fit; None where not even one does."""
    share = global_batch // cluster.world_size
    room = gpus.USABLE_SHARE * cluster.gpu.memory
    divisors = (rows for rows in range(share, 0, -1) if share % rows == 0)
    return next((m for m in divisors if peak_of_step(costs, cluster.world_size, global_batch, m) <= room), None)


def transfers(costs: Costs, world_size: int, global_batch: int, micro: int) -> list[Transfer]:
    """What an update sends between ranks, by kind."""
    if world_size == 1:
        return []
    train, share = costs.config.train, global_batch // world_size
    found = []
    for name, dtype, coefficients in costs.heads(global_batch).collectives:
        nbytes = round(float(coefficients @ features(global_batch, share)))
        if name.startswith("reduce_scatter"):
            nbytes //= world_size
        found.append(Transfer(*_kind(name, dtype, of_pairs=bool((coefficients[3:] > 0.5).any())), nbytes))
    found = [Transfer(t.kind, t.collective, t.nbytes * train.accum_steps, train.accum_steps) for t in found]
    chunks = share // micro
    passes = train.accum_steps * (1 if chunks == 1 else 2 * chunks - min(train.kept_chunks, chunks))
    if train.zero_stage == 3:
        found.append(Transfer("rounds", "all_reduce", 8 * passes, passes))
    found += costs.parameters.transfers(train.zero_stage, world_size, passes)
    found.append(Transfer("flags", "all_gather", 4))
    return _by_kind(found)


def _kind(name: str, dtype: torch.dtype, of_pairs: bool) -> tuple[str, str]:
    if name.startswith("reduce_scatter"):
        return f"gradients of {'scores' if of_pairs else 'texts'}", "reduce_scatter"
    if name == "allreduce":
        return ("statistics" if dtype.is_floating_point else "sizes"), "all_reduce"
    if name == "allgather":
        return "sizes", "all_gather"
    if not dtype.is_floating_point:
        return "ids and masks", "all_gather"
    return ("scores" if of_pairs else "texts"), "all_gather"


def _by_kind(found: list[Transfer]) -> list[Transfer]:
    sums: dict[tuple[str, str], tuple[int, int]] = {}
    for t in found:
        nbytes, calls = sums.get((t.kind, t.collective), (0, 0))
        sums[t.kind, t.collective] = nbytes + t.nbytes, calls + t.calls
    return [Transfer(*key, *value) for key, value in sums.items()]


def _seconds(costs: Costs, cluster: Cluster, global_batch: int, micro: int, table: OpTable) -> dict[str, float]:
    """Seconds of an update by what each operation is bound by: the largest of compute, memory and launch."""
    gpu, train = cluster.gpu, costs.config.train
    share = global_batch // cluster.world_size
    chunks = share // micro
    compute = table.low / gpu.low + (table.flops - table.low) / gpu.full
    bounds = np.stack(
        [
            compute / gpus.COMPUTE_SHARE,
            table.nbytes / (gpu.bandwidth * gpus.MEMORY_SHARE),
            np.full(len(table.names), gpus.LAUNCH_S),
        ]
    )
    largest, longest = bounds.argmax(0), bounds.max(0)
    again = max(0, chunks - train.kept_chunks) if chunks > 1 else 0  # forwards that are made twice
    forward = np.arange(len(table.names)) < costs.encoders.ends[1]
    counts = chunks + again * forward
    seconds = {
        name: float((longest * counts)[largest == number].sum())
        for number, name in enumerate(("compute", "memory", "launch"))
    }
    heads = costs.heads(global_batch)
    seconds["compute"] += heads.at("flops", global_batch, share) / (gpu.full * gpus.COMPUTE_SHARE)
    seconds["memory"] += heads.at("nbytes", global_batch, share) / (gpu.bandwidth * gpus.MEMORY_SHARE)
    tiles = -(-global_batch * share // costs.pairs_at_once(global_batch, share))
    seconds["launch"] += tiles * heads.ops * gpus.LAUNCH_S
    seconds = {name: train.accum_steps * value for name, value in seconds.items()}
    learned = sum(costs.parameters.trainable) / (cluster.world_size if train.zero_stage else 1)
    seconds["memory"] += ADAM_BYTES * learned / (gpu.bandwidth * gpus.MEMORY_SHARE)
    return seconds


def _moments(
    costs: Costs, world_size: int, global_batch: int, micro: int, table: OpTable
) -> Iterator[dict[str, float]]:
    """Bytes by part at every moment of an update that may be its peak."""
    train, share = costs.config.train, global_batch // world_size
    stage, chunked = train.zero_stage, micro < share
    several = chunked or train.accum_steps > 1
    held, last = costs.parameters.buffers(stage, several)
    states: dict[str, float] = {
        **costs.parameters.states(stage, world_size),
        "parameters gathered": costs.parameters.gathered(stage),
    }
    gathered, scores = _heads_memory(costs, world_size, global_batch)
    text_end, audio_end, audio_back, _ = costs.encoders.ends
    kept_text, kept = table.live[text_end - 1], table.live[audio_end - 1]
    all_gradients = costs.parameters.gradients(stage, world_size, several)
    before = all_gradients if train.accum_steps > 1 else 0  # of earlier losses of the update
    cached = share * _row_bytes(costs.encoders) if chunked else 0.0

    # The loss, with the activations of the whole batch, or with the cached outputs of all chunks and no activations.
    kept_chunks = min(train.kept_chunks, share // micro) if chunked else 1
    yield {
        **states,
        "gradients": before,
        "activations of text": kept_chunks * kept_text,
        "activations of audio": kept_chunks * (kept - kept_text),
        "cached outputs": cached,
        "texts gathered": gathered,
        "scores and tiles": scores,
        "buckets": held,
    }
    # Every operation of the backward pass (and of the forward, which needs less).
    own = table.gradients if stage < 2 or several else np.minimum(table.gradients, all_gradients)
    gradients = np.maximum(own, all_gradients) if several else own
    most = int((table.live + gradients).argmax())
    live_text = kept_text if text_end <= most < audio_back else table.live[most]
    yield {
        **states,
        "gradients": float(gradients[most]),
        "activations of text": float(live_text),
        "activations of audio": float(table.live[most] - live_text),
        "cached outputs": 2 * cached,
        "buckets": held,
    }
    # During a backward, gradients move into the bucket; after it they are whole when their reduction starts.
    yield {**states, "gradients": 0.0 if stage >= 2 and not several else all_gradients, "buckets": last}


def _row_bytes(encoders: EncoderCosts) -> float:
    """Of what the heads read of one row."""
    return sum(x[0].numel() * x.element_size() for side in encoders.outputs for x in (side.tokens, side.pooled))


def _heads_memory(costs: Costs, world_size: int, texts: int) -> tuple[float, float]:
    """Bytes at the most of gathered texts, and of scores, their gradients and tiles."""
    audios, heads = texts // world_size, costs.heads(texts)
    gathered = 0.0
    for name, dtype, coefficients in heads.collectives:
        if name == "allgather_base" and dtype.is_floating_point and world_size > 1:
            gathered += world_size * float(coefficients @ features(texts, audios))
    pairs, alive = texts * audios, costs.pairs_at_once(texts, audios)
    stored = FP32 * pairs if costs.pairwise else 0.0
    kept, peak = heads.terms["kept"], heads.terms["peak"]
    per_pair = max(0.0, peak[3] - kept[3] - (FP32 if costs.pairwise else 0))
    linear = float(peak[:3] @ features(texts, audios)[:3])
    width = costs.encoders.outputs.text.pooled.shape[1]
    gradients = FP32 * (pairs if costs.pairwise else (texts + audios) * width)
    dense = DEFAULT_BUDGET.allows_dense(texts)
    tiles = 0.0 if dense else min(FP32 * pairs, max(0.0, DEFAULT_BUDGET.kept - gradients))
    matrices = float(peak[4]) * texts**2
    whole = linear + max(0.0, kept[3]) * pairs + stored + per_pair * alive + tiles + matrices
    return gathered, max(0.0, whole - gathered)
