"""Rows of clips and captions in a teacher table, found by binary search in sorted arrays.

Shape suffixes: C captions and N clips of the table, n wanted ones.

A caption is identified by (clip id, index among the captions of the clip), never by its text, which clips may share.
"""

from __future__ import annotations

import torch
from torch import Tensor

UNKNOWN = -1


class TableKeys:
    """The rows of clip ids [N] and of captions, each a clip id [C] and an index [C], all int64.

    caption_clip_row: [C] int64, the row of every caption's clip.
    """

    def __init__(self, clip_ids: Tensor, caption_clip: Tensor, caption_index: Tensor) -> None:
        self._clips = _Sorted(clip_ids)
        self._width = int(caption_index.max()) + 1 if len(caption_index) else 1
        self.caption_clip_row = self._clips.rows(caption_clip)
        self._captions = _Sorted(self._joined(self.caption_clip_row, caption_index))

    def clips(self, ids: Tensor) -> Tensor:
        """[n] int64: rows of clip ids [n], UNKNOWN for those that the table does not have."""
        return self._clips.rows(ids)

    def captions(self, clip_ids: Tensor, index: Tensor) -> Tensor:
        """[n] int64: rows of captions, given by clip ids [n] and indices [n]; UNKNOWN for others."""
        clips = self._clips.rows(clip_ids)
        found = self._captions.rows(self._joined(clips, index))
        return found.masked_fill((clips == UNKNOWN) | (index >= self._width), UNKNOWN)

    def _joined(self, clip_row: Tensor, index: Tensor) -> Tensor:
        """One number for each caption. Rows of clips are below 2^32 and indices small, so no number overflows."""
        return clip_row * self._width + index


class _Sorted:
    """Rows of int64 values [n], each of which occurs once."""

    def __init__(self, values: Tensor) -> None:
        self._values, self._rows = torch.sort(values)

    def rows(self, wanted: Tensor) -> Tensor:
        """[m] int64: the row of each wanted value, UNKNOWN if there is none."""
        if not len(self._values):
            return torch.full_like(wanted, UNKNOWN)
        place = torch.searchsorted(self._values, wanted.contiguous()).clamp(max=len(self._values) - 1)
        return torch.where(self._values[place] == wanted, self._rows[place], UNKNOWN)
