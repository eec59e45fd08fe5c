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

from atr_scale.data.corpora.audio_files import SOURCE_EXTENSIONS, AudioFiles, walk_audio
from atr_scale.data.corpora.corpus import Clip, Corpus
from atr_scale.data.corpora.files import audioset_clip_id, youtube_id
from atr_scale.data.exclusions import EXCLUSION_FORMATS, ExcludedIds, ExclusionList, read_exclusions
from atr_scale.data.sample import clean_captions
from atr_scale.data.values import caption_texts, id_text, json_type, load_json
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
                for number, row in enumerate(_read_json(path)):
                    try:
                        clip = _clip(source, row, split)
                    except ValueError as error:
                        self.reject(f"{path}, data[{number}]", str(error))
                    else:
                        clips.setdefault(clip.clip_id, clip)
            counts[source] = len(clips) - before
        if not clips:
            faults = "".join(f"; {place}: {detail}" for place, detail in list(self.bad_rows.items())[:1])
            expected = "expected json_files/<Source>/*.json or <Source>/*.json with entries"
            raise UserError(f"no entry of a WavCaps JSON in {self.root}: {expected}{faults}")
        logger.info("wavcaps: %s", ", ".join(f"{source} {count}" for source, count in counts.items()))
        return list(clips.values())

    def find_audio(self, split: str, clips: list[Clip]) -> list[str]:
        """`<id>` with any audio extension, below any folder named after the clip's source."""
        files = {
            source: AudioFiles(walk_audio(folders), ignore_case=source != "audioset")  # ids of YouTube have a case
            for source, folders in _audio_folders(self.root).items()
        }

        def find(clip: Clip) -> str:
            source, video = clip.meta["source"], clip.meta.get("youtube_id")
            names = [f"Y{video}", video] if video else [clip.clip_id.split("/", 2)[2]]
            path = files[source].find(names)
            if not path:
                self.missing[clip.clip_id] = files[source].explain(names)
            return path

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


def _read_json(path: Path) -> list[Any]:
    payload = path.read_bytes()
    if payload.startswith(b"version https://git-lfs"):
        raise UserError(
            f"{path} is a git-LFS pointer, not the data: download the file from huggingface.co/datasets/cvssp/WavCaps"
        )
    try:
        content = load_json(payload)
    except ValueError as error:
        raise UserError(f"{path} is not a WavCaps JSON ({error}): download it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is {json_type(content)}, not an object with a list `data`: download it again")
    rows = content.get("data", ())
    if not isinstance(rows, list):
        found = json_type(rows) if "data" in content else "missing"
        raise UserError(f"{path}: `data` is {found}, not a list of entries: download it again")
    return rows


def _clip(source: str, row: Any, split: str) -> Clip:
    """The clip of an entry. Raises ValueError if it cannot be used."""
    if not isinstance(row, dict):
        raise ValueError(f"{json_type(row)}, not an object")
    native = id_text(row.get("id"))
    if not native:
        raise ValueError(f"its id is {json_type(row['id']) if row.get('id', '') != '' else 'missing'}")
    if "caption" not in row:
        raise ValueError("it has no caption")
    captions = clean_captions(caption_texts(row["caption"]))
    texts = {name: row[name] for name in ("title", "href") if row.get(name) and isinstance(row[name], str | int)}
    meta: dict[str, Any] = {"source": source, **texts}
    clip_id = f"wavcaps/{source}/{native}"
    if source == "audioset":
        meta["youtube_id"] = youtube_id(native.removesuffix(".wav"))
        clip_id = audioset_clip_id(meta["youtube_id"])
    elif source == "freesound":
        meta["sound_id"] = native
    return Clip(clip_id, captions, split, meta=meta)


def _read_blacklist(text: str) -> ExcludedIds | None:
    """Keys AudioSet (file names `Y<youtube id>.wav`) and FreeSound (ids)."""
    try:
        lists = json.loads(text)
        names, ids = ([id_text(entry) for entry in lists.get(key, [])] for key in ("AudioSet", "FreeSound"))
    except (ValueError, AttributeError, TypeError, RecursionError):
        return None
    return ExcludedIds([youtube_id(name) for name in names if name], list(filter(None, ids))) if names or ids else None


EXCLUSION_FORMATS["a WavCaps blacklist (JSON with lists AudioSet and FreeSound)"] = _read_blacklist
