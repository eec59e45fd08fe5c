"""WavCaps (Mei et al. 2024): FreeSound, BBC Sound Effects, SoundBible and AudioSet-SL, with one caption each.

Reads the JSON files of the sources that are there, below json_files/<Source>/ or <Source>/, and audio below any folder
with the source's name (Waveforms/FreeSound_flac, AudioSet_SL_flac, ...). If blacklist/blacklist_exclude_test_ac.json
exists, it excludes the clips of other corpora's test sets.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from atr_scale.data.corpora.corpus import Clip, Corpus
from atr_scale.data.corpora.files import SOURCE_EXTENSIONS, audioset_clip_id, by_stem, walk_audio, youtube_id
from atr_scale.data.exclusions import EXCLUSION_FORMATS, ExcludedIds, ExclusionList, read_exclusions
from atr_scale.data.sample import clean_captions
from atr_scale.errors import UserError

logger = logging.getLogger(__name__)

# Folder names of each source, in lower case and without an ending such as _flac.
SOURCES = {
    "freesound": ("freesound",),
    "bbc": ("bbc", "bbc_sound_effects"),
    "soundbible": ("soundbible",),
    "audioset": ("audioset_sl", "audioset"),
}
DEFAULT_BLACKLIST = "blacklist_exclude_test_ac.json"
UNREADABLE = ("Vcu0pVF1npM", "06-g5jz-OGc", "3sSblRfEG2o", "WudGD6ZHRoY", "Fli8wjBFV2M", "mW3S0u8bj58")


class WavCaps(Corpus):
    """One split, train; clip ids `wavcaps/<source>/<id>`, and `audioset/<youtube id>` as in AudioCaps."""

    licence = "academic use only"
    splits = ("train",)
    overlap_warning = (
        "may hold test clips of AudioCaps and Clotho: build it again with WavCaps' blacklist folder in place, or "
        "--exclude FILE"
    )

    def read_clips(self, split: str) -> list[Clip]:
        """Every clip of the sources that have JSON files."""
        if not self.root.is_dir():
            raise UserError(f"there is no folder {self.root}: give WavCaps' folder with --root")
        clips: dict[str, Clip] = {}
        counts = {}
        for source in SOURCES:
            before = len(clips)
            for path in _json_files(self.root, source):
                for row in _read_json(path):
                    clip = _clip(path, source, row, split)
                    clips.setdefault(clip.clip_id, clip)
            counts[source] = len(clips) - before
        if not clips:
            raise UserError(f"no WavCaps JSON in {self.root}: expected json_files/<Source>/*.json or <Source>/*.json")
        logger.info("wavcaps: %s", ", ".join(f"{source} {count}" for source, count in counts.items()))
        return list(clips.values())

    def find_audio(self, split: str, clips: list[Clip]) -> list[str]:
        """`<id>` with any audio extension, below any folder named after the clip's source."""
        files = {source: by_stem(walk_audio(folders)) for source, folders in _audio_folders(self.root).items()}

        def find(clip: Clip) -> str:
            source, video = clip.meta["source"], clip.meta.get("youtube_id")
            stems = (f"Y{video}", video) if video else (clip.clip_id.split("/", 2)[2],)
            return next((files[source][stem] for stem in stems if stem in files[source]), "")

        return [find(clip) for clip in clips]

    def own_exclusions(self) -> list[ExclusionList]:
        """Files known to be unreadable, and the blacklist of the AudioCaps and Clotho test sets if it exists."""
        unreadable = frozenset(UNREADABLE)
        digest = hashlib.sha256("\n".join(UNREADABLE).encode()).hexdigest()
        lists = [ExclusionList("unreadable AudioSet files", digest, len(unreadable), unreadable, frozenset())]
        for folder in ("blacklist", "json_files/blacklist"):
            path = self.root / folder / DEFAULT_BLACKLIST
            if path.is_file():
                logger.info("applying %s: clips of the AudioCaps and Clotho test sets are left out", path)
                return [*lists, read_exclusions(path)]
        logger.warning(
            "no blacklist/%s in %s: the shards may hold clips of the AudioCaps and Clotho test sets",
            DEFAULT_BLACKLIST,
            self.root,
        )
        return lists


def _source_of(folder: str) -> str | None:
    name = folder.lower()
    for extension in SOURCE_EXTENSIONS:
        name = name.removesuffix("_" + extension[1:])
    return next((source for source, names in SOURCES.items() if name in names), None)


def _json_files(root: Path, source: str) -> list[Path]:
    parents = [parent for parent in (root / "json_files", root) if parent.is_dir()]
    folders = [f for parent in parents for f in sorted(parent.iterdir()) if f.is_dir() and _source_of(f.name) == source]
    return [path for folder in folders for path in sorted(folder.glob("*.json"))]


def _audio_folders(root: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {source: [] for source in SOURCES}
    for parent, folders, _ in os.walk(root, followlinks=True):
        for name in sorted(folders):
            source = _source_of(name)
            if source is not None:
                found[source].append(Path(parent) / name)
        folders[:] = sorted(name for name in folders if _source_of(name) is None)
    return found


def _read_json(path: Path) -> list[dict[str, Any]]:
    payload = path.read_bytes()
    if payload.startswith(b"version https://git-lfs"):
        raise UserError(
            f"{path} is a git-LFS pointer, not the data: download the file from huggingface.co/datasets/cvssp/WavCaps"
        )
    try:
        rows: list[dict[str, Any]] = json.loads(payload)["data"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a WavCaps JSON ({error!r}): download it again") from None
    return rows


def _clip(path: Path, source: str, row: dict[str, Any], split: str) -> Clip:
    try:
        native, caption = str(row["id"]).strip(), str(row["caption"])
    except (KeyError, TypeError):
        raise UserError(f"{path}: an entry has no id or caption: download it again") from None
    meta: dict[str, Any] = {"source": source, **{k: row[k] for k in ("title", "href") if row.get(k)}}
    clip_id = f"wavcaps/{source}/{native}"
    if source == "audioset":
        meta["youtube_id"] = youtube_id(native.removesuffix(".wav"))
        clip_id = audioset_clip_id(meta["youtube_id"])
    elif source == "freesound":
        meta["sound_id"] = native
    return Clip(clip_id, clean_captions([caption]), split, meta=meta)


def _read_blacklist(text: str) -> ExcludedIds | None:
    """Keys AudioSet (file names `Y<youtube id>.wav`) and FreeSound (ids)."""
    try:
        lists = json.loads(text)
        youtube = [youtube_id(name) for name in lists.get("AudioSet", [])]
        sound = [str(name) for name in lists.get("FreeSound", [])]
    except (ValueError, AttributeError, TypeError):
        return None
    return ExcludedIds(youtube, sound) if youtube or sound else None


EXCLUSION_FORMATS["a WavCaps blacklist (JSON with lists AudioSet and FreeSound)"] = _read_blacklist
