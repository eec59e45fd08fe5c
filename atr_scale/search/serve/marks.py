"""Marks of results as right or wrong, in a CSV file that `atr-scale evaluate --relevance` reads.

query             the text that was searched
audio_filenames   JSON list of the clips that are right for it
not_relevant      JSON list of the clips that are wrong for it; not read by evaluate
"""

from __future__ import annotations

import csv
import io
import json
import threading
from pathlib import Path
from typing import Literal

from atr_scale.batch import caption_id
from atr_scale.data.corpora.files import read_table, refuse_row
from atr_scale.errors import UserError
from atr_scale.files import atomic_write

Mark = Literal["right", "wrong"]
COLUMNS = ("query", "audio_filenames", "not_relevant")


class Marks:
    """The marks in one file. Every change is on the disk when `set` returns; any thread may call it.

    Queries that differ only in letter case and spacing are one query. One process at a time may use a file.
    """

    def __init__(self, path: Path) -> None:
        """Raises UserError if there is a file of another kind at `path`."""
        self.path = path
        self._lock = threading.Lock()
        self._queries: dict[int, tuple[str, dict[str, Mark]]] = {}
        # Only a header remains if every mark was removed.
        if path.exists() and path.read_bytes().strip() not in (b"", ",".join(COLUMNS).encode()):
            self._read()

    def _read(self) -> None:
        for row in read_table(self.path, refuse_row):
            if tuple(row) != COLUMNS:
                raise UserError(
                    f"{self.path} has the columns {list(row)}, not {list(COLUMNS)}: give a new file for the marks"
                )
            try:
                lists = [json.loads(row[column]) for column in COLUMNS[1:]]
            except ValueError:
                lists = [None]
            if not all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in lists):
                raise UserError(f"{row.place}: a cell is no JSON list of clips; mend it, or give a new file")
            _, marks = self._queries.setdefault(caption_id(row["query"]), (row["query"], {}))
            marks.update(dict.fromkeys(lists[0], "right") | dict.fromkeys(lists[1], "wrong"))

    def of(self, query: str) -> dict[str, Mark]:
        """The marks of a query by clip id."""
        with self._lock:
            return dict(self._queries.get(caption_id(query), ("", {}))[1])

    def set(self, query: str, clip_id: str, mark: Mark | None) -> None:
        """Mark a clip; None removes its mark. Raises OSError, and changes nothing, if it cannot be saved."""
        key = caption_id(query)
        with self._lock:
            first, marks = self._queries.get(key, (query, {}))
            changed = {clip: value for clip, value in marks.items() if clip != clip_id}
            if mark is not None:
                changed[clip_id] = mark
            queries = {**self._queries, key: (first, changed)}
            if not changed:
                del queries[key]
            self._write(queries)
            self._queries = queries

    def _write(self, queries: dict[int, tuple[str, dict[str, Mark]]]) -> None:
        text = io.StringIO(newline="")
        rows = csv.writer(text)
        rows.writerow(COLUMNS)
        for query, marks in queries.values():
            lists = ([clip for clip, value in marks.items() if value == wanted] for wanted in ("right", "wrong"))
            rows.writerow([query, *(json.dumps(names, ensure_ascii=False) for names in lists)])
        with atomic_write(self.path) as temporary:
            temporary.write_text(text.getvalue(), encoding="utf-8", newline="")
