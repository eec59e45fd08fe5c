"""Score blocks: all texts of the global batch (rows) against this rank's audios (columns).

Shape suffixes: B texts of the global batch, b audios of this rank, d width.

A block knows the place of its columns in the global batch, returns tiles of scores (some rows of a stripe of columns),
accepts the gradient of a tile, and sums row statistics over ranks. Losses see blocks and never ranks. There are two
kinds: `EmbeddingScores` recomputes tiles from embeddings, `StoredScores` holds the scores that a scorer has computed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from atr_scale.distributed.world import World
from atr_scale.errors import UserError

STRIPE_COLUMNS = 512
ALL = slice(None)


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
        """The tensors that the scores are computed from. They receive the gradients."""

    @abstractmethod
    def bound(self) -> Tensor:
        """No local score is larger in absolute value; a scalar."""

    @abstractmethod
    def stripe(self, columns: slice, rows: slice = ALL, scale: float = 1.0, out: Tensor | None = None) -> Tensor:
        """scale * scores of some rows against some local columns [rows, columns], fp32 or wider.

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
    def take(self, rows: Tensor, columns: Tensor) -> ScoreBlock:
        """The block of some rows and of some local columns (int64), with an autograd graph; all ranks call this.

        The rows are the same on every rank; a rank may keep no column.
        """

    @abstractmethod
    def new_gradients(self) -> tuple[Tensor, ...]:
        """Zeros to accumulate gradients in, one tensor for each of `tensors`."""

    @abstractmethod
    def add_gradient(self, gradients: tuple[Tensor, ...], columns: slice, gradient: Tensor, rows: slice = ALL) -> None:
        """Add to `gradients` the gradient of `tensors` that follows from d loss / d scores [rows, columns]."""

    @abstractmethod
    def inner_product(self, gradients: tuple[Tensor, ...]) -> Tensor:
        """sum_ij d loss / d s_ij * s_ij over the local columns, float64, from complete `gradients`."""

    def stripes(self) -> list[slice]:
        """Consecutive slices that cover the local columns."""
        return slices(0, self.shape[1], STRIPE_COLUMNS)

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

    def __init__(self, text: Tensor, audio: Tensor, world: World | None = None) -> None:
        if text.ndim != 2 or audio.ndim != 2 or text.shape[1] != audio.shape[1]:
            raise UserError(
                f"embedding scores need text [B, d] and audio [b, d] of one width d, "
                f"got {list(text.shape)} and {list(audio.shape)}"
            )
        super().__init__(text.shape[0], audio.shape[0], text, world)
        self.text, self.audio = text, audio
        # A GPU sums products of bf16 embeddings in fp32; a CPU would round them. fp16 is always widened: the gradient
        # of a pair, about 1 / B^2, is below its smallest number.
        narrow = text.is_cuda and text.dtype == audio.dtype == torch.bfloat16
        self._text, self._audio = (x.detach() if narrow else at_least_fp32(x.detach()) for x in (text, audio))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.text, self.audio

    def bound(self) -> Tensor:
        text, audio = self._text, self._audio
        if not text.numel() or not audio.numel():
            return torch.zeros((), dtype=self.dtype, device=self.device)
        longest: list[Tensor] = [torch.linalg.vector_norm(x, dim=1, dtype=self.dtype).amax() for x in (text, audio)]
        return longest[0] * longest[1]

    def stripe(self, columns: slice, rows: slice = ALL, scale: float = 1.0, out: Tensor | None = None) -> Tensor:
        text, audio = self._text[rows], self._audio[columns]
        out = text.new_empty(len(text), len(audio), dtype=self.dtype) if out is None else out
        return matmul_into(out, text, audio.T, beta=0, alpha=scale)

    def local(self) -> Tensor:
        return at_least_fp32(self.text) @ at_least_fp32(self.audio).T

    def take(self, rows: Tensor, columns: Tensor) -> ScoreBlock:
        return EmbeddingScores(self.text[rows], self.audio[columns], self.world)

    def new_gradients(self) -> tuple[Tensor, ...]:
        return tuple(torch.zeros_like(x, dtype=self.dtype) for x in (self._text, self._audio))

    def add_gradient(self, gradients: tuple[Tensor, ...], columns: slice, gradient: Tensor, rows: slice = ALL) -> None:
        text, audio = gradients
        matmul_into(text[rows], gradient, self._audio[columns])
        matmul_into(audio[columns], gradient.T, self._text[rows])

    def inner_product(self, gradients: tuple[Tensor, ...]) -> Tensor:
        return (gradients[1] * self._audio).sum(dtype=torch.float64)


class ModalityScores(EmbeddingScores):
    """Cosines inside one modality: all samples of the global batch against this rank's.

    embeddings: [b, d] of this rank, unit length.

    Only for losses that treat rows and columns alike (`intra_modal`): the scores and d loss / d scores are symmetric
    then, so the gradient that an embedding receives as a row, from all ranks, equals the one that it receives as a
    column, on its own rank. The column's gradient is doubled, and no gradient is sent to other ranks. This saves a
    matrix product and a reduce-scatter.
    """

    def __init__(self, embeddings: Tensor, world: World | None = None) -> None:
        world = world or World.current()
        super().__init__(world.gather(embeddings.detach()), embeddings, world)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.audio,)

    def local(self) -> Tensor:
        embeddings = at_least_fp32(self.audio)
        return self.world.gather(embeddings) @ embeddings.T

    def take(self, rows: Tensor, columns: Tensor) -> ScoreBlock:
        raise NotImplementedError("a part of these scores is not symmetric")

    def new_gradients(self) -> tuple[Tensor, ...]:
        return (torch.zeros_like(self._audio, dtype=self.dtype),)

    def add_gradient(self, gradients: tuple[Tensor, ...], columns: slice, gradient: Tensor, rows: slice = ALL) -> None:
        matmul_into(gradients[0][columns], gradient.T, self._text[rows], alpha=2)

    def inner_product(self, gradients: tuple[Tensor, ...]) -> Tensor:
        """As `EmbeddingScores` defines it; half of the gradient is that of the columns."""
        return (gradients[0] * self._audio).sum(dtype=torch.float64) / 2


class StoredScores(ScoreBlock):
    """Scores `scores` [B, b] of a pairwise scorer, computed beforehand. Raises UserError if they are no matrix."""

    def __init__(self, scores: Tensor, world: World | None = None) -> None:
        if scores.ndim != 2:
            raise UserError(f"stored scores need [B, b], got {list(scores.shape)}")
        super().__init__(scores.shape[0], scores.shape[1], scores, world)
        self.scores = scores

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.scores,)

    def bound(self) -> Tensor:
        if not self.scores.numel():
            return torch.zeros((), dtype=self.dtype, device=self.device)
        lowest, highest = torch.aminmax(self.scores.detach())
        return torch.maximum(-lowest, highest).to(self.dtype)

    def stripe(self, columns: slice, rows: slice = ALL, scale: float = 1.0, out: Tensor | None = None) -> Tensor:
        scores = self.scores.detach()[rows, columns]
        out = torch.empty_like(scores, dtype=self.dtype) if out is None else out
        return out.copy_(scores).mul_(scale)

    def local(self) -> Tensor:
        return at_least_fp32(self.scores)

    def take(self, rows: Tensor, columns: Tensor) -> ScoreBlock:
        return StoredScores(self.scores[rows][:, columns], self.world)

    def new_gradients(self) -> tuple[Tensor, ...]:
        return (torch.zeros_like(self.scores, dtype=self.dtype),)

    def add_gradient(self, gradients: tuple[Tensor, ...], columns: slice, gradient: Tensor, rows: slice = ALL) -> None:
        gradients[0][rows, columns] += gradient

    def inner_product(self, gradients: tuple[Tensor, ...]) -> Tensor:
        parts = (gradients[0][:, columns] * self.stripe(columns) for columns in self.stripes())
        return sum((part.sum(dtype=torch.float64) for part in parts), torch.zeros((), device=self.device).double())


def at_least_fp32(value: Tensor) -> Tensor:
    """`value` as fp32, or unchanged if it is float64: the dtype of scores and losses, whatever that of the encoders."""
    return value if value.dtype == torch.float64 else value.float()


def matmul_into(out: Tensor, left: Tensor, right: Tensor, beta: int = 1, alpha: float = 1) -> Tensor:
    """out = beta * out + alpha * left @ right with beta 0 or 1, summed in out's dtype even if a factor is bf16."""
    if torch.bfloat16 not in (left.dtype, right.dtype):
        return out.addmm_(left.to(out.dtype), right.to(out.dtype), beta=beta, alpha=alpha)
    product = torch.mm(left.bfloat16(), right.bfloat16(), out_dtype=out.dtype)
    return torch.mul(product, alpha, out=out) if beta == 0 else out.add_(product, alpha=alpha)


def slices(start: int, stop: int, step: int) -> list[slice]:
    """Consecutive slices of at most `step` that cover start to stop."""
    return [slice(first, min(first + step, stop)) for first in range(start, stop, step)]
