"""Tables of captions that people bring themselves: CSV, JSON lines or parquet, with columns of any name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from atr_scale.data.corpora.files import Reject, TableRow, read_table
from atr_scale.data.values import json_type
from atr_scale.errors import UserError, one_line

DELIMITERS = {"tab": "\t", "\\t": "\t"}  # as they can be written on a command line
# What `columns` calls the fields -> columns of captions.csv.
FIELDS = {"file": "file_name", "caption": "caption", "split": "split", "label": "label"}


def read_own_table(path: Path, reject: Reject, encoding: str, delimiter: str) -> list[TableRow]:
    """The rows of a .csv, .tsv, .txt, .jsonl or .parquet file. Rows that cannot be used go to `reject`.

    encoding and delimiter (of CSV): empty for UTF-8, and for a comma or, in .tsv files, a tab. Raises UserError.
    """
    if not path.is_file():
        raise UserError(f"there is no table of captions at {path}")
    kind = path.suffix.lower()
    try:
        "".encode(encoding or "utf-8")
    except LookupError:
        raise UserError(f"unknown encoding {encoding!r}: give utf-8, latin-1, utf-16 or another of Python's") from None
    if kind in (".csv", ".tsv", ".txt"):
        delimiter = DELIMITERS.get(delimiter, delimiter) or ("\t" if kind == ".tsv" else ",")
        if len(delimiter) != 1:
            raise UserError(f"delimiter {delimiter!r}: give one character, or tab")
        return read_table(path, reject, encoding or "utf-8-sig", delimiter)
    if kind == ".jsonl":
        rows = _read_json_lines(path, reject, encoding or "utf-8-sig")
    elif kind == ".parquet":
        rows = [_placed(TableRow(row), f"{path}, row {number}") for number, row in enumerate(_read_parquet(path), 1)]
    else:
        raise UserError(f"{path}: tables of captions are .csv, .tsv, .txt, .jsonl or .parquet files")
    if not rows:
        raise UserError(f"{path} has no rows that can be used")
    missing = dict.fromkeys(name for row in rows for name in row)
    for row in rows:
        row.update({name: row.get(name) for name in missing})  # objects may leave out what they do not have
    return rows


def rename_columns(path: Path, rows: list[TableRow], columns: str) -> None:
    """Give the columns of `columns`, a text like `file=path,caption=text`, the names that captions.csv has.

    Several columns can be captions. Raises UserError for an unknown field, and for a column that no row has.
    """
    pairs = [(field.strip(), name.strip()) for field, _, name in (part.partition("=") for part in columns.split(","))]
    known = {name: None for row in rows for name in row}
    captions = [name for field, name in pairs if field == "caption"]
    new_names = {}
    for field, name in pairs:
        if field not in FIELDS or not name:
            raise UserError(f"columns={columns}: give FIELD=COLUMN with the fields {', '.join(FIELDS)}")
        if name not in known:
            raise UserError(f"{path} has no column {name}: its columns are {', '.join(known)}")
        numbered = field == "caption" and len(captions) > 1
        new_names[name] = f"caption_{captions.index(name) + 1}" if numbered else FIELDS[field]
    for row in rows:
        renamed = {new_names[name]: row[name] for name in new_names if name in row}
        others = {name: value for name, value in row.items() if name not in new_names and name not in renamed}
        row.clear()
        row.update(**renamed, **others)


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: times and the like as text, bytes not at all."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, bytes) or value != value:  # NaN is how pandas writes a missing value
        return None
    return value if value is None or isinstance(value, str | int | float) else str(value)


def _read_json_lines(path: Path, reject: Reject, encoding: str) -> list[TableRow]:
    rows = []
    try:
        lines = path.read_bytes().decode(encoding, "surrogateescape").split("\n")
    except UnicodeError as error:
        raise UserError(f"{path} is not {encoding} ({error}): name its encoding") from None
    for number, line in enumerate(lines, 1):
        place = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reject(place, one_line(error))
            continue
        if isinstance(row, dict):
            rows.append(_placed(TableRow(row), place))
        else:
            reject(place, f"{json_type(row)}, not an object")
    return rows


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(
            f"{path}: reading parquet needs pyarrow: pip install pyarrow, or convert it to .jsonl"
        ) from None
    try:
        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a parquet file: {one_line(error)}") from None
    return rows


def _placed(row: TableRow, place: str) -> TableRow:
    row.place = place
    return row
