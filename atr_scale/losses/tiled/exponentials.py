"""Exponentials of logits for softmaxes along rows and along columns.

A block knows a bound of its scores, so one constant taken from all logits keeps every exponential inside the dtype:
a single exp a pair serves both directions, and sums merge by addition, over tiles and over ranks. Logits spread so wide
that a sum gets lost are rare (a temperature near 0.01 in fp32); all ranks then take the maxima of rows and of columns.

Shape suffixes: B texts of the global batch, b audios of this rank, m rows and n columns of a part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from atr_scale.losses.tiled.tiles import Part, Tile
from atr_scale.score_block import ScoreBlock

MOST_SUMMANDS = 1e8


def largest_exponent(dtype: torch.dtype) -> float:
    """A sum of MOST_SUMMANDS exponentials of it is finite."""
    return math.log(torch.finfo(dtype).max) - math.log(MOST_SUMMANDS)


@dataclass(frozen=True)
class Shift:
    """What is taken from logits before exp: one constant, or the maxima of all rows [B] and local columns [b]."""

    rows: Tensor | float
    columns: Tensor | float

    @staticmethod
    def constant(bound: float, dtype: torch.dtype) -> Shift:
        """For logits of absolute value up to `bound`."""
        shift = max(0.0, bound - largest_exponent(dtype))
        return Shift(shift, shift)

    def both(self, logits: Tensor, part: Part) -> tuple[Tensor, Tensor]:
        """Exponentials [m, n] for softmaxes along rows and along columns, from logits that are overwritten.

        One and the same tensor under a constant.
        """
        if isinstance(self.rows, Tensor):
            return self.along_rows(logits, part, out=torch.empty_like(logits)), self.along_columns(logits, part)
        exponentials = self.along_rows(logits, part)
        return exponentials, exponentials

    def along_rows(self, logits: Tensor, part: Part, out: Tensor | None = None) -> Tensor:
        """Those of softmaxes along rows alone, in place or into `out`."""
        return _exp(logits, self.rows[part.rows, None] if isinstance(self.rows, Tensor) else self.rows, out)

    def along_columns(self, logits: Tensor, part: Part, out: Tensor | None = None) -> Tensor:
        """Those of softmaxes along columns alone, in place or into `out`."""
        return _exp(logits, self.columns[part.columns] if isinstance(self.columns, Tensor) else self.columns, out)


def _exp(logits: Tensor, shift: Tensor | float, out: Tensor | None) -> Tensor:
    out = logits if out is None else out
    if isinstance(shift, float) and shift == 0:
        return torch.exp(logits, out=out)
    return torch.sub(logits, shift, out=out).exp_()


def maxima(block: ScoreBlock, tiles: Sequence[Tile], logits: Callable[[Tile], Tensor]) -> Shift:
    """The shift that never loses a sum, for one more sweep."""
    rows, columns = (torch.full((size,), -torch.inf, dtype=block.dtype, device=block.device) for size in block.shape)
    for tile in tiles:
        values = logits(tile)
        torch.maximum(rows[tile.rows], values.amax(1), out=rows[tile.rows])
        torch.maximum(columns[tile.columns], values.amax(0), out=columns[tile.columns])
    return Shift(block.max(rows), columns)


def log_sums(sums: Tensor, shift: Tensor | float) -> Tensor:
    """log of sums of exponentials before the shift, float64."""
    return sums.log() + shift


def weigh(along_rows: Tensor, along_columns: Tensor, rows: Tensor, columns: Tensor, space: Tensor) -> Tensor:
    """Rows [m] times the one's exponentials plus columns [n] times the other's, in place of the latter."""
    if along_rows is along_columns:
        return along_columns.mul_(torch.add(rows[:, None], columns, out=space))
    return along_columns.mul_(columns).addcmul_(along_rows, rows[:, None])


def all_in_range(block: ScoreBlock, *sums: Tensor) -> bool:
    """Whether on every rank no sum has overflown, nor is so small that its summands may have been lost."""
    limit = largest_exponent(block.dtype)
    low, high = math.exp(-limit), torch.finfo(block.dtype).max
    lost = torch.stack([~((s >= low) & (s <= high)).all() for s in sums]).any()
    return not bool(block.max(lost.double()))


def largest_of_ranks(block: ScoreBlock, bounds: Sequence[Tensor]) -> list[float]:
    """Bounds that hold for the columns of all ranks."""
    return block.max(torch.stack(list(bounds))).tolist()
