"""Rows of clips and captions in a teacher table, found by binary search in sorted arrays.

Shape suffixes: C captions and N clips of the table, n wanted ones.

A caption is identified by its clip and its text: clips may share a text, and two samples of one clip, from two corpora,
have their own captions. Tables of version 0.2 hold no texts and identify a caption by (clip id, index in its sample).
"""

from __future__ import annotations

import torch
from torch import Tensor

UNKNOWN = -1
SPREAD = -7046029254386353131  # odd, 2^64 / golden ratio as int64


class TableKeys:
    """The rows of clip ids [N] and of captions, each a clip id [C] and a text id or an index [C], all int64.

    caption_clip_row: [C] int64, the row of every caption's clip.
    """

    def __init__(
        self, clip_ids: Tensor, caption_clip: Tensor, caption_index: Tensor, caption_text: Tensor | None
    ) -> None:
        self._clips, self._by_text = _Sorted(clip_ids), caption_text is not None
        self.caption_clip_row = self._clips.rows(caption_clip)
        self._captions = _Sorted(_joined(caption_clip, caption_index if caption_text is None else caption_text))

    def clips(self, ids: Tensor) -> Tensor:
        """[n] int64: rows of clip ids [n], UNKNOWN for those that the table does not have."""
        return self._clips.rows(ids)

    def captions(self, clip_ids: Tensor, index: Tensor, text: Tensor) -> Tensor:
        """[n] int64: rows of captions; UNKNOWN for those that the table does not have.

        clip_ids, index, text: [n] int64, as `clip_ids`, `caption_index` and `stored_ids` of a `Batch`.
        """
        return self._captions.rows(_joined(clip_ids, text if self._by_text else index))


def _joined(clip_ids: Tensor, other: Tensor) -> Tensor:
    """One number for each pair. Both are hashes or small, so that two pairs with one number are as rare as two strings
    with one `stable_id`."""
    return clip_ids * SPREAD + other  # wraps around


class _Sorted:
    """Rows of int64 values [n]. Of equal values the first row is found."""

    def __init__(self, values: Tensor) -> None:
        self._values, self._rows = torch.sort(values, stable=True)

    def rows(self, wanted: Tensor) -> Tensor:
        """[m] int64: the row of each wanted value, UNKNOWN if there is none."""
        if not len(self._values):
            return torch.full_like(wanted, UNKNOWN)
        place = torch.searchsorted(self._values, wanted.contiguous()).clamp(max=len(self._values) - 1)
        return torch.where(self._values[place] == wanted, self._rows[place], UNKNOWN)
