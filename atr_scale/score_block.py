"""Score blocks: all texts of the global batch (rows) against this rank's audios (columns).

Shape suffixes: B texts of the global batch, b audios of this rank, d width.

A block knows the place of its columns in the global batch, returns tiles of scores (some rows of a stripe of columns),
accepts the gradient of a tile, and sums row statistics over ranks. Losses see blocks and never ranks. There are two
kinds: `EmbeddingScores` recomputes tiles from embeddings, `StoredScores` holds the scores that a scorer has computed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import copy
from typing import Self

import torch
from torch import Tensor

from atr_scale.distributed.world import World
from atr_scale.errors import UserError
from atr_scale.products import HeadProducts, add_product, product

STRIPE_COLUMNS = 512  # of a tile on a CPU
ALL = slice(None)


class ScoreBlock(ABC):
    """One rank's part [B, b] of the global score matrix.

    world:      by default the default process group.
    products:   precision of its matrix products.
    largest:    no score of any rank is larger in absolute value, if the host knows one; losses then need not ask the
                device. 1 for cosines.
    of_ranks:   number of columns of every rank; by default as many as this rank has.
    """

    def __init__(
        self,
        rows: int,
        columns: int,
        like: Tensor,
        world: World | None,
        products: HeadProducts,
        largest: float | None,
        of_ranks: Sequence[int] | None,
    ) -> None:
        self.world = world or World.current()
        self.device = like.device
        self.dtype = at_least_fp32(like.detach()[:0]).dtype
        self.products, self.largest = products, largest
        self.of_ranks = tuple([columns] * self.world.size if of_ranks is None else of_ranks)
        self.shape = (rows, columns)
        self.offset = sum(self.of_ranks[: self.world.rank])
        self.num_columns = sum(self.of_ranks)

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that the scores are computed from. They receive the gradients."""

    @abstractmethod
    def bound(self) -> Tensor:
        """No local score is larger in absolute value; a scalar."""

    @abstractmethod
    def scaled(self, factor: Tensor) -> Self:
        """The same block with its scores multiplied by a number on the device: for `stripe` alone, without a graph."""

    @abstractmethod
    def stripe(self, columns: slice, rows: slice = ALL, out: Tensor | None = None) -> Tensor:
        """Scores of some rows against some local columns [rows, columns], fp32 or wider.

        They have no autograd graph. They are written to `out` or to a new tensor, and the caller may overwrite them.
        """

    @abstractmethod
    def local(self) -> Tensor:
        """All scores [B, b] of the block, fp32 or wider, with an autograd graph."""

    def whole(self) -> Tensor:
        """The scores [B, B] of all ranks' columns, on every rank, with an autograd graph.

        In the backward pass, a rank's columns receive the sum of the gradients of all ranks.
        """
        return self.world.gather(self.local().T).T

    @abstractmethod
    def take(self, rows: Tensor, columns: Tensor, of_ranks: Sequence[int]) -> ScoreBlock:
        """The block of some rows and of some local columns (int64), with an autograd graph.

        The rows are the same on every rank; a rank may keep no column. of_ranks: how many columns each keeps.
        """

    @abstractmethod
    def new_gradients(self) -> tuple[Tensor, ...]:
        """Zeros to accumulate gradients in, one tensor for each of `tensors`."""

    @abstractmethod
    def add_gradient(self, gradients: tuple[Tensor, ...], columns: slice, gradient: Tensor, rows: slice = ALL) -> None:
        """Add to `gradients` the gradient of `tensors` that follows from d loss / d scores [rows, columns]."""

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a statistic over all ranks."""
        return self.world.sum(value)

    def max(self, value: Tensor) -> Tensor:
        """The maximum of a statistic over all ranks."""
        return self.world.max(value)


class EmbeddingScores(ScoreBlock):
    """Dot products text @ audio.T of embeddings: `text` [B, d] of the global batch, `audio` [b, d] of this rank.

    Raises UserError if the shapes do not fit.
    """

    def __init__(
        self,
        text: Tensor,
        audio: Tensor,
        world: World | None = None,
        products: HeadProducts = "ieee",
        largest: float | None = None,
        of_ranks: Sequence[int] | None = None,
    ) -> None:
        if text.ndim != 2 or audio.ndim != 2 or text.shape[1] != audio.shape[1]:
            raise UserError(
                f"embedding scores need text [B, d] and audio [b, d] of one width d, "
                f"got {list(text.shape)} and {list(audio.shape)}"
            )
        super().__init__(text.shape[0], audio.shape[0], text, world, products, largest, of_ranks)
        self.text, self.audio = text, audio
        self._text, self._audio = text.detach().to(self.dtype), audio.detach().to(self.dtype)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.text, self.audio

    def bound(self) -> Tensor:
        text, audio = self._text, self._audio
        if not text.numel() or not audio.numel():
            return torch.zeros((), dtype=self.dtype, device=self.device)
        longest: list[Tensor] = [torch.linalg.vector_norm(x, dim=1, dtype=self.dtype).amax() for x in (text, audio)]
        return longest[0] * longest[1]

    def scaled(self, factor: Tensor) -> Self:
        other = copy(self)
        other._text = self._text * factor
        return other

    def stripe(self, columns: slice, rows: slice = ALL, out: Tensor | None = None) -> Tensor:
        text, audio = self._text[rows], self._audio[columns]
        out = text.new_empty(len(text), len(audio)) if out is None else out
        return add_product(out, text, audio.T, self.products, beta=0)

    def local(self) -> Tensor:
        return product(at_least_fp32(self.text), at_least_fp32(self.audio).T, self.products)

    def take(self, rows: Tensor, columns: Tensor, of_ranks: Sequence[int]) -> ScoreBlock:
        text, audio = self.text.index_select(0, rows), self.audio.index_select(0, columns)
        return EmbeddingScores(text, audio, self.world, self.products, self.largest, of_ranks)

    def new_gradients(self) -> tuple[Tensor, ...]:
        return torch.zeros_like(self._text), torch.zeros_like(self._audio)

    def add_gradient(self, gradients: tuple[Tensor, ...], columns: slice, gradient: Tensor, rows: slice = ALL) -> None:
        text, audio = gradients
        add_product(text[rows], gradient, self._audio[columns], self.products)
        add_product(audio[columns], gradient.T, self._text[rows], self.products)


class ModalityScores(EmbeddingScores):
    """Cosines inside one modality: all samples of the global batch against this rank's.

    embeddings: [b, d] of this rank, unit length.

    Only for losses that treat rows and columns alike (`intra_modal`): the scores and d loss / d scores are symmetric
    then, so the gradient that an embedding receives as a row, from all ranks, equals the one that it receives as a
    column, on its own rank. The column's gradient is doubled, and no gradient is sent to other ranks. This saves a
    matrix product and a reduce-scatter.
    """

    def __init__(self, embeddings: Tensor, world: World | None = None, products: HeadProducts = "ieee") -> None:
        world = world or World.current()
        super().__init__(world.gather(embeddings.detach()), embeddings, world, products, largest=1.0)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.audio,)

    def local(self) -> Tensor:
        embeddings = at_least_fp32(self.audio)
        return product(self.world.gather(embeddings), embeddings.T, self.products)

    def take(self, rows: Tensor, columns: Tensor, of_ranks: Sequence[int]) -> ScoreBlock:
        raise NotImplementedError("a part of these scores is not symmetric")

    def new_gradients(self) -> tuple[Tensor, ...]:
        return (torch.zeros_like(self._audio),)

    def add_gradient(self, gradients: tuple[Tensor, ...], columns: slice, gradient: Tensor, rows: slice = ALL) -> None:
        add_product(gradients[0][columns], gradient.T, self._text[rows], self.products, alpha=2)


class StoredScores(ScoreBlock):
    """Scores `scores` [B, b] of a pairwise scorer, computed beforehand. Raises UserError if they are no matrix."""

    def __init__(
        self,
        scores: Tensor,
        world: World | None = None,
        products: HeadProducts = "ieee",
        largest: float | None = None,
        of_ranks: Sequence[int] | None = None,
    ) -> None:
        if scores.ndim != 2:
            raise UserError(f"stored scores need [B, b], got {list(scores.shape)}")
        super().__init__(scores.shape[0], scores.shape[1], scores, world, products, largest, of_ranks)
        self.scores = scores
        self._factor: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.scores,)

    def bound(self) -> Tensor:
        if not self.scores.numel():
            return torch.zeros((), dtype=self.dtype, device=self.device)
        lowest, highest = torch.aminmax(self.scores.detach())
        return torch.maximum(-lowest, highest).to(self.dtype)

    def scaled(self, factor: Tensor) -> Self:
        other = copy(self)
        other._factor = factor
        return other

    def stripe(self, columns: slice, rows: slice = ALL, out: Tensor | None = None) -> Tensor:
        scores = self.scores.detach()[rows, columns]
        out = torch.empty_like(scores, dtype=self.dtype) if out is None else out
        if self._factor is None:
            return out.copy_(scores)
        return torch.mul(at_least_fp32(scores), self._factor, out=out)

    def local(self) -> Tensor:
        return at_least_fp32(self.scores)

    def take(self, rows: Tensor, columns: Tensor, of_ranks: Sequence[int]) -> ScoreBlock:
        scores = self.scores.index_select(0, rows).index_select(1, columns)
        return StoredScores(scores, self.world, self.products, self.largest, of_ranks)

    def new_gradients(self) -> tuple[Tensor, ...]:
        return (torch.zeros_like(self.scores, dtype=self.dtype),)

    def add_gradient(self, gradients: tuple[Tensor, ...], columns: slice, gradient: Tensor, rows: slice = ALL) -> None:
        gradients[0][rows, columns] += gradient


def at_least_fp32(value: Tensor) -> Tensor:
    """`value` as fp32, or unchanged if it is float64: the dtype of scores and losses, whatever that of the encoders."""
    return value if value.dtype == torch.float64 else value.float()


def slices(start: int, stop: int, step: int) -> list[slice]:
    """Consecutive slices of at most `step` that cover start to stop."""
    return [slice(first, min(first + step, stop)) for first in range(start, stop, step)]
