"""Grades of a relevance file as the scores of a teacher. Only positive grades are kept: nearly all pairs have none.

Shape suffixes: C captions and N clips, P pairs with a positive grade, c and n rows that are looked up.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atr_scale.batch import on_device
from atr_scale.teachers.tables import Direction, TeacherTable

Pairs = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.floating]]  # caption, clip, grade [P]


class GradeTable(TeacherTable):
    """Its values are rows as of a compressed sparse matrix: "start" [C + 1] int64, where the pairs of each caption
    begin; "clip" [P] int32, rows of clips, and "grade" [P] fp32."""

    @classmethod
    def of(
        cls,
        path: Path,
        clip_ids: Tensor,
        caption_clip: Tensor,
        index: Tensor,
        parts: Iterable[Pairs],
        text: Tensor | None = None,
    ) -> Self:
        """From pairs in the order of their captions. The other arguments are those of `TeacherTable`."""
        listed = list(parts)
        caption, clip, grade = (
            torch.from_numpy(np.concatenate([part[k] for part in listed]).astype(kind))
            for k, kind in enumerate((np.int64, np.int32, np.float32))
        )
        start = torch.searchsorted(caption, torch.arange(len(caption_clip) + 1))
        values = {"start": start, "clip": clip, "grade": grade}
        return cls(path.name, clip_ids, caption_clip, index, values, caption_text=text)

    @property
    def differs_by_direction(self) -> bool:
        return False

    def scores(
        self, captions: Tensor, clips: Tensor, direction: Direction = "t2a", device: torch.device | str = "cpu"
    ) -> Tensor:
        """As `TeacherTable.scores`; 0 for pairs without a grade."""
        start = self.values["start"]
        counts = start[captions + 1] - start[captions]
        row = torch.repeat_interleave(torch.arange(len(captions)), counts)
        pair = start[captions][row] + torch.arange(len(row)) - (counts.cumsum(0) - counts)[row]
        different, place = torch.unique(clips, return_inverse=True)
        clip = self.values["clip"][pair].long()
        column = torch.searchsorted(different, clip).clamp(max=len(different) - 1)
        hit = different[column] == clip
        found = torch.zeros(len(captions), len(different))
        found[row[hit], column[hit]] = self.values["grade"][pair[hit]]
        return on_device(found[:, place], device)
