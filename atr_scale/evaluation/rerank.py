"""Re-ranking: a second scorer scores only the best candidates of each query by a first one. The processes divide it.

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
from atr_scale.evaluation.parallel import Parallel
from atr_scale.evaluation.retrieval_scores import DualEncoderScores, RetrievalScores, ScoreMatrix
from atr_scale.score_block import ALL
from atr_scale.scorers.scorer import Scorer

PAIRS = 4096  # pairs ranked at once
BELOW = 8.0  # more than two scores of a model can differ by


class RerankedScores(RetrievalScores):
    """Scores [C, N] of a first scorer, of which the best K of each query have new scores and precede all others.

    by_text: candidates of every caption, (items int64 [C, K] in ascending order, new scores [C, K]); by_audio: those of
    every clip, [N, K].
    """

    def __init__(
        self, first: DualEncoderScores | ScoreMatrix, by_text: tuple[Tensor, Tensor], by_audio: tuple[Tensor, Tensor]
    ) -> None:
        self.first, self.by_text, self.by_audio = first, by_text, by_audio
        self.shape = first.shape

    def ranks(self, text_audio_ids: Ids, audio_ids: Ids, world: World | None = None) -> Ranks:
        first = self.first.ranks(text_audio_ids, audio_ids, world)
        texts = np.arange(len(first.clip))
        t2a = _ranks_within(*self.by_text, texts, first.clip, first.t2a)
        return replace(first, t2a=t2a, a2t=_ranks_within(*self.by_audio, first.clip, texts, first.a2t))

    def row(self, text: int) -> Tensor:
        """[N]: scores in the order in which the caption ranks the clips."""
        return _candidates_ahead(self.first.row(text), self.by_text, text)

    def column(self, audio: int) -> Tensor:
        """[C]: scores in the order in which the clip ranks the captions."""
        return _candidates_ahead(self.first.column(audio), self.by_audio, audio)

    def block(self, texts: Tensor, audios: Tensor) -> Tensor:
        return torch.stack([self.row(text)[audios] for text in texts.tolist()])

    def lists(self, k: int, texts: slice = ALL) -> Tensor:
        items, scores = (part[texts] for part in self.by_text)
        candidates = items.gather(1, torch.sort(scores, dim=1, descending=True, stable=True).indices)
        return torch.cat([candidates, self.first.lists(k, texts)[:, items.shape[1] :].cpu()], 1)[:, :k]


@torch.no_grad()
def rerank(
    scorer: Scorer,
    text: TokenSequence,
    audio: TokenSequence,
    first: DualEncoderScores | ScoreMatrix,
    candidates: int,
    parallel: Parallel,
) -> RerankedScores:
    """Scores by `scorer` for the best `candidates` of each query by `first` [C, N], in both directions.

    text, audio: the split, which `embed` returned. All processes call this and divide the queries.
    """
    world, device = parallel.world, parallel.device

    def by_text(query: Tensor, items: Tensor) -> Tensor:
        return scorer.scores(text.take(query).to(device), audio.take(items).to(device))

    def by_audio(query: Tensor, items: Tensor) -> Tensor:
        return scorer.scores(text.take(items).to(device), audio.take(query).to(device)).T

    return RerankedScores(
        first, _rerank(by_text, first, candidates, world), _rerank(by_audio, first.T, candidates, world)
    )


def _rerank(
    score_pairs: Callable[[Tensor, Tensor], Tensor], first: RetrievalScores, candidates: int, world: World
) -> tuple[Tensor, Tensor]:
    """(candidates, their new scores) of every row, [rows, K] each; score_pairs(query [1], items [K]) -> [1, K]."""
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
    """[p]: rank of each pair (query [p], item [p]).

    A candidate of its query is ranked among the candidates. Any other item keeps its rank by the first scorer, `first`
    [p], because the same number of items precedes it.
    """
    out = first.copy()
    for some in np.array_split(np.arange(len(query)), -(-len(query) // PAIRS)):
        candidates, theirs = items[query[some]].numpy(), scores[query[some]].numpy()
        own_item = candidates == item[some, None]
        pair, place = own_item.nonzero()
        own = theirs[pair, place][:, None]
        before = (theirs[pair] > own) | ((theirs[pair] == own) & (np.arange(theirs.shape[1]) < place[:, None]))
        out[some[pair]] = 1 + before.sum(1)
    return out


def _candidates_ahead(first: Tensor, candidates: tuple[Tensor, Tensor], query: int) -> Tensor:
    """[n]: scores of a query to show; new ones of the candidates, and lower ones of all others."""
    items, scores = candidates
    return (first.float().cpu() - BELOW).index_copy(0, items[query], scores[query])
