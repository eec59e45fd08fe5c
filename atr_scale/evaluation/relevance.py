"""Graded relevance of clips for captions, read from a file of one of two kinds.

An npz file of grades, as numpy.savez_compressed writes it, without pickled objects. It holds all captions and clips of
the split, in any order, and may hold more:

    grades         float [C, N]  from 0 to 1: the part of the caption that is true of the clip
    clip_ids       str [N]       ids of the clips, as in the shards
    caption_clip   str [C]       id of the clip that the caption was written for
    caption_index  int [C]       index of the caption among the captions of this clip, from 0

A CSV file like `metadata_eval.csv` of DCASE 2025. Each row has a caption and the names of the audio files that are
relevant for it (columns query and audio_filenames).

Shape suffixes: C captions, N clips.
"""

from __future__ import annotations

import ast
import zipfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from atr_scale.batch import caption_id
from atr_scale.data.corpora.files import read_table, refuse_row
from atr_scale.data.shard_reader import ShardSet
from atr_scale.errors import UserError
from atr_scale.evaluation.embed import Embedded

QUERY_COLUMNS, CLIP_COLUMNS = ("query", "caption"), ("audio_filenames", "file_names")
# Arrays of an npz file: the kinds of their dtype, their shape in words.
ARRAYS = {
    "grades": ("f", "float [captions, clips]"),
    "clip_ids": ("U", "str [clips]"),
    "caption_clip": ("U", "str [captions]"),
    "caption_index": ("iu", "int [captions]"),
}


def read_relevance(path: str | Path, shards: ShardSet, embedded: Embedded) -> NDArray[np.float32]:
    """Grades in [0, 1] of every caption and clip, float32 [C, N]. A caption whose grades are all 0 is not a query.

    path: an npz or a CSV file as this module describes. Raises UserError if it is neither, or if it grades no caption
    of the split.
    """
    path = Path(path)
    grades = _from_npz(path, shards, embedded) if path.suffix == ".npz" else _from_csv(path, embedded)
    if not grades.any():
        raise UserError(f"{path} grades no caption and clip of {shards.location}: give the file of this split")
    return grades


class Texts(NamedTuple):
    """Captions [C] and clip ids [N] of a split."""

    captions: list[str]
    clip_ids: list[str]


class Grades(NamedTuple):
    """Content of an npz file. rows: row of each (clip id, caption index). columns: column of each clip id."""

    grades_CN: NDArray[np.floating]
    rows: dict[tuple[str, int], int]
    columns: dict[str, int]


def _from_npz(path: Path, shards: ShardSet, embedded: Embedded) -> NDArray[np.float32]:
    known = read_grades(path)
    index = np.arange(len(embedded.owner)) - np.searchsorted(embedded.owner, embedded.owner)
    captions = [(embedded.clip_ids[owner], int(k)) for owner, k in zip(embedded.owner, index, strict=True)]
    unknown = [clip for clip in embedded.clip_ids if clip not in known.columns]
    unknown += [f"caption {k} of {clip}" for clip, k in captions if (clip, k) not in known.rows]
    if unknown:
        raise UserError(
            f"{path} lacks {len(unknown)} clips and captions of {shards.location} (for example {unknown[0]}): "
            "give the file of this split"
        )
    chosen = np.ix_([known.rows[key] for key in captions], [known.columns[clip] for clip in embedded.clip_ids])
    return known.grades_CN[chosen].astype(np.float32)


def read_grades(path: Path) -> Grades:
    """The grades of an npz file. Raises UserError if it is none."""
    _must_exist(path)
    needed = ", ".join(f"{name} {shape}" for name, (_, shape) in ARRAYS.items())
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("no zip archive")
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: np.asarray(file[name]) for name in ARRAYS if name in file}
    except Exception as error:  # zipfile, zlib and numpy raise many kinds of errors for damaged files
        raise UserError(
            f"{path} is no npz file of grades ({' '.join(str(error).split())}): it needs {needed}"
        ) from None
    missing = [name for name in ARRAYS if name not in arrays]
    if missing:
        raise UserError(f"{path} has no {', '.join(missing)}: a file of grades needs {needed}")
    grades_CN, clip_ids, caption_clip, caption_index = (arrays[name] for name in ARRAYS)
    shapes = (caption_clip.size, clip_ids.size), (clip_ids.size,), (caption_clip.size,), (caption_clip.size,)
    for (name, array), shape in zip(arrays.items(), shapes, strict=True):
        if array.dtype.kind not in ARRAYS[name][0] or array.shape != shape:
            raise UserError(f"{path}: {name} is {array.dtype} {list(array.shape)}, but a file of grades needs {needed}")
    if not ((grades_CN >= 0) & (grades_CN <= 1)).all():
        raise UserError(f"{path} has grades outside of 0 to 1: scale them")
    columns = {clip: column for column, clip in enumerate(clip_ids.tolist())}
    keys = zip(caption_clip.tolist(), caption_index.tolist(), strict=True)
    rows = {key: row for row, key in enumerate(keys)}
    if (len(rows), len(columns)) != grades_CN.shape:
        raise UserError(f"{path} names a clip or a caption twice: each needs one column, or one row")
    return Grades(grades_CN, rows, columns)


def _must_exist(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"no relevance file at {path}: give an npz file of grades, or a CSV with query and file names")


def _from_csv(path: Path, embedded: Embedded) -> NDArray[np.float32]:
    """1 for the clips that a CSV file names for a caption, else 0."""
    grades = np.zeros((len(embedded.captions), len(embedded.clip_ids)), np.float32)
    for caption, clip in pairs_of_csv(path, Texts(embedded.captions, embedded.clip_ids)):
        grades[caption, clip] = 1.0
    return grades


def pairs_of_csv(path: Path, texts: Texts) -> Iterator[tuple[int, int]]:
    """(caption, clip), indices into `texts`: the clips that a CSV file names for a caption, each maybe several times.

    Raises UserError if the file cannot be read.
    """
    _must_exist(path)
    columns = {Path(clip).stem: column for column, clip in enumerate(texts.clip_ids)}
    rows: dict[int, list[int]] = {}
    for row, caption in enumerate(texts.captions):
        rows.setdefault(caption_id(caption), []).append(row)
    lines = read_table(path, refuse_row)
    query, names = (next((name for name in known if name in lines[0]), None) for known in (QUERY_COLUMNS, CLIP_COLUMNS))
    if query is None or names is None:
        raise UserError(f"{path} has the columns {list(lines[0])}: it needs {QUERY_COLUMNS[0]} and {CLIP_COLUMNS[0]}")
    for line in lines:
        clips = [columns[Path(name).stem] for name in _names(path, line[names]) if Path(name).stem in columns]
        yield from product(rows.get(caption_id(line[query]), []), clips)


def _names(path: Path, cell: str) -> list[str]:
    """File names of a cell: a list as Python or JSON writes it, or names separated by semicolons."""
    if not cell.lstrip().startswith("["):
        return [name.strip() for name in cell.split(";") if name.strip()]
    try:
        return [str(name) for name in ast.literal_eval(cell.strip())]
    except (SyntaxError, ValueError):
        raise UserError(f"{path}: {cell[:80]!r} is no list of file names; check its quotes") from None
