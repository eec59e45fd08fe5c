"""Helpers of the corpus readers: tables of captions, and the search for audio files."""

from __future__ import annotations

import csv
import os
import re
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path

from atr_scale.data.sample import clean_captions
from atr_scale.errors import UserError

# The first one is taken if a clip has several files. m4a cannot be decoded; it is listed so that it is reported.
SOURCE_EXTENSIONS = (".flac", ".wav", ".ogg", ".mp3", ".opus", ".m4a")
MAX_FIELD = 1 << 20


def read_table(path: Path, encoding: str = "utf-8-sig") -> list[dict[str, str]]:
    """All rows of a CSV file with a header. Raises UserError with the number of a damaged line."""
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
    """The columns caption, or caption_1, caption_2, ... by number. Raises UserError if there are none."""
    if "caption" in row:
        return ["caption"]
    numbered = {int(m[1]): name for name in row if (m := re.fullmatch(r"caption_(\d+)", name))}
    if not numbered:
        raise UserError(f"{path} has no column caption or caption_1, ...: its columns are {', '.join(row)}")
    return [numbered[n] for n in sorted(numbered)]


def group_captions(
    path: Path, rows: list[dict[str, str]], key: Callable[[dict[str, str]], str]
) -> dict[str, tuple[dict[str, str], list[str]]]:
    """By `key`, in order of appearance: the first row with this key, and the cleaned captions of all its rows."""
    columns = caption_columns(path, rows[0])
    grouped: dict[str, tuple[dict[str, str], list[str]]] = {}
    for row in rows:
        _, captions = grouped.setdefault(key(row), (row, []))
        captions += clean_captions(row[name] for name in columns)
    return grouped


def need_columns(path: Path, row: dict[str, str], *names: str) -> None:
    """Raises UserError if the table lacks a column."""
    missing = [name for name in names if name not in row]
    if missing:
        raise UserError(f"{path} has no column {', '.join(missing)}: its columns are {', '.join(row)}")


def first_file(root: Path, names: Iterable[str], what: str) -> Path:
    """The first of `names` (relative to root) that is a file. Raises UserError with all names if none is."""
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
    """Full path by normalised file stem. Of several files, the extension that SOURCE_EXTENSIONS has first is taken."""
    best: dict[str, tuple[int, str]] = {}
    for name, path in files:
        stem, extension = os.path.splitext(os.path.basename(name))
        rank = SOURCE_EXTENSIONS.index(extension.lower())
        key = normal_name(stem)
        if key not in best or rank < best[key][0]:
            best[key] = (rank, path)
    return {key: path for key, (_, path) in best.items()}


def normal_name(name: str) -> str:
    """A file name for comparisons: in NFC, as file systems differ in this, and without white space at its ends."""
    return unicodedata.normalize("NFC", name).strip()


def audioset_clip_id(video: str) -> str:
    """The clip id of the segment that AudioSet has of the YouTube video `video`, the same in every corpus.

    AudioSet has one segment of a video, so that the id of the video names it.
    """
    return f"audioset/{video}"


def youtube_id(name: str) -> str:
    """The YouTube id in an AudioSet file name: `Yr1nicOVtvkQ.wav` -> `r1nicOVtvkQ`."""
    return name.rsplit(".", 1)[0].removeprefix("Y") if "." in name else name.removeprefix("Y")
