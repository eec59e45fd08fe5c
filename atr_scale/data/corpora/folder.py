"""A corpus of your own: a folder with `audio/` and `captions.csv`.

Columns: file_name (relative to audio/), caption or caption_1, caption_2, ...; optional are split and label. Several
rows may name one file. All other columns become the clip's meta; exclusion lists are matched with its youtube_id and
sound_id.
"""

from __future__ import annotations

from pathlib import Path

from atr_scale.data.corpora.corpus import Clip, Corpus
from atr_scale.data.corpora.files import (
    TableRow,
    caption_columns,
    first_file,
    group_captions,
    need_columns,
    normal_name,
    read_table,
    walk_audio,
)
from atr_scale.sections import Section

ALL = "all"


class Folder(Corpus):
    """A corpus with its folder's name; clip ids `<folder's name>/<file_name>`. The split "" or "all" has every row."""

    def __init__(self, name: str, root: Path, options: Section | None = None) -> None:
        super().__init__(root.resolve().name, root, options)

    def read_clips(self, split: str) -> list[Clip]:
        path, rows = self._table()
        used = {"file_name", "split", "label", *caption_columns(path, rows[0])}
        rows = [row for row in rows if split in ("", ALL, row.get("split"))]
        clips = []
        for name, (row, captions) in group_captions(path, rows, lambda row: row["file_name"], self.reject).items():
            meta = {k: v for k, v in row.items() if k not in used and v}
            label = row.get("label") or None
            clips.append(Clip(f"{self.name}/{name}", captions, row.get("split", split), label=label, meta=meta))
        return clips

    def find_audio(self, split: str, clips: list[Clip]) -> list[str]:
        """The file with the clip's file_name below audio/."""
        files = {normal_name(name): path for name, path in walk_audio([self.root / "audio"])}
        return [files.get(normal_name(clip.clip_id.split("/", 1)[1]), "") for clip in clips]

    def find_splits(self) -> list[str]:
        """The values of the split column, and `all` if there are several."""
        _, rows = self._table()
        names = sorted({row["split"] for row in rows if row.get("split")})
        return [*names, ALL] if len(names) > 1 else names

    def _table(self) -> tuple[Path, list[TableRow]]:
        path = first_file(self.root, ["captions.csv"], "table of captions")
        rows = read_table(path, self.reject)
        need_columns(path, rows[0], "file_name")
        return path, rows
