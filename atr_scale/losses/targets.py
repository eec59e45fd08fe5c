"""The positive pairs of a batch, from stable ids.

They are found on the host, which knows the ids before any encoder runs and how many pairs there are, and are copied to
the device without waiting for it.

Shape suffixes: B texts of the global batch, b audios of this rank, k id columns, P positive pairs of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atr_scale.batch import on_device
from atr_scale.errors import UserError
from atr_scale.score_block import ScoreBlock

Ids = tuple[Tensor | NDArray[np.int64], Tensor | NDArray[np.int64]]
# Which pairs are positives: those of one clip, or also those of one caption text.
PositivesRule = Literal["clip", "clip_and_text"]
# What a direction of a loss is the mean of: queries, whose positives share one weight, or all positive pairs.
PositivesMean = Literal["queries", "pairs"]


@dataclass(frozen=True)
class Pairs:
    """Some pairs of a score block, each once, sorted by column: rows and (local) columns, [P] int64 on the host."""

    rows: NDArray[np.int64]
    columns: NDArray[np.int64]

    @staticmethod
    def agreeing(block: ScoreBlock, ids: Ids) -> Pairs:
        """Pairs in which any id column agrees; ids: (of rows [B, k], of columns [b, k]) int64.

        Ids on a GPU are waited for. Raises UserError if the shapes do not fit the block.
        """
        rows, columns = (x.numpy(force=True) if isinstance(x, Tensor) else x for x in ids)
        shapes = (rows.ndim, columns.ndim, rows.shape[0], columns.shape[0], rows.shape[-1])
        if shapes != (2, 2, *block.shape, columns.shape[-1]):
            raise UserError(
                f"positives need text ids [{block.shape[0]}, k] and audio ids [{block.shape[1]}, k], "
                f"got {list(rows.shape)} and {list(columns.shape)}"
            )
        joined = np.concatenate([_join(rows[:, c], columns[:, c]) for c in range(rows.shape[1])], 1)
        # One number for each pair, column first: unique sorts by column and drops pairs that agree in several ids.
        pair = np.unique(joined[1] * block.shape[0] + joined[0])
        return Pairs(pair % block.shape[0], pair // block.shape[0])

    @staticmethod
    def by_position(block: ScoreBlock) -> Pairs:
        """Row i with column i of the global batch. Raises UserError if there are more rows than columns or fewer."""
        if block.shape[0] != block.num_columns:
            raise UserError(
                f"{block.shape[0]} texts and {block.num_columns} audios do not pair by position: give positives=..."
            )
        columns = np.arange(block.shape[1])
        return Pairs(columns + block.offset, columns)

    def beside_itself(self, block: ScoreBlock) -> Pairs:
        """The pairs of two different samples, for a block of samples against themselves."""
        different = self.rows != self.columns + block.offset
        return Pairs(self.rows[different], self.columns[different])


@dataclass(frozen=True)
class Positives(Pairs):
    """The positive pairs of a score block, as hard targets of its queries.

    row_count [B], column_count [b]: number of positives of a text, over all ranks, and of an audio; float64, on the
    block's device. queries: number of texts and of audios of all ranks. mean: what a direction of a loss averages.
    """

    row_count: Tensor
    column_count: Tensor
    queries: tuple[int, int]
    mean: PositivesMean = "queries"

    @staticmethod
    def of(block: ScoreBlock, given: Ids | Positives | None = None, mean: PositivesMean = "queries") -> Positives:
        """Pairs in which any id column agrees, from ids (of texts [B, k], of audios [b, k]) int64; all ranks call this.

        Without ids, text i belongs to audio i of the global batch. Raises UserError as `Pairs` does.
        """
        if isinstance(given, Positives):
            return replace(given, mean=mean)
        pairs = Pairs.by_position(block) if given is None else Pairs.agreeing(block, given)
        rows, columns = (
            on_device(np.bincount(index, minlength=size).astype(np.float64), block.device)
            for index, size in zip((pairs.rows, pairs.columns), block.shape, strict=True)
        )
        rows = torch.ones_like(rows) if given is None else block.sum(rows)
        return Positives(pairs.rows, pairs.columns, rows, columns, (block.shape[0], block.num_columns), mean)

    @staticmethod
    def none(block: ScoreBlock) -> Positives:
        """No positives, for losses with soft targets alone."""
        nothing = np.empty(0, np.int64)
        rows, columns = (torch.zeros(size, dtype=torch.float64, device=block.device) for size in block.shape)
        return Positives(nothing, nothing, rows, columns, (block.shape[0], block.num_columns))

    def shares(self) -> tuple[Tensor, Tensor]:
        """Targets [B], [b] of each positive pair of a text and of an audio.

        1 / number of its pairs or, in a mean over pairs, number of queries / number of all pairs. Times the number of
        its pairs it is the sum of a query's targets.
        """
        if self.mean == "queries":
            return _reciprocal(self.row_count), _reciprocal(self.column_count)
        each = _reciprocal(self.row_count.sum())
        return (each * self.queries[0]).expand_as(self.row_count), (each * self.queries[1]).expand_as(self.column_count)


def positives_mask(text_ids: Tensor, audio_ids: Tensor) -> Tensor:
    """[B, b] bool from ids [B, k] and [b, k]: True if any id column agrees. For the dense formulas."""
    return (text_ids[:, None, :] == audio_ids[None, :, :]).any(-1)


def _join(left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.int64]:
    """All (i, j) with left[i] == right[j] as [2, pairs], found by sorting and not by comparing every pair."""
    order = np.argsort(right, kind="stable")
    first = np.searchsorted(right[order], left)
    count = np.searchsorted(right[order], left, side="right") - first
    i = np.repeat(np.arange(len(left)), count)
    within = np.arange(len(i)) - np.repeat(count.cumsum() - count, count)
    return np.stack([i, order[first[i] + within]])


def _reciprocal(count: Tensor) -> Tensor:
    return torch.where(count > 0, 1 / count.clamp(min=1), torch.zeros_like(count))
