"""Soft labels of a batch: the scores of its teachers, and which of its pairs have one.

Shape suffixes: B texts (and audios) of the global batch, b of this rank, n pairs that have a teacher.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atr_scale.batch import on_device
from atr_scale.score_block import ScoreBlock

S = TypeVar("S", ScoreBlock, Tensor)
R = TypeVar("R", ScoreBlock, Tensor)


@dataclass(frozen=True)
class Teacher(Generic[S]):
    """Scores of one teacher, or of a weighted sum of several, for all pairs of a batch.

    t2a, a2t:    scores from which the soft labels of each direction come: blocks [B, b], or matrices [B, B]. One and
                 the same object unless the teacher has different scores for the two directions.
    weight:      of its soft labels in the targets; the weights of a batch's teachers sum to 1.
    temperature: of its softmax; None: the student's.
    """

    t2a: S
    a2t: S
    weight: float = 1.0
    temperature: float | None = None

    def map(self, change: Callable[[S], R]) -> Teacher[R]:
        """Apply a function to the scores of both directions."""
        t2a = change(self.t2a)
        a2t = t2a if self.a2t is self.t2a else change(self.a2t)
        return Teacher(t2a, a2t, self.weight, self.temperature)

    def temperature_or(self, temperature: float | Tensor) -> float | Tensor:
        """The teacher's own temperature, or the given one of the student."""
        return temperature if self.temperature is None else self.temperature


@dataclass(frozen=True)
class SoftLabels(Generic[S]):
    """Targets sum_m weight_m softmax(scores_m / temperature_m), for the pairs of a batch that have a teacher.

    A pair without a teacher is neither a query nor a candidate.
    teachers: at least one. known: [B] bool on the host, the pairs of all ranks that have a teacher; None: all have one.
    """

    teachers: tuple[Teacher[S], ...]
    known: Tensor | None = None

    @staticmethod
    def of(scores: ScoreBlock) -> SoftLabels[ScoreBlock]:
        """Of one teacher with the student's temperature."""
        return SoftLabels((Teacher(scores, scores),))

    @cached_property
    def rows(self) -> NDArray[np.int64] | None:
        """[n], the pairs that have a teacher; None: all."""
        return None if self.known is None else np.flatnonzero(self.known.numpy(force=True))

    def share(self, pairs: int) -> float:
        """The part of the batch's B pairs that has a teacher."""
        return 1.0 if self.rows is None else len(self.rows) / pairs

    def whole(self: SoftLabels[ScoreBlock]) -> SoftLabels[Tensor]:
        """The same with matrices [B, B], on every rank."""
        return SoftLabels(tuple(each.map(lambda block: block.whole().detach()) for each in self.teachers), self.known)

    def mean_scores(self: SoftLabels[Tensor]) -> Tensor:
        """[B, B]: the teachers' scores of t2a, their mean by weight; 0 for pairs without a teacher."""
        scores = torch.stack([teacher.weight * teacher.t2a for teacher in self.teachers]).sum(0)
        if self.known is None:
            return scores
        known = self.known.to(scores.device)
        return scores * (known[:, None] & known)

    def matrix(self, scores: Tensor) -> Tensor:
        """[n, n] of a matrix [B, B]: the pairs that have a teacher."""
        if self.rows is None:
            return scores
        rows = on_device(self.rows, scores.device)
        return scores.index_select(0, rows).index_select(1, rows)

    def block(self, scores: ScoreBlock) -> ScoreBlock:
        """The same part of a block [B, b]."""
        if self.rows is None:
            return scores
        ends = np.searchsorted(self.rows, np.cumsum([0, *scores.of_ranks]))
        rank = scores.world.rank
        own = self.rows[ends[rank] : ends[rank + 1]] - scores.offset
        rows, columns = (on_device(index, scores.device) for index in (self.rows, own))
        return scores.take(rows, columns, np.diff(ends).tolist())
