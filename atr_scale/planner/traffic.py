"""The bytes that one optimizer step sends between ranks."""

from __future__ import annotations

import torch

from atr_scale.planner.costs import BatchSplit, Costs
from atr_scale.planner.measure import features
from atr_scale.planner.zero_memory import Transfer


def transfers(costs: Costs, split: BatchSplit) -> list[Transfer]:
    """The transfers of one optimizer step, by kind; none on a single rank."""
    train, world_size = costs.config.train, split.world_size
    if world_size == 1:
        return []
    found = []
    for name, dtype, coefficients in costs.heads(split.global_batch).collectives:
        nbytes = round(float(coefficients @ features(split.global_batch, split.local_batch)))
        if name.startswith("reduce_scatter"):
            nbytes //= world_size
        found.append(Transfer(*_kind(name, dtype, of_pairs=bool((coefficients[3:] > 0.5).any())), nbytes))
    found = [Transfer(t.kind, t.collective, t.nbytes * train.accum_steps, train.accum_steps) for t in found]
    chunks = split.chunks
    forwards = 1 if chunks == 1 else 2 * chunks - min(train.kept_chunks, chunks)
    passes = train.accum_steps * forwards
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
