"""A corpus of your own: a folder with `audio/` and `captions.csv`, or a table and a folder of audio anywhere.

Columns: file_name (relative to audio/), caption or caption_1, caption_2, ...; optional are split and label. Several
rows may name one file. All other columns become the clip's meta; exclusion lists are matched with its youtube_id and
sound_id.
"""

from __future__ import annotations

import hashlib
import posixpath
from pathlib import Path

from pydantic import Field

from atr_scale.data.corpora.audio_files import AudioFiles, walk_audio, walk_files, without_extension
from atr_scale.data.corpora.corpus import Clip, Corpus
from atr_scale.data.corpora.files import TableRow, caption_columns, first_file, group_captions, need_columns
from atr_scale.data.corpora.own_tables import plain, read_own_table, rename_columns
from atr_scale.data.values import id_text
from atr_scale.errors import UserError
from atr_scale.sections import Location, Section

ALL = "all"


class FolderOptions(Section):
    """Where the table and the audio are, how the table is written, and a random split."""

    captions: Location | None = Field(None, description="table: .csv, .tsv, .jsonl or .parquet; null: captions.csv")
    audio: Location | None = Field(None, description="folder of the audio files; null: audio/")
    columns: str = Field("", description="names of the columns, as file=path,caption=text; caption may be repeated")
    delimiter: str = Field("", description="delimiter of a CSV file, tab for a tab; empty: a comma, in .tsv a tab")
    encoding: str = Field("", description="encoding of the table; empty: UTF-8")
    shares: str = Field("", description="random split, as train=0.8,val=0.1,test=0.1; empty: the column split")
    seed: int = Field(0, description="seed of the random split")
    group_by: str = Field("", description="column whose equal values stay in one part of the random split")


class Folder(Corpus):
    """A corpus with its folder's name; clip ids `<folder's name>/<file_name>`. The split "" or "all" has every row."""

    Options = FolderOptions
    options: FolderOptions

    def __init__(self, name: str, root: Path, options: Section | None = None) -> None:
        super().__init__(root.resolve().name, root, options)

    def read_clips(self, split: str) -> list[Clip]:
        path, rows = self._table()
        used = {"file_name", "split", "label", *caption_columns(path, rows[0])}
        rows = [row for row in rows if split in ("", ALL, row.get("split"))]
        clips = []
        for row, captions in group_captions(path, rows, lambda row: _same_file(row["file_name"]), self.reject).values():
            meta = {k: plain(v) for k, v in row.items() if k not in used and plain(v) not in (None, "")}
            own_split = row.get("split") or split
            label = id_text(row.get("label")) or None
            clips.append(Clip(f"{self.name}/{row['file_name']}", captions, own_split, label=label, meta=meta))
        return clips

    def find_audio(self, split: str, clips: list[Clip]) -> list[str]:
        """The file with the clip's file_name below audio/.

        The name may also begin with `./`, `audio/` or the whole path of that folder, or be in another letter case, or
        have another extension or none, if only one file fits. Files elsewhere are never read.
        """
        folder = Path(self.options.audio) if self.options.audio else self.root / "audio"
        if self.options.audio and not folder.is_dir():
            raise UserError(f"there is no folder {folder}: give the folder of the audio files as audio")
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
        """The parts of the random split, or the values of the split column, and `all` if there are several."""
        _, rows = self._table()
        names = sorted({row["split"] for row in rows if row.get("split")})
        return [*names, ALL] if len(names) > 1 else names

    def _table(self) -> tuple[Path, list[TableRow]]:
        options = self.options
        path = Path(options.captions or first_file(self.root, ["captions.csv"], "table of captions"))
        rows = read_own_table(path, self.reject, options.encoding, options.delimiter)
        if options.columns:
            rename_columns(path, rows, options.columns)
        if "file_name" not in rows[0]:
            raise UserError(
                f"{path} has no column file_name: its columns are {', '.join(rows[0])}; rename yours, or tell "
                "`shards build` theirs, for example --columns file=path,caption=text"
            )
        usable = []
        for row in rows:
            if not isinstance(row.get("file_name"), str):
                self.reject(row.place, "names no file")
                continue
            if "split" in row:
                row["split"] = id_text(row["split"])
            usable.append(row)
        if not usable:
            raise UserError(f"{path} has no row with the name of a file")
        if options.shares:
            self._split_at_random(path, usable)
        return path, usable

    def _split_at_random(self, path: Path, rows: list[TableRow]) -> None:
        """Give each row a split by a hash of its group, which other rows do not change."""
        shares, group_by = _parse_shares(self.options.shares), self.options.group_by
        need_columns(path, rows[0], *([group_by] if group_by else []))
        if "split" in rows[0]:
            raise UserError(f"{path} has a column split: drop shares, or rename the column")
        for row in rows:
            group = str(row.get(group_by)) if group_by else _same_file(row["file_name"])
            digest = hashlib.blake2b(f"{self.options.seed}/{group}".encode("utf-8", "replace"), digest_size=8).digest()
            left = int.from_bytes(digest, "big") / 2**64
            for name, share in shares.items():
                row["split"] = name
                left -= share
                if left < 0:
                    break


def _parse_shares(text: str) -> dict[str, float]:
    pairs = [(name.strip(), share) for name, _, share in (part.partition("=") for part in text.split(","))]
    try:
        shares = {name: float(share) for name, share in pairs}
    except ValueError:
        shares = {}
    if (
        not all(name and 0 < share < 1 for name, share in shares.items())
        or len(shares) != len(pairs)
        or abs(sum(shares.values()) - 1) > 1e-6
    ):
        raise UserError(f"shares={text}: give names and shares that add up to 1, as train=0.8,val=0.1,test=0.1")
    return shares


def _same_file(name: str) -> str:
    """`name` without the parts that name no other file: `./`, doubled slashes, slashes of Windows."""
    return posixpath.normpath(name.replace("\\", "/")) if name.strip() else ""


def _inside(folder: Path, name: str) -> str:
    """`name` relative to `folder`, if it begins with the folder's name or whole path."""
    name = _same_file(name)
    for prefix in (f"{folder.resolve()}/", f"{folder}/", f"{folder.name}/"):
        name = name.removeprefix(prefix)
    return name
