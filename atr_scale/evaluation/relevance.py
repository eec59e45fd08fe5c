"""Which clips fit a caption, beyond the one it was written for.

Shape suffixes: C captions, N clips.
"""

from __future__ import annotations

import ast
import csv
from pathlib import Path

import numpy as np

from atr_scale.batch import caption_id
from atr_scale.data.shard_reader import ShardSet
from atr_scale.demo.truth import read_correspondences
from atr_scale.errors import UserError
from atr_scale.evaluation.embed import Embedded

QUERY_COLUMNS, CLIP_COLUMNS = ("query", "caption"), ("audio_filenames", "file_names")


def read_relevance(path: str | Path, shards: ShardSet, embedded: Embedded) -> np.ndarray:
    """Grades in [0, 1] of every caption and clip, float32 [C, N]; a row without a grade is no query.

    path: a CSV with a caption and a list of file names a row, as DCASE 2025's `metadata_eval.csv` (query,
    audio_filenames), or the `correspondences.npz` of the demo corpora. Raises UserError where the file is neither or
    names none of the captions.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no relevance file at {path}: give a CSV with {QUERY_COLUMNS[0]} and {CLIP_COLUMNS[0]}")
    grades = _from_truth(path, shards, embedded) if path.suffix == ".npz" else _from_csv(path, embedded)
    if not grades.any():
        raise UserError(f"{path} grades no caption and clip of {shards.location}: is it of another split?")
    return grades


def _from_truth(path: Path, shards: ShardSet, embedded: Embedded) -> np.ndarray:
    truth = read_correspondences(path.parent, f"{shards.corpus}/{shards.split}")
    columns = {clip: column for column, clip in enumerate(truth.clip_ids)}
    rows = {key: row for row, key in enumerate(truth.caption_ids)}
    index = np.arange(len(embedded.owner)) - np.searchsorted(embedded.owner, embedded.owner)
    keys = [(embedded.clip_ids[owner], int(k)) for owner, k in zip(embedded.owner, index, strict=True)]
    try:
        chosen = np.ix_([rows[key] for key in keys], [columns[clip] for clip in embedded.clip_ids])
    except KeyError as error:
        raise UserError(
            f"{path} does not know {error.args[0]} of {shards.location}: build both from one demo"
        ) from None
    return truth.grades[chosen]


def _from_csv(path: Path, embedded: Embedded) -> np.ndarray:
    columns = {Path(clip).stem: column for column, clip in enumerate(embedded.clip_ids)}
    rows: dict[int, list[int]] = {}
    for row, caption in enumerate(embedded.captions):
        rows.setdefault(caption_id(caption), []).append(row)
    grades = np.zeros((len(embedded.captions), len(embedded.clip_ids)), np.float32)
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        query, names = (
            next((name for name in known if name in (reader.fieldnames or ())), None)
            for known in (QUERY_COLUMNS, CLIP_COLUMNS)
        )
        if query is None or names is None:
            raise UserError(
                f"{path} has the columns {reader.fieldnames}: it needs {QUERY_COLUMNS[0]} and {CLIP_COLUMNS[0]}"
            )
        for line in reader:
            clips = [columns[Path(name).stem] for name in _names(line[names]) if Path(name).stem in columns]
            for row in rows.get(caption_id(line[query]), []):
                grades[row, clips] = 1.0
    return grades


def _names(cell: str) -> list[str]:
    """A list as Python or JSON writes it, or names between semicolons."""
    if cell.lstrip().startswith("["):
        return [str(name) for name in ast.literal_eval(cell.strip())]
    return [name.strip() for name in cell.split(";") if name.strip()]
