"""Exponentials of logits for softmaxes along rows and along columns, without overflow.

A softmax does not change if a number is subtracted from its logits first. A block knows a bound of its scores, so one
constant, the same on all ranks, keeps every exponential finite: one exp serves both directions, and sums merge by
addition over tiles and over ranks. The host knows the bound, so it knows too whether a sum can be lost at all, as it
can be in fp32 below a temperature of 1/70. Only then the sums are looked at, and if one is lost, all ranks subtract the
maxima of rows and of columns instead. docs/math/tiled_losses.md, section 2.

Shape suffixes: B texts of the global batch, b audios of this rank, m rows and n columns of a tile.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from atr_scale.losses.tiled.tiles import Tile
from atr_scale.score_block import ScoreBlock

MOST_SUMMANDS = 1e8


class Exponentials(NamedTuple):
    """Exponentials [m, n] of a tile's logits, for softmaxes along rows and for softmaxes along columns.

    Read-only: both may be the same tensor.
    """

    by_row: Tensor
    by_column: Tensor


class Shift(ABC):
    """Numbers that are subtracted from logits before exp.

    rows, columns: of a row's and of a column's softmax; one number for all, or [B] and [b].
    """

    rows: Tensor | float
    columns: Tensor | float

    @abstractmethod
    def by_row(self, logits: Tensor, tile: Tile, out: Tensor, scale: float = 1.0) -> Tensor:
        """exp(scale * logits - shift) [m, n] for softmaxes along rows, written to `out`."""

    @abstractmethod
    def by_column(self, logits: Tensor, tile: Tile, out: Tensor, scale: float = 1.0) -> Tensor:
        """exp(scale * logits - shift) [m, n] for softmaxes along columns, written to `out`."""

    @abstractmethod
    def both(self, logits: Tensor, tile: Tile, out: Tensor, scale: float = 1.0) -> Exponentials:
        """The exponentials of both directions; `out` holds one of them, or both if they are equal."""


class ConstantShift(Shift):
    """One number for all logits, none of which exceeds `bound` in absolute value. Directions share exponentials."""

    rows: float
    columns: float

    def __init__(self, bound: float, dtype: torch.dtype) -> None:
        self.rows = self.columns = max(0.0, bound - largest_exponent(dtype))

    def by_row(self, logits: Tensor, tile: Tile, out: Tensor, scale: float = 1.0) -> Tensor:
        return _exp(logits, self.rows, out, scale)

    def by_column(self, logits: Tensor, tile: Tile, out: Tensor, scale: float = 1.0) -> Tensor:
        return _exp(logits, self.columns, out, scale)

    def both(self, logits: Tensor, tile: Tile, out: Tensor, scale: float = 1.0) -> Exponentials:
        exponentials = _exp(logits, self.rows, out, scale)
        return Exponentials(exponentials, exponentials)


class MaximaShift(Shift):
    """The largest logit of every row [B], over all ranks, and of every local column [b]: no sum is lost.

    They take one more sweep, over `logits(tile)` [m, n] of all tiles.
    """

    rows: Tensor
    columns: Tensor

    def __init__(self, block: ScoreBlock, tiles: Sequence[Tile], logits: Callable[[Tile], Tensor]) -> None:
        rows, columns = (torch.full((n,), -torch.inf, dtype=block.dtype, device=block.device) for n in block.shape)
        for tile in tiles:
            values = logits(tile)
            torch.maximum(rows[tile.rows], values.amax(1), out=rows[tile.rows])
            torch.maximum(columns[tile.columns], values.amax(0), out=columns[tile.columns])
        self.rows, self.columns = block.max(rows), columns

    def by_row(self, logits: Tensor, tile: Tile, out: Tensor, scale: float = 1.0) -> Tensor:
        return _exp(logits, self.rows[tile.rows, None], out, scale)

    def by_column(self, logits: Tensor, tile: Tile, out: Tensor, scale: float = 1.0) -> Tensor:
        return _exp(logits, self.columns[tile.columns], out, scale)

    def both(self, logits: Tensor, tile: Tile, out: Tensor, scale: float = 1.0) -> Exponentials:
        by_row = self.by_row(logits, tile, torch.empty_like(out), scale)
        return Exponentials(by_row, self.by_column(logits, tile, out, scale))


def _exp(logits: Tensor, shift: Tensor | float, out: Tensor, scale: float) -> Tensor:
    """exp(scale * logits - shift) in `out`; multiplications by 1 and subtractions of 0 are left out."""
    scaled = logits if scale == 1 else torch.mul(logits, scale, out=out)
    shifted = scaled if isinstance(shift, float) and shift == 0 else torch.sub(scaled, shift, out=out)
    return torch.exp(shifted, out=out)


def log_sums(sums: Tensor, shift: Tensor | float) -> Tensor:
    """Log-sum-exps, float64: the logarithms of sums of exponentials, with the shift added back."""
    return sums.log() + shift


def largest_exponent(dtype: torch.dtype) -> float:
    """The largest logit whose exponential can be summed MOST_SUMMANDS times."""
    return math.log(torch.finfo(dtype).max) - math.log(MOST_SUMMANDS)


def all_in_range(block: ScoreBlock, *sums: Tensor) -> bool:
    """Whether on every rank no sum has overflown, and none is so small that its summands may have been lost.

    The host waits for the answer.
    """
    limit = largest_exponent(block.dtype)
    low, high = math.exp(-limit), torch.finfo(block.dtype).max
    lost = torch.stack([~((s >= low) & (s <= high)).all() for s in sums]).any()
    return not bool(block.max(lost.double()))


def host_bounds(block: ScoreBlock, bounds: Sequence[float | Tensor]) -> list[float]:
    """Bounds that hold for the columns of all ranks, as numbers; those on the device, of this rank alone, are read."""
    local = [bound for bound in bounds if isinstance(bound, Tensor)]
    read = iter(block.max(torch.stack(local)).tolist() if local else ())
    return [next(read) if isinstance(bound, Tensor) else bound for bound in bounds]


def no_sum_is_lost(block: ScoreBlock, bounds: Sequence[float]) -> bool:
    """Whether logits within these bounds of absolute value have sums that are in range without any shift."""
    return all(bound <= largest_exponent(block.dtype) for bound in bounds)
