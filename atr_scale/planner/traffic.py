"""The bytes that one optimizer step sends between ranks."""

from __future__ import annotations

from dataclasses import replace

import torch

from atr_scale.planner.costs import BatchSplit, Costs
from atr_scale.planner.measure import features
from atr_scale.planner.transfer import Phase, Transfer
from atr_scale.planner.zero_memory import FP32

NORMS = 3  # of parameters, each with a norm of its gradient: audio, text, heads; fewer if an encoder is frozen


def transfers(costs: Costs, split: BatchSplit) -> list[Transfer]:
    """The transfers of one optimizer step, by kind; none on a single rank."""
    train, world_size = costs.config.train, split.world_size
    if world_size == 1:
        return []
    chunks, losses = split.chunks, train.accum_steps
    found = []
    for name, dtype, coefficients in costs.heads(split.global_batch).collectives:
        nbytes = round(float(coefficients @ features(split.global_batch, split.local_batch)))
        if name.startswith("reduce_scatter"):
            nbytes //= world_size
        kind, collective = _kind(name, dtype, of_pairs=bool((coefficients[3:] > 0.5).any()))
        behind = _behind(kind, costs.encoders.phases) if chunks == 1 else None
        found.append(Transfer(kind, collective, losses * nbytes, losses, behind))
    forwards = 1 if chunks == 1 else 2 * chunks - min(train.kept_chunks, chunks)
    passes = losses * forwards
    if train.zero_stage == 3:
        found.append(Transfer("rounds", "all_gather", 8 * passes, passes))
    sent_as = FP32 // 2 if train.gradient_dtype == "bf16" else FP32
    found += costs.parameters.transfers(train.zero_stage, world_size, passes, sent_as)
    found.append(Transfer("norms and flags", "all_reduce", 8 * (NORMS + 1 + world_size)))
    return _by_kind(found)


def _behind(kind: str, phases: tuple[Phase, ...]) -> Phase | None:
    """The phase beside which texts travel, and beside which their gradients come back: those are needed when the text
    encoder's backward pass begins."""
    if kind == "texts":
        return "audio forward"
    return "audio backward" if kind == "gradients of texts" and phases[2] == "audio backward" else None


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
    sums: dict[tuple[str, str], Transfer] = {}
    for t in found:
        one = sums.get((t.kind, t.collective))
        sums[t.kind, t.collective] = replace(t, nbytes=t.nbytes + one.nbytes, calls=t.calls + one.calls) if one else t
    return list(sums.values())
