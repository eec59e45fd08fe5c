"""What the corpus readers share: the row type, caption tables, split names and the search for audio files."""

from __future__ import annotations

import csv
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atr_scale.data.exclusions import ExclusionList
from atr_scale.data.sample import clean_captions
from atr_scale.errors import UserError

# Best first, where a clip is there twice. m4a cannot be decoded; it is listed so that it is reported as such.
SOURCE_EXTENSIONS = (".flac", ".wav", ".ogg", ".mp3", ".opus", ".m4a")
CANONICAL_SPLITS = {
    "train": "train", "training": "train", "development": "train",
    "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test", "evaluation": "test", "eval": "test",
}  # fmt: skip
MAX_FIELD = 1 << 20


@dataclass(frozen=True)
class Clip:
    """One audio clip of a corpus with its captions. `path` is empty until the audio is located, or where it is missing.

    `meta` goes into the shard as it is; `youtube_id` and `sound_id` (Freesound) in it are what exclusion lists match.
    """

    clip_id: str
    captions: list[str]
    split: str
    path: str = ""
    label: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Corpus:
    """How to read one corpus.

    `read_rows(root, split)` reads every row of the metadata (one Clip a clip, captions in order) without touching
    audio; `locate(root, split, clips)` gives the path of each clip's audio, "" where it is missing.
    `splits` are the official names; empty: `find_splits(root)` asks the metadata.
    """

    name: str
    licence: str
    read_rows: Callable[[Path, str], list[Clip]]
    locate: Callable[[Path, str, list[Clip]], list[str]]
    splits: Sequence[str] = ()
    find_splits: Callable[[Path], list[str]] | None = None
    own_exclusions: Callable[[Path], list[ExclusionList]] = lambda root: []

    def choose_split(self, root: Path, split: str | None) -> str:
        """The corpus's own name of `split`; a corpus with one split needs none. UserError with the known names."""
        known = list(self.splits) or (self.find_splits(root) if self.find_splits else [])
        if split is None:
            if len(known) > 1:
                raise UserError(f"{self.name} at {root} has splits {', '.join(known)}: choose one with --split")
            return known[0] if known else ""
        for name in known:
            if split == name or canonical_split(split) == canonical_split(name):
                return name
        raise UserError(f"{self.name} at {root} has no split '{split}': choose one of {', '.join(known) or '(none)'}")


def canonical_split(name: str) -> str:
    """train, val or test for the common synonyms; any other name as it is."""
    return CANONICAL_SPLITS.get(name.lower(), name)


def read_table(path: Path, encoding: str = "utf-8-sig") -> list[dict[str, str]]:
    """All rows of a CSV file with a header. UserError with the line where it is damaged."""
    csv.field_size_limit(MAX_FIELD)
    rows: list[dict[str, str]] = []
    try:
        with open(path, newline="", encoding=encoding) as file:
            reader = csv.DictReader(file)
            for row in reader:
                if None in row or None in row.values():
                    what = "more" if None in row else "fewer"
                    raise UserError(f"{path}, line {reader.line_num}: {what} fields than the header; check its quotes")
                rows.append(row)
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}; is it a CSV file?") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not {encoding} (byte {error.start}): convert it to UTF-8") from None
    if not rows:
        raise UserError(f"{path} has no rows: download it again")
    return rows


def caption_columns(path: Path, row: dict[str, str]) -> list[str]:
    """`caption`, or caption_1, caption_2, ... in the order of their numbers. UserError where there are none."""
    if "caption" in row:
        return ["caption"]
    numbered = {int(m[1]): name for name in row if (m := re.fullmatch(r"caption_(\d+)", name))}
    if not numbered:
        raise UserError(f"{path} has no column caption or caption_1, ...: its columns are {', '.join(row)}")
    return [numbered[n] for n in sorted(numbered)]


def group_captions(
    path: Path, rows: list[dict[str, str]], key: Callable[[dict[str, str]], str]
) -> dict[str, tuple[dict[str, str], list[str]]]:
    """Rows by `key`, in order of appearance: the first row of each and the captions of all its rows, cleaned."""
    columns = caption_columns(path, rows[0])
    grouped: dict[str, tuple[dict[str, str], list[str]]] = {}
    for row in rows:
        _, captions = grouped.setdefault(key(row), (row, []))
        captions += clean_captions(row[name] for name in columns)
    return grouped


def need_columns(path: Path, row: dict[str, str], *names: str) -> None:
    """UserError where the table lacks a column."""
    missing = [name for name in names if name not in row]
    if missing:
        raise UserError(f"{path} has no column {', '.join(missing)}: its columns are {', '.join(row)}")


def first_file(root: Path, names: Iterable[str], what: str) -> Path:
    """The first of `names` (relative to root) that is a file. UserError naming them all."""
    if not root.is_dir():
        raise UserError(f"there is no folder {root}: give the corpus's folder with --root")
    names = list(names)
    for name in names:
        if (root / name).is_file():
            return root / name
    raise UserError(f"no {what} in {root}: expected one of {', '.join(names)}")


def walk_audio(folders: Iterable[Path]) -> list[tuple[str, str]]:
    """(path relative to its folder, full path) of every audio file below the folders that exist, in a fixed order."""
    found = []
    for folder in folders:
        for parent, names, files in os.walk(folder, followlinks=True):
            names.sort()
            for name in sorted(files):
                if name.lower().endswith(SOURCE_EXTENSIONS) and not name.startswith("."):
                    path = os.path.join(parent, name)
                    found.append((os.path.relpath(path, folder), path))
    return found


def by_stem(files: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Full paths by normalised file stem, the best extension first, then the first found."""
    best: dict[str, tuple[int, str]] = {}
    for name, path in files:
        stem, extension = os.path.splitext(os.path.basename(name))
        rank = SOURCE_EXTENSIONS.index(extension.lower())
        key = normal_name(stem)
        if key not in best or rank < best[key][0]:
            best[key] = (rank, path)
    return {key: path for key, (_, path) in best.items()}


def normal_name(name: str) -> str:
    """A file name as it is compared: NFC (file systems differ), without white space at its ends."""
    return unicodedata.normalize("NFC", name).strip()
