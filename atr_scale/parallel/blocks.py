"""Score blocks: all texts of the global batch (rows) against this rank's audios (columns).

Shape suffixes: B texts of the global batch, b audios of this rank, d width.

A block knows where its columns lie in the global batch, hands out stripes of columns, takes the gradient of a stripe
back, and sums row statistics over ranks. Objectives see blocks and never ranks. Two kinds:
`EmbeddingScores` recomputes stripes from vectors, `StoredScores` holds a column block that a scorer has filled.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from atr_scale.errors import UserError
from atr_scale.parallel.world import World

STRIPE_COLUMNS = 256


class ScoreBlock(ABC):
    """One rank's part [B, b] of the global score matrix."""

    def __init__(self, rows: int, columns: int, like: Tensor, world: World | None) -> None:
        self.world = world or World.current()
        self.device = like.device
        self.dtype = at_least_fp32(like.detach()[:0]).dtype
        counts = self.world.gather_ints(columns)
        self.shape = (rows, columns)
        self.offset = sum(counts[: self.world.rank])
        self.num_columns = sum(counts)

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """What the scores are made of and what receives gradients."""

    @abstractmethod
    def stripe(self, columns: slice) -> Tensor:
        """Scores of all rows against some local columns [B, columns], fp32 or wider.

        A fresh tensor without a graph, the caller's to overwrite.
        """

    @abstractmethod
    def new_gradients(self) -> tuple[Tensor, ...]:
        """Zeros to accumulate into, one for each of `tensors`."""

    @abstractmethod
    def add_gradient(self, gradients: tuple[Tensor, ...], columns: slice, stripe_gradient: Tensor) -> None:
        """Add what d loss / d stripe [B, columns] means for `tensors`."""

    def stripes(self) -> list[slice]:
        """Consecutive local columns, together all of them."""
        columns = self.shape[1]
        return [slice(k, min(k + STRIPE_COLUMNS, columns)) for k in range(0, columns, STRIPE_COLUMNS)]

    def sum(self, value: Tensor) -> Tensor:
        """A statistic of the local columns, summed over the ranks' column blocks."""
        return self.world.sum(value)

    def max(self, value: Tensor) -> Tensor:
        """A statistic of the local columns, its maximum over the ranks' column blocks."""
        return self.world.max(value)


class EmbeddingScores(ScoreBlock):
    """Scores text @ audio.T of unit vectors: `text` [B, d] of the global batch, `audio` [b, d] of this rank."""

    def __init__(self, text: Tensor, audio: Tensor, world: World | None = None) -> None:
        if text.ndim != 2 or audio.ndim != 2 or text.shape[1] != audio.shape[1]:
            raise UserError(
                f"embedding scores need text [B, d] and audio [b, d] of one width d, "
                f"got {list(text.shape)} and {list(audio.shape)}"
            )
        super().__init__(text.shape[0], audio.shape[0], text, world)
        self.text, self.audio = text, audio
        self._text, self._audio = (at_least_fp32(x.detach()) for x in (text, audio))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.text, self.audio

    def stripe(self, columns: slice) -> Tensor:
        return self._text @ self._audio[columns].T

    def new_gradients(self) -> tuple[Tensor, ...]:
        return torch.zeros_like(self._text), torch.zeros_like(self._audio)

    def add_gradient(self, gradients: tuple[Tensor, ...], columns: slice, stripe_gradient: Tensor) -> None:
        text, audio = gradients
        text.addmm_(stripe_gradient, self._audio[columns])
        audio[columns].addmm_(stripe_gradient.T, self._text)


class StoredScores(ScoreBlock):
    """A column block `scores` [B, b] computed beforehand, for scores that are no dot product of two vectors."""

    def __init__(self, scores: Tensor, world: World | None = None) -> None:
        if scores.ndim != 2:
            raise UserError(f"stored scores need [B, b], got {list(scores.shape)}")
        super().__init__(scores.shape[0], scores.shape[1], scores, world)
        self.scores = scores

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.scores,)

    def stripe(self, columns: slice) -> Tensor:
        return at_least_fp32(self.scores.detach()[:, columns].clone())

    def new_gradients(self) -> tuple[Tensor, ...]:
        return (torch.zeros_like(at_least_fp32(self.scores.detach())),)

    def add_gradient(self, gradients: tuple[Tensor, ...], columns: slice, stripe_gradient: Tensor) -> None:
        gradients[0][:, columns] += stripe_gradient


def at_least_fp32(value: Tensor) -> Tensor:
    """Scores and losses are fp32 or wider, whatever the encoders compute in."""
    return value if value.dtype == torch.float64 else value.float()
