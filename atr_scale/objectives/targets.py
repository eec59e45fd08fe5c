"""Which pairs are positives, from stable ids and never from positions.

Shape suffixes: B texts of the global batch, b audios of this rank, k id columns, P positive pairs of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from atr_scale.errors import UserError
from atr_scale.parallel.blocks import ScoreBlock


@dataclass(frozen=True)
class Positives:
    """The positive pairs of a score block, each once, sorted by column.

    rows, columns:  [P] int64, local columns.
    row_weight:     [B] float64, 1 / number of positives of a text over all ranks (0 where it has none).
    column_weight:  [b] float64, the same for an audio.
    """

    rows: Tensor
    columns: Tensor
    row_weight: Tensor
    column_weight: Tensor

    @staticmethod
    def of(block: ScoreBlock, ids: tuple[Tensor, Tensor] | None = None) -> Positives:
        """Positives where any id column agrees: `ids` = (text [B, k], audio [b, k]) int64.

        Without ids, text i belongs to audio i of the global batch.
        """
        num_rows, num_columns = block.shape
        if ids is None:
            if num_rows != block.num_columns:
                raise UserError(
                    f"{num_rows} texts and {block.num_columns} audios do not pair by position: give positives=..."
                )
            columns = torch.arange(num_columns, device=block.device)
            rows = columns + block.offset
        else:
            text, audio = ids
            shapes = (text.ndim, audio.ndim, text.shape[0], audio.shape[0], text.shape[-1])
            if shapes != (2, 2, num_rows, num_columns, audio.shape[-1]):
                raise UserError(
                    f"positives need text ids [{num_rows}, k] and audio ids [{num_columns}, k], "
                    f"got {list(text.shape)} and {list(audio.shape)}"
                )
            joined = torch.cat([_join(text[:, c].contiguous(), audio[:, c].contiguous()) for c in range(text.shape[1])])
            # One number a pair, column first: unique sorts by column and drops pairs that agree in several ids.
            pair = torch.unique(joined[:, 1] * num_rows + joined[:, 0])
            rows, columns = pair % num_rows, pair // num_rows
        row_count = block.sum(torch.bincount(rows, minlength=num_rows).double())
        column_count = torch.bincount(columns, minlength=num_columns).double()
        return Positives(rows, columns, _reciprocal(row_count), _reciprocal(column_count))

    def within(self, stripe: slice) -> tuple[Tensor, Tensor]:
        """(row, column inside the stripe) of the positives that lie in a stripe of columns."""
        bounds = torch.tensor([stripe.start, stripe.stop], device=self.columns.device)
        first, last = torch.searchsorted(self.columns, bounds).tolist()
        return self.rows[first:last], self.columns[first:last] - stripe.start


def positives_mask(text_ids: Tensor, audio_ids: Tensor) -> Tensor:
    """[B, b] bool from ids [B, k] and [b, k]: True where any id column agrees. For the dense formulas."""
    return (text_ids[:, None, :] == audio_ids[None, :, :]).any(-1)


def _join(left: Tensor, right: Tensor) -> Tensor:
    """All (i, j) with left[i] == right[j] as [pairs, 2], without comparing every pair."""
    ordered, order = torch.sort(right)
    first = torch.searchsorted(ordered, left)
    count = torch.searchsorted(ordered, left, right=True) - first
    i = torch.repeat_interleave(torch.arange(len(left), device=left.device), count)
    within = torch.arange(len(i), device=left.device) - torch.repeat_interleave(count.cumsum(0) - count, count)
    return torch.stack([i, order[first[i] + within]], 1)


def _reciprocal(count: Tensor) -> Tensor:
    return torch.where(count > 0, 1 / count.clamp(min=1), torch.zeros_like(count))
