"""The memory that one optimizer step needs on a GPU.

What losses and scorers take beyond that, because it is free, is not counted.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from atr_scale.losses.terms import DEFAULT_BUDGET
from atr_scale.losses.tiled.tiles import LOSS_BYTES
from atr_scale.planner.costs import BatchSplit, Costs
from atr_scale.planner.measure import EncoderCosts, features
from atr_scale.planner.ops import OpTable
from atr_scale.planner.zero_memory import FP32


def memory_at_peak(costs: Costs, split: BatchSplit) -> dict[str, float]:
    """Bytes by part at the moment of an optimizer step when their sum is largest."""
    return max(_moments(costs, split), key=lambda parts: sum(parts.values()))


def _moments(costs: Costs, split: BatchSplit) -> Iterator[dict[str, float]]:
    """Bytes by part at every moment of an optimizer step that may be its peak."""
    train, table = costs.config.train, costs.encoders.at(split.micro_batch)
    stage, chunked = train.zero_stage, split.chunks > 1
    several = chunked or train.accum_steps > 1
    held, last = costs.parameters.buffers(stage, split.world_size)
    states: dict[str, float] = {
        **costs.parameters.states(stage, split.world_size),
        "parameters gathered": costs.parameters.gathered(stage),
    }
    gathered, scores = _heads_memory(costs, split)
    text_end, audio_end, _, _ = costs.encoders.ends
    kept_text, kept = table.live[text_end - 1], table.live[audio_end - 1]
    waiting, reduced = costs.parameters.gradients(stage, split.world_size, several)
    cached = split.local_batch * _row_bytes(costs.encoders) if chunked else 0.0

    # The loss, with the activations of the whole local batch; under GradCache with the cached outputs of all chunks and
    # the activations of the kept ones.
    kept_chunks = min(train.kept_chunks, split.chunks) if chunked else 1
    yield {
        **states,
        "gradients": waiting if train.accum_steps > 1 else 0,  # of earlier losses of the step
        "activations of text": kept_chunks * kept_text,
        "activations of audio": kept_chunks * (kept - kept_text),
        "cached outputs": cached,
        "texts gathered": gathered,
        "scores and tiles": scores,
        "buckets": held,
    }
    # Every operation of the backward pass (the forward pass needs less).
    gradients = reduced + (np.full_like(table.live, waiting) if several else np.minimum(table.gradients, waiting))
    most = int((table.live + gradients).argmax())
    live_audio = _live_audio(costs.encoders, table, most)
    yield {
        **states,
        "gradients": float(gradients[most]),
        "activations of text": float(table.live[most] - live_audio),
        "activations of audio": float(live_audio),
        "cached outputs": 2 * cached,
        "buckets": held,
    }
    # The last reduction. A single backward pass of stage 3 has left its gradients in the bucket.
    at_end = 0.0 if stage == 3 and not several else reduced + waiting
    yield {**states, "gradients": at_end, "buckets": last}


def _live_audio(encoders: EncoderCosts, table: OpTable, moment: int) -> float:
    """Bytes of audio activations alive after the operation `moment`; the other live bytes are those of texts."""
    text_end, audio_end, first_end, _ = encoders.ends
    kept_text, live = table.live[text_end - 1], table.live[moment]
    text_first = encoders.phases[2] == "text backward"
    if moment < text_end:
        return 0.0
    if audio_end <= moment < first_end and text_first:
        return float(table.live[audio_end - 1] - kept_text)
    if moment < first_end:
        return float(live - kept_text)
    return float(live) if text_first else 0.0


def _row_bytes(encoders: EncoderCosts) -> float:
    """Bytes of the encoder outputs of one row that the heads read."""
    return sum(x[0].numel() * x.element_size() for side in encoders.outputs for x in (side.tokens, side.pooled))


def _heads_memory(costs: Costs, split: BatchSplit) -> tuple[float, float]:
    """Most bytes of gathered texts, and of scores with their gradients and tiles."""
    world_size, texts, audios = split.world_size, split.global_batch, split.local_batch
    heads = costs.heads(texts)
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
    tiles = 0.0 if dense else min(FP32 * pairs, max(0.0, LOSS_BYTES - gradients))
    matrices = float(peak[4]) * texts**2
    whole = linear + max(0.0, kept[3]) * pairs + stored + per_pair * alive + tiles + matrices
    return gathered, max(0.0, whole - gathered)
