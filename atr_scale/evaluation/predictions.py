"""The retrieved clips of every caption as a table, in the form in which DCASE takes submissions.

A row per caption: the column `caption`, then `fname_1`, `fname_2`, ... with the file names of the best clips, best
first: 10 as in the challenges of 2022 to 2024, 16 as in 2025, whose relevance has several clips a caption.
"""

from __future__ import annotations

import csv
from pathlib import Path

from atr_scale.evaluation.embed import Embedded
from atr_scale.evaluation.metrics import GRADED_AT, PRECISION_AT
from atr_scale.evaluation.result import file_stem
from atr_scale.evaluation.retrieval_scores import RetrievalScores

TEST = "test"


def write_predictions(
    folder: Path, split: str, scores: RetrievalScores, embedded: Embedded, several_relevant: bool
) -> Path:
    """Write predictions.csv (of another split than test: predictions-<split>.csv) and return its path.

    several_relevant: the relevance of the split has several clips a caption.
    """
    lists = scores.lists(GRADED_AT if several_relevant else PRECISION_AT).tolist()
    names = [Path(clip).name for clip in embedded.clip_ids]
    path = folder / ("predictions.csv" if split == TEST else f"predictions-{file_stem(split)}.csv")
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["caption", *(f"fname_{place}" for place in range(1, len(lists[0]) + 1))])
        table.writerows(
            [caption, *(names[clip] for clip in found)] for caption, found in zip(embedded.captions, lists, strict=True)
        )
    return path
