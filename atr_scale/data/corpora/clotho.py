"""Clotho v2.1 (Drossos et al. 2020): Freesound clips of 15 to 30 s, five captions each.

Reads clotho_captions_<split>.csv and, if it exists, clotho_metadata_<split>.csv (ISO-8859-1) for the Freesound id and
the licence of each clip.
"""

from __future__ import annotations

import logging
from pathlib import Path

from atr_scale.data.corpora.audio_files import AudioFiles, audio_stem, walk_audio
from atr_scale.data.corpora.corpus import Clip, Corpus
from atr_scale.data.corpora.files import (
    first_file,
    group_captions,
    need_columns,
    read_table,
)
from atr_scale.errors import UserError

logger = logging.getLogger(__name__)

CSV_FOLDERS = ("", "metadata/", "csv/", "clotho_csv_files/", "captions/")


class Clotho(Corpus):
    """Splits development, validation and evaluation; clip ids `clotho/<file name>`.

    A clip whose file name or Freesound id also occurs in another split (v2.1 has a few) has `also_in` in its meta.
    """

    licence = "captions: Tampere University, non-commercial; audio: Freesound, a licence for each clip"
    splits = ("development", "validation", "evaluation")

    def read_clips(self, split: str) -> list[Clip]:
        path = _captions_file(self.root, split)
        rows = read_table(path, self.reject)
        need_columns(path, rows[0], "file_name")
        details = _metadata(self.root, split)
        elsewhere = {other: _identities(self.root, other) for other in self.splits if other != split}
        clips = []
        for name, (_, captions) in group_captions(path, rows, lambda row: row["file_name"], self.reject).items():
            known = details.get(name, {})
            meta: dict[str, object] = {k: v for k, v in known.items() if k in ("sound_id", "license") and v}
            also_in = [other for other, ids in elsewhere.items() if {name, meta.get("sound_id")} & ids]
            if also_in:
                meta["also_in"] = also_in
            clips.append(Clip(f"clotho/{name}", captions, split, meta=meta))
        shared = sum("also_in" in clip.meta for clip in clips)
        if shared:
            logger.warning("clotho %s: %d of %d clips are also in another split", split, shared, len(clips))
        return clips

    def find_audio(self, split: str, clips: list[Clip]) -> list[str]:
        """The file name, with any audio extension, below <split>/, clotho_audio_files/<split>/ or audio/<split>/."""
        parents = ("", "clotho_audio_files", "audio")
        files = AudioFiles(walk_audio(self.root / parent / split for parent in parents))

        def find(clip: Clip) -> str:
            names = [audio_stem(clip.clip_id.split("/", 1)[1])]
            path = files.find(names)
            if not path:
                self.missing[clip.clip_id] = files.explain(names)
            return path

        return [find(clip) for clip in clips]


def _captions_file(root: Path, split: str) -> Path:
    return first_file(root, [f"{folder}clotho_captions_{split}.csv" for folder in CSV_FOLDERS], "Clotho captions")


def _warn_of_metadata(place: str, detail: str) -> None:
    logger.warning("%s: %s; its clip has no sound_id, so that no exclusion list covers it", place, detail)


def _ignore(place: str, detail: str) -> None:
    """Damaged rows of another split are reported when that one is built."""


def _metadata(root: Path, split: str) -> dict[str, dict[str, str]]:
    for folder in CSV_FOLDERS:
        path = root / folder / f"clotho_metadata_{split}.csv"
        if path.is_file():
            rows = read_table(path, _warn_of_metadata, "iso-8859-1")
            need_columns(path, rows[0], "file_name", "sound_id")
            return {row["file_name"]: row for row in rows}
    return {}


def _identities(root: Path, split: str) -> set[object]:
    """File names and Freesound ids of another split, as far as its tables exist and can be read."""
    known: set[object] = set()
    try:
        details = _metadata(root, split)
        known |= {row["sound_id"] for row in details.values() if row["sound_id"].isdigit()} | details.keys()
        known |= {row.get("file_name") for row in read_table(_captions_file(root, split), _ignore)}
    except UserError as error:
        logger.debug("clotho: clips that are also in %s are not all known: %s", split, error)
    return known
