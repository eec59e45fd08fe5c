"""Score blocks: all texts of the global batch (rows) against this rank's audios (columns).

Shape suffixes: B texts of the global batch, b audios of this rank, d width.

A block knows where its columns lie in the global batch, hands out tiles of scores (some rows of a stripe of columns),
takes the gradient of a tile back, and sums row statistics over ranks. Objectives see blocks and never ranks. Two kinds:
`EmbeddingScores` recomputes tiles from vectors, `StoredScores` holds a column block that a scorer has filled.
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
        """What the scores are made of and what receives gradients."""

    @abstractmethod
    def bound(self) -> Tensor:
        """No local score is larger in absolute value; a scalar."""

    @abstractmethod
    def stripe(self, columns: slice, rows: slice = ALL, scale: float = 1.0, out: Tensor | None = None) -> Tensor:
        """scale * scores of some rows against some local columns [rows, columns], fp32 or wider.

        Without a graph, written to `out` or to a fresh tensor; the caller's to overwrite.
        """

    @abstractmethod
    def local(self) -> Tensor:
        """All scores [B, b] of the block, fp32 or wider, with a graph."""

    def whole(self) -> Tensor:
        """The scores [B, B] of all ranks' columns, on every rank, with a graph.

        A rank's columns receive the sum of what all ranks send back.
        """
        return self.world.gather(self.local().T).T

    @abstractmethod
    def new_gradients(self) -> tuple[Tensor, ...]:
        """Zeros to accumulate into, one for each of `tensors`."""

    @abstractmethod
    def add_gradient(self, gradients: tuple[Tensor, ...], columns: slice, gradient: Tensor, rows: slice = ALL) -> None:
        """Add what d loss / d scores [rows, columns] means for `tensors`."""

    @abstractmethod
    def inner_product(self, gradients: tuple[Tensor, ...]) -> Tensor:
        """sum_ij d loss / d s_ij * s_ij over the local columns, from complete `gradients`; float64."""

    def stripes(self) -> list[slice]:
        """Consecutive local columns, together all of them."""
        return slices(0, self.shape[1], STRIPE_COLUMNS)

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
        # Products of bf16 vectors add up in fp32 on a GPU; a CPU would round them. fp16 is widened everywhere: a
        # pair's gradient, about one over the batch squared, is below what it holds.
        narrow = text.is_cuda and text.dtype == audio.dtype == torch.bfloat16
        self._text, self._audio = (x.detach() if narrow else at_least_fp32(x.detach()) for x in (text, audio))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.text, self.audio

    def bound(self) -> Tensor:
        text, audio = (torch.linalg.vector_norm(x, dim=1, dtype=self.dtype).amax() for x in (self._text, self._audio))
        return text * audio

    def stripe(self, columns: slice, rows: slice = ALL, scale: float = 1.0, out: Tensor | None = None) -> Tensor:
        text, audio = self._text[rows], self._audio[columns]
        out = text.new_empty(len(text), len(audio), dtype=self.dtype) if out is None else out
        return matmul_into(out, text, audio.T, beta=0, alpha=scale)

    def local(self) -> Tensor:
        return at_least_fp32(self.text) @ at_least_fp32(self.audio).T

    def new_gradients(self) -> tuple[Tensor, ...]:
        return tuple(torch.zeros_like(x, dtype=self.dtype) for x in (self._text, self._audio))

    def add_gradient(self, gradients: tuple[Tensor, ...], columns: slice, gradient: Tensor, rows: slice = ALL) -> None:
        text, audio = gradients
        matmul_into(text[rows], gradient, self._audio[columns])
        matmul_into(audio[columns], gradient.T, self._text[rows])

    def inner_product(self, gradients: tuple[Tensor, ...]) -> Tensor:
        return (gradients[1] * self._audio).sum(dtype=torch.float64)


class ModalityScores(EmbeddingScores):
    """Cosines of all samples of the global batch against this rank's: `vectors` [b, d], unit length.

    The other ranks' vectors arrive without a gradient and none goes back to them: the scores are symmetric, and so is
    d loss / d scores of a loss that treats both directions alike (`intra_modal`), hence what a vector receives as a row
    on all ranks equals what it receives as a column here. One matrix product and a reduce-scatter less.
    """

    def __init__(self, vectors: Tensor, world: World | None = None) -> None:
        world = world or World.current()
        super().__init__(world.gather(vectors.detach()), vectors, world)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.audio,)

    def local(self) -> Tensor:
        vectors = at_least_fp32(self.audio)
        return self.world.gather(vectors) @ vectors.T

    def new_gradients(self) -> tuple[Tensor, ...]:
        return (torch.zeros_like(self._audio, dtype=self.dtype),)

    def add_gradient(self, gradients: tuple[Tensor, ...], columns: slice, gradient: Tensor, rows: slice = ALL) -> None:
        matmul_into(gradients[0][columns], gradient.T, self._text[rows], alpha=2)

    def inner_product(self, gradients: tuple[Tensor, ...]) -> Tensor:
        """Half of what its vectors received is as columns."""
        return (gradients[0] * self._audio).sum(dtype=torch.float64) / 2


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

    def bound(self) -> Tensor:
        lowest, highest = torch.aminmax(self.scores.detach())
        return torch.maximum(-lowest, highest).to(self.dtype)

    def stripe(self, columns: slice, rows: slice = ALL, scale: float = 1.0, out: Tensor | None = None) -> Tensor:
        scores = self.scores.detach()[rows, columns]
        out = torch.empty_like(scores, dtype=self.dtype) if out is None else out
        return out.copy_(scores).mul_(scale)

    def local(self) -> Tensor:
        return at_least_fp32(self.scores)

    def new_gradients(self) -> tuple[Tensor, ...]:
        return (torch.zeros_like(self.scores, dtype=self.dtype),)

    def add_gradient(self, gradients: tuple[Tensor, ...], columns: slice, gradient: Tensor, rows: slice = ALL) -> None:
        gradients[0][rows, columns] += gradient

    def inner_product(self, gradients: tuple[Tensor, ...]) -> Tensor:
        parts = (gradients[0][:, columns] * self.stripe(columns) for columns in self.stripes())
        return torch.stack([part.sum(dtype=torch.float64) for part in parts]).sum()


def at_least_fp32(value: Tensor) -> Tensor:
    """Scores and losses are fp32 or wider, whatever the encoders compute in."""
    return value if value.dtype == torch.float64 else value.float()


def matmul_into(out: Tensor, left: Tensor, right: Tensor, beta: int = 1, alpha: float = 1) -> Tensor:
    """out = beta * out + alpha * left @ right (beta 0 or 1), in out's dtype also where a factor is bf16."""
    if torch.bfloat16 not in (left.dtype, right.dtype):
        return out.addmm_(left.to(out.dtype), right.to(out.dtype), beta=beta, alpha=alpha)
    product = torch.mm(left.bfloat16(), right.bfloat16(), out_dtype=out.dtype)
    return torch.mul(product, alpha, out=out) if beta == 0 else out.add_(product, alpha=alpha)


def slices(start: int, stop: int, step: int) -> list[slice]:
    """Consecutive slices of at most `step`, together from start to stop."""
    return [slice(first, min(first + step, stop)) for first in range(start, stop, step)]
