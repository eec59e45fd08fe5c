"""Helpers of the corpus readers: tables of captions."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from atr_scale.data.sample import clean_captions
from atr_scale.data.values import caption_texts
from atr_scale.errors import UserError

MAX_FIELD = 1 << 20
MAX_LINES = 100  # of one row: more come from a quote that was never closed

# Notes a row that cannot be used: its place, and what is wrong.
Reject = Callable[[str, str], None]


class TableRow(dict[str, Any]):
    """A row of a table by column. place: its file and line."""

    place = ""


def refuse_row(place: str, detail: str) -> None:
    """Ends with a UserError, for tables whose every row counts."""
    raise UserError(f"{place}: {detail}")


def read_table(path: Path, reject: Reject, encoding: str = "utf-8-sig", delimiter: str = ",") -> list[TableRow]:
    """All rows of a CSV file with a header. Rows that cannot be used go to `reject`; UserError if no row is left."""
    rows: list[TableRow] = []
    first_fault = ""
    header: list[str] = []
    try:
        for number, row in _csv_rows(path, encoding, delimiter):
            if not header and isinstance(row, list):
                header = row
                fault = _text_fault(header, encoding)
                if fault:
                    raise UserError(f"{path}, line {number}: {fault}")
                continue
            place = f"{path}, line {number}"
            fault = row if isinstance(row, str) else _row_fault(row, header, encoding)
            if fault:
                first_fault = first_fault or f"; line {number}: {fault}"
                reject(place, fault)
            else:
                rows.append(TableRow(zip(header, row, strict=True)))
                rows[-1].place = place
    except (UnicodeError, LookupError) as error:
        raise UserError(f"{path} is not {encoding} ({error}): convert it to UTF-8") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if not rows:
        raise UserError(f"{path} has no rows{first_fault or ': download it again'}")
    return rows


def _csv_rows(path: Path, encoding: str, delimiter: str) -> Iterator[tuple[int, list[str] | str]]:
    """(number of its first line, fields of the row or what is wrong with it) of every row that is not empty."""
    csv.field_size_limit(MAX_FIELD)
    with open(path, newline="", encoding=encoding, errors="surrogateescape") as file:
        reader = csv.reader(file, delimiter=delimiter)
        while True:
            first = reader.line_num + 1
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield first, f"{error}; check its quotes"
                continue
            if reader.line_num - first >= MAX_LINES:
                yield first, f"a row of {reader.line_num - first + 1} lines; check its quotes"
            elif row:
                yield first, row


def _row_fault(row: list[str], header: list[str], encoding: str) -> str:
    if len(row) != len(header):
        return f"{'more' if len(row) > len(header) else 'fewer'} fields than the header; check its quotes"
    return _text_fault(row, encoding)


def _text_fault(row: list[str], encoding: str) -> str:
    try:
        "".join(row).encode()
    except UnicodeEncodeError:
        return f"is not {encoding}; convert the file to UTF-8"
    return ""


def caption_columns(path: Path, row: dict[str, str]) -> list[str]:
    """The columns caption, or caption_1, caption_2, ... by number. Raises UserError if there are none."""
    if "caption" in row:
        return ["caption"]
    numbered = {int(m[1]): name for name in row if (m := re.fullmatch(r"caption_(\d+)", name))}
    if not numbered:
        raise UserError(f"{path} has no column caption or caption_1, ...: its columns are {', '.join(row)}")
    return [numbered[n] for n in sorted(numbered)]


def group_captions(
    path: Path, rows: list[TableRow], key: Callable[[TableRow], str], reject: Reject
) -> dict[str, tuple[TableRow, list[str]]]:
    """By `key`, in order of appearance: the first row with this key, and the cleaned captions of all its rows.

    Rows with an empty key go to `reject`.
    """
    columns = caption_columns(path, rows[0])
    grouped: dict[str, tuple[TableRow, list[str]]] = {}
    for row in rows:
        name = key(row)
        if not name.strip():
            reject(row.place, "names no file")
            continue
        try:
            texts = [text for column in columns for text in caption_texts(row.get(column))]
        except ValueError as error:
            reject(row.place, str(error))
            continue
        _, captions = grouped.setdefault(name, (row, []))
        captions += clean_captions(texts)
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


def audioset_clip_id(video: str) -> str:
    """The clip id of the segment that AudioSet has of the YouTube video `video`, the same in every corpus.

    AudioSet has one segment of a video, so that the id of the video names it.
    """
    return f"audioset/{video}"


def youtube_id(name: str) -> str:
    """The YouTube id in an AudioSet file name: `Yr1nicOVtvkQ.wav` -> `r1nicOVtvkQ`."""
    return name.rsplit(".", 1)[0].removeprefix("Y") if "." in name else name.removeprefix("Y")
