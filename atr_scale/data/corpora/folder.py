"""A corpus of your own: a folder with `audio/` and `captions.csv`.

Columns: file_name (relative to audio/), caption or caption_1, caption_2, ...; optional are split and label. Several
rows may name one file. All other columns become the clip's meta; exclusion lists are matched with its youtube_id and
sound_id.
"""

from __future__ import annotations

import posixpath
from pathlib import Path

from atr_scale.data.corpora.audio_files import AudioFiles, walk_audio, walk_files, without_extension
from atr_scale.data.corpora.corpus import Clip, Corpus
from atr_scale.data.corpora.files import (
    TableRow,
    caption_columns,
    first_file,
    group_captions,
    need_columns,
    read_table,
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
        for row, captions in group_captions(path, rows, lambda row: _same_file(row["file_name"]), self.reject).values():
            meta = {k: v for k, v in row.items() if k not in used and v}
            label = row.get("label") or None
            clips.append(
                Clip(f"{self.name}/{row['file_name']}", captions, row.get("split", split), label=label, meta=meta)
            )
        return clips

    def find_audio(self, split: str, clips: list[Clip]) -> list[str]:
        """The file with the clip's file_name below audio/.

        The name may also begin with `./`, `audio/` or the whole path of that folder, or be in another letter case, or
        have another extension or none, if only one file fits. Files elsewhere are never read.
        """
        folder = self.root / "audio"
        files = AudioFiles(walk_files([folder]), key=str)
        stems = AudioFiles(walk_audio([folder]), key=without_extension)

        def find(clip: Clip) -> str:
            name = clip.clip_id.split("/", 1)[1]
            names = list(dict.fromkeys((name, _same_file(name), _inside(folder, name))))
            path = files.find(names) or stems.find([without_extension(name) for name in names])
            if not path:
                self.missing[clip.clip_id] = files.explain(names)
            return path

        return [find(clip) for clip in clips]

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


def _same_file(name: str) -> str:
    """`name` without the parts that name no other file: `./`, doubled slashes, slashes of Windows."""
    return posixpath.normpath(name.replace("\\", "/")) if name.strip() else ""


def _inside(folder: Path, name: str) -> str:
    """`name` relative to `folder`, if it begins with the folder's name or whole path."""
    name = _same_file(name)
    for prefix in (f"{folder.resolve()}/", f"{folder}/", f"{folder.name}/"):
        name = name.removeprefix(prefix)
    return name
