"""Scores of whole splits, whatever the scorer, the work shared by all ranks.

Shape suffixes: C captions, N clips, K candidates of a query.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from atr_scale.parallel.world import World
from atr_scale.scorers.scorer import Scorer
from atr_scale.sequence import TokenSequence

SUMMED = 1 << 24  # scores that travel at once
BELOW = 8.0  # further below than two scores of a model can lie apart


@torch.no_grad()
def score(
    scorer: Scorer,
    text: TokenSequence,
    audio: TokenSequence,
    *,
    batch_size: int,
    world: World,
    device: torch.device,
    lockstep: bool = False,
) -> Tensor:
    """[C, N] float32 on the CPU of every rank: every caption with every clip, as `embed` gives them.

    batch_size: clips scored at once; these batches are fixed by the split alone, so any number of ranks gives the same
    numbers. lockstep: all ranks score equally many batches, which parameters sharded over ranks need.
    """
    if scorer.factorised:
        return text.pooled @ audio.pooled.T
    num_clips = len(audio.pooled)
    batches = [torch.arange(k, min(k + batch_size, num_clips)) for k in range(0, num_clips, batch_size)]
    mine = list(range(world.rank, len(batches), world.size))
    surplus = -(-len(batches) // world.size) - len(mine) if lockstep else 0
    text = text.to(device)
    out = torch.zeros(len(text.pooled), num_clips)
    progress = tqdm(mine + [0] * surplus, desc="scoring pairs", unit="batch", disable=None if world.is_main else True)
    for done, number in enumerate(progress):
        columns = scorer.scores(text, audio.take(batches[number]).to(device)).float().cpu()
        if done < len(mine):
            out[:, batches[number]] = columns
    if world.size > 1:  # every column is one rank's and zero elsewhere: the sum is exact
        for rows in out.split(max(1, SUMMED // num_clips)):
            rows.copy_(world.sum(rows.to(world.device)))
    return out


@torch.no_grad()
def rerank(
    scorer: Scorer,
    text: TokenSequence,
    audio: TokenSequence,
    first: Tensor,
    candidates: int,
    *,
    world: World,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """([C, N] for text queries, [C, N] for audio queries): each query's best `candidates` by the scores `first` [C, N]
    are scored anew by `scorer` and stay ahead of all others, which keep their order."""
    by_text = _rerank(
        lambda q, c: scorer.scores(text.take(q).to(device), audio.take(c).to(device)), first, candidates, world
    )
    by_audio = _rerank(
        lambda q, c: scorer.scores(text.take(c).to(device), audio.take(q).to(device)).T, first.T, candidates, world
    )
    return by_text, by_audio.T


def _rerank(score_pairs: Callable[[Tensor, Tensor], Tensor], first: Tensor, candidates: int, world: World) -> Tensor:
    """Rows are queries; score_pairs(query [1], items [K]) -> [1, K]."""
    # A stable sort and not topk: of equal scores the lower index comes first, as in the metrics.
    best = first.sort(dim=1, descending=True, stable=True).indices[:, :candidates]
    kept = best.sort(1).values
    mine = range(world.rank, len(first), world.size)
    progress = tqdm(mine, desc="re-ranking", unit="query", disable=None if world.is_main else True)
    found = {row: score_pairs(torch.tensor([row]), kept[row]).float().cpu()[0] for row in progress}
    out = first.float() - BELOW
    for part in world.gather_objects(found):
        for row, scores in part.items():
            out[row, kept[row]] = scores
    return out
