"""A plain folder: `audio/` and `captions.csv`.

Columns: file_name (relative to audio/), caption or caption_1, caption_2, ...; optional `split` and `label`. Several
rows may name one file. All other columns go to the clip's meta; `youtube_id` and `sound_id` there are matched by
exclusion lists.
"""

from __future__ import annotations

from pathlib import Path

from atr_scale.data.corpora.rows import (
    Clip,
    Corpus,
    caption_columns,
    first_file,
    group_captions,
    need_columns,
    normal_name,
    read_table,
    walk_audio,
)

ALL = "all"


def read_rows(root: Path, split: str) -> list[Clip]:
    """Every clip of `split` ("" or "all": the whole table); clip ids `<folder's name>/<file_name>`."""
    path, rows = _table(root)
    used = {"file_name", "split", "label", *caption_columns(path, rows[0])}
    rows = [row for row in rows if split in ("", ALL, row.get("split"))]
    clips = []
    for name, (row, captions) in group_captions(path, rows, lambda row: row["file_name"]).items():
        meta = {k: v for k, v in row.items() if k not in used and v}
        clip_id = f"{root.resolve().name}/{name}"
        clips.append(Clip(clip_id, captions, row.get("split", split), label=row.get("label") or None, meta=meta))
    return clips


def locate(root: Path, split: str, clips: list[Clip]) -> list[str]:
    """The file of that very name below audio/."""
    files = {normal_name(name): path for name, path in walk_audio([root / "audio"])}
    return [files.get(normal_name(clip.clip_id.split("/", 1)[1]), "") for clip in clips]


def find_splits(root: Path) -> list[str]:
    """The values of the split column, and `all` where there are several."""
    _, rows = _table(root)
    names = sorted({row["split"] for row in rows if row.get("split")})
    return [*names, ALL] if len(names) > 1 else names


def _table(root: Path) -> tuple[Path, list[dict[str, str]]]:
    path = first_file(root, ["captions.csv"], "table of captions")
    rows = read_table(path)
    need_columns(path, rows[0], "file_name")
    return path, rows


CORPUS = Corpus(name="folder", licence="not stated", read_rows=read_rows, locate=locate, find_splits=find_splits)
