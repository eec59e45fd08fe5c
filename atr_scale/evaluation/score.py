"""Scores of whole splits, whatever the scorer, the work shared by all ranks.

Shape suffixes: C captions, N clips, K candidates of a query, p pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from atr_scale.batch import TokenSequence
from atr_scale.distributed.world import World
from atr_scale.evaluation.metrics import Ids, Ranks
from atr_scale.evaluation.rank_counts import MatrixScores, VectorScores
from atr_scale.scorers.scorer import Scorer

SUMMED = 1 << 24  # scores that travel at once
ROWS = 4096  # pairs ranked at once
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
    if scorer.is_dual_encoder:
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


class Reranked:
    """Scores [C, N] of a first stage of which each query's best K are scored anew and stay ahead of all others.

    by_text: the candidates of every caption, items int64 [C, K] in ascending order and their new scores [C, K];
    by_audio: those of every clip, [N, K].
    """

    def __init__(
        self, first: VectorScores | MatrixScores, by_text: tuple[Tensor, Tensor], by_audio: tuple[Tensor, Tensor]
    ) -> None:
        self.first, self.by_text, self.by_audio = first, by_text, by_audio
        self.shape = first.shape

    def ranks(self, text_audio_ids: Ids, audio_ids: Ids, world: World | None = None) -> Ranks:
        """As `vector_ranks`."""
        first = self.first.ranks(text_audio_ids, audio_ids, world)
        texts = np.arange(len(first.clip))
        t2a = _ranks_within(*self.by_text, texts, first.clip, first.t2a)
        return replace(first, t2a=t2a, a2t=_ranks_within(*self.by_audio, first.clip, texts, first.a2t))

    def row(self, text: int) -> Tensor:
        """[N], as a caption ranks the clips."""
        return _ahead(self.first.row(text), self.by_text, text)

    def column(self, audio: int) -> Tensor:
        """[C], as a clip ranks the captions."""
        return _ahead(self.first.column(audio), self.by_audio, audio)

    def block(self, texts: Tensor, audios: Tensor) -> Tensor:
        """[texts, audios] of chosen rows and columns, as captions rank clips."""
        return torch.stack([self.row(text)[audios] for text in texts.tolist()])

    def lists(self, k: int) -> Tensor:
        """[C, k] int64: the best k clips of every caption, best first; of equal ones the lower index."""
        items, scores = self.by_text
        candidates = items.gather(1, torch.sort(scores, dim=1, descending=True, stable=True).indices)
        return torch.cat([candidates, self.first.lists(k)[:, items.shape[1] :].cpu()], 1)[:, :k]


@torch.no_grad()
def rerank(
    scorer: Scorer,
    text: TokenSequence,
    audio: TokenSequence,
    first: VectorScores | MatrixScores,
    candidates: int,
    *,
    world: World,
    device: torch.device,
) -> Reranked:
    """The best `candidates` of each query by the scores `first` [C, N], in both directions, scored by `scorer`; all
    ranks call this and share the queries."""

    def by_text(query: Tensor, items: Tensor) -> Tensor:
        return scorer.scores(text.take(query).to(device), audio.take(items).to(device))

    def by_audio(query: Tensor, items: Tensor) -> Tensor:
        return scorer.scores(text.take(items).to(device), audio.take(query).to(device)).T

    return Reranked(first, _rerank(by_text, first, candidates, world), _rerank(by_audio, first.T, candidates, world))


def _rerank(
    score_pairs: Callable[[Tensor, Tensor], Tensor], first: VectorScores | MatrixScores, candidates: int, world: World
) -> tuple[Tensor, Tensor]:
    """Candidates of every row and their scores, [rows, K] each; score_pairs(query [1], items [K]) -> [1, K]."""
    mine = range(world.rank, first.shape[0], world.size)
    kept = first.lists(candidates, slice(world.rank, None, world.size)).cpu().sort(1).values
    progress = tqdm(mine, desc="re-ranking", unit="query", disable=None if world.is_main else True)
    scores = [
        score_pairs(torch.tensor([query]), items).float().cpu() for query, items in zip(progress, kept, strict=True)
    ]
    items = kept.new_empty(first.shape[0], kept.shape[1])
    found = torch.empty(items.shape)
    own = (kept, torch.cat(scores) if scores else found[:0])
    for rank, (others, their_scores) in enumerate(world.gather_objects(own)):
        items[rank :: world.size], found[rank :: world.size] = others, their_scores
    return items, found


def _ranks_within(
    items: Tensor, scores: Tensor, query: NDArray[np.int64], item: NDArray[np.int64], first: NDArray[np.int64]
) -> NDArray[np.int64]:
    """[p]: rank of each pair (query [p], item [p]) among the candidates of its query; its rank in the first stage,
    `first` [p], where it is none of them, for these are the same that were ahead of it."""
    out = first.copy()
    for some in np.array_split(np.arange(len(query)), -(-len(query) // ROWS)):
        candidates, theirs = items[query[some]].numpy(), scores[query[some]].numpy()
        own_item = candidates == item[some, None]
        pair, place = own_item.nonzero()
        own = theirs[pair, place][:, None]
        before = (theirs[pair] > own) | ((theirs[pair] == own) & (np.arange(theirs.shape[1]) < place[:, None]))
        out[some[pair]] = 1 + before.sum(1)
    return out


def _ahead(first: Tensor, candidates: tuple[Tensor, Tensor], query: int) -> Tensor:
    """A whole line of scores [n], to show: those of the first stage below those of the candidates."""
    items, scores = candidates
    return (first.float().cpu() - BELOW).index_copy(0, items[query], scores[query])
