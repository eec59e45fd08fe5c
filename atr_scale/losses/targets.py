"""The positive pairs of a batch, from stable ids.

Shape suffixes: B texts of the global batch, b audios of this rank, k id columns, P positive pairs of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from atr_scale.errors import UserError
from atr_scale.score_block import ScoreBlock

Ids = tuple[Tensor, Tensor]
# Which pairs are positives: those of one clip, or also those of one caption text.
PositivesRule = Literal["clip", "clip_and_text"]
# What a direction of a loss is the mean of: queries, whose positives share one weight, or all positive pairs.
PositivesMean = Literal["queries", "pairs"]


@dataclass(frozen=True)
class Pairs:
    """Some pairs of a score block, each once, sorted by column: rows and (local) columns, [P] int64."""

    rows: Tensor
    columns: Tensor

    @staticmethod
    def agreeing(block: ScoreBlock, ids: Ids) -> Pairs:
        """Pairs in which any id column agrees; ids: (of rows [B, k], of columns [b, k]) int64.

        Raises UserError if the shapes do not fit the block.
        """
        rows, columns = ids
        shapes = (rows.ndim, columns.ndim, rows.shape[0], columns.shape[0], rows.shape[-1])
        if shapes != (2, 2, *block.shape, columns.shape[-1]):
            raise UserError(
                f"positives need text ids [{block.shape[0]}, k] and audio ids [{block.shape[1]}, k], "
                f"got {list(rows.shape)} and {list(columns.shape)}"
            )
        joined = torch.cat([_join(rows[:, c].contiguous(), columns[:, c].contiguous()) for c in range(rows.shape[1])])
        # One number for each pair, column first: unique sorts by column and drops pairs that agree in several ids.
        pair = torch.unique(joined[:, 1] * block.shape[0] + joined[:, 0])
        return Pairs(pair % block.shape[0], pair // block.shape[0])

    @staticmethod
    def by_position(block: ScoreBlock) -> Pairs:
        """Row i with column i of the global batch. Raises UserError if there are more rows than columns or fewer."""
        if block.shape[0] != block.num_columns:
            raise UserError(
                f"{block.shape[0]} texts and {block.num_columns} audios do not pair by position: give positives=..."
            )
        columns = torch.arange(block.shape[1], device=block.device)
        return Pairs(columns + block.offset, columns)

    def beside_itself(self, block: ScoreBlock) -> Pairs:
        """The pairs of two different samples, for a block of samples against themselves."""
        different = self.rows != self.columns + block.offset
        return Pairs(self.rows[different], self.columns[different])


@dataclass(frozen=True)
class Positives(Pairs):
    """The positive pairs of a score block, as hard targets of its queries.

    row_share:  [B] float64, the target of each positive pair of a text: 1 / number of its pairs, over all ranks; in a
                mean over pairs, number of texts / number of all pairs.
    row_sum:    [B] float64, the sum of a text's targets; 0 if it has no positive.
    column_share, column_sum: [b] float64, the same for an audio.
    """

    row_share: Tensor
    row_sum: Tensor
    column_share: Tensor
    column_sum: Tensor

    @staticmethod
    def of(block: ScoreBlock, ids: Ids | None = None, mean: PositivesMean = "queries") -> Positives:
        """Pairs in which any id column agrees; ids: (of texts [B, k], of audios [b, k]) int64.

        Without ids, text i belongs to audio i of the global batch. Raises UserError as `Pairs` does.
        """
        pairs = Pairs.by_position(block) if ids is None else Pairs.agreeing(block, ids)
        row_count = block.sum(torch.bincount(pairs.rows, minlength=block.shape[0]).double())
        column_count = torch.bincount(pairs.columns, minlength=block.shape[1]).double()
        if mean == "pairs":
            each = _reciprocal(row_count.sum())
            rows, columns = (each * queries for queries in (block.shape[0], block.num_columns))
            row_share, column_share = rows.expand_as(row_count), columns.expand_as(column_count)
        else:
            row_share, column_share = _reciprocal(row_count), _reciprocal(column_count)
        return Positives(
            pairs.rows, pairs.columns, row_share, row_share * row_count, column_share, column_share * column_count
        )

    @staticmethod
    def none(block: ScoreBlock) -> Positives:
        """No positives, for losses with soft targets alone."""
        nothing = torch.empty(0, dtype=torch.int64, device=block.device)
        rows, columns = (torch.zeros(size, dtype=torch.float64, device=block.device) for size in block.shape)
        return Positives(nothing, nothing, rows, rows, columns, columns)


def positives_mask(text_ids: Tensor, audio_ids: Tensor) -> Tensor:
    """[B, b] bool from ids [B, k] and [b, k]: True if any id column agrees. For the dense formulas."""
    return (text_ids[:, None, :] == audio_ids[None, :, :]).any(-1)


def _join(left: Tensor, right: Tensor) -> Tensor:
    """All (i, j) with left[i] == right[j] as [pairs, 2], found by sorting and not by comparing every pair."""
    ordered, order = torch.sort(right)
    first = torch.searchsorted(ordered, left)
    count = torch.searchsorted(ordered, left, right=True) - first
    i = torch.repeat_interleave(torch.arange(len(left), device=left.device), count)
    within = torch.arange(len(i), device=left.device) - torch.repeat_interleave(count.cumsum(0) - count, count)
    return torch.stack([i, order[first[i] + within]], 1)


def _reciprocal(count: Tensor) -> Tensor:
    return torch.where(count > 0, 1 / count.clamp(min=1), torch.zeros_like(count))
