"""Tokens of all clips or captions from frozen encoders, kept on disk.

Shape suffixes: N clips or captions, R all tokens of all of them, T tokens of the longest in a batch, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from atr_scale.batch import TokenSequence


@dataclass(frozen=True)
class Tokens:
    """Token sequences of different lengths, one after another, in half precision.

    values: [R, D]. ends: [N] int64, the end of each sequence in `values`. pooled: [N, D].
    """

    values: Tensor
    ends: Tensor
    pooled: Tensor

    @staticmethod
    def of(batches: list[TokenSequence]) -> Tokens:
        """Keep the real tokens of batches of sequences."""
        values = torch.cat([batch.tokens[batch.mask] for batch in batches])
        ends = torch.cat([batch.mask.sum(1) for batch in batches]).cumsum(0)
        return Tokens(values.half(), ends, torch.cat([batch.pooled for batch in batches]).half())

    def __len__(self) -> int:
        return len(self.ends)

    def take(self, rows: Tensor, crop: int | None = None) -> TokenSequence:
        """Sequences `rows` (int64), padded to the longest.

        crop: number of tokens; from a longer sequence a random section of this length is taken.
        """
        ends = self.ends[rows]
        starts = torch.where(rows > 0, self.ends[(rows - 1).clamp(min=0)], 0)
        if crop is not None:
            room = (ends - starts - crop).clamp(min=0)
            starts = starts + (torch.rand(len(rows)) * (room + 1)).long().clamp(max=room)
            ends = torch.minimum(ends, starts + crop)
        place = starts[:, None] + torch.arange(int((ends - starts).max().clamp(min=1)))
        mask = place < ends[:, None]
        tokens = self.values[place.clamp(max=len(self.values) - 1)].float() * mask[..., None]
        return TokenSequence(tokens, mask, self.pooled[rows].float())

    def all(self) -> TokenSequence:
        return self.take(torch.arange(len(self)))

    def state(self) -> dict[str, Tensor]:
        return {"values": self.values, "ends": self.ends, "pooled": self.pooled}
