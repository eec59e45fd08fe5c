"""Overlap lists: clips that must not be trained on because an evaluation set holds them.

Two formats: WavCaps' blacklists (JSON with keys AudioSet: file names `Y<youtube id>.wav`, and FreeSound: ids) and
DCASE's list (CSV with a column sound_id of Freesound ids).
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atr_scale.errors import UserError


@dataclass(frozen=True)
class ExclusionList:
    """Ids as strings: numbers would compare unequal to the ids of the metadata and exclude nothing.

    `entries` counts distinct ids (the published lists repeat some).
    """

    name: str
    sha256: str
    entries: int
    youtube_ids: frozenset[str]
    sound_ids: frozenset[str]

    def covers(self, meta: Mapping[str, Any]) -> bool:
        """Whether a clip with this metadata (`youtube_id`, `sound_id`) is on the list."""
        return meta.get("youtube_id") in self.youtube_ids or meta.get("sound_id") in self.sound_ids


def read_exclusions(path: Path) -> ExclusionList:
    """Read a list of either format. UserError where it is neither."""
    try:
        payload = path.read_bytes()
        text = payload.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the exclusion list {path}: {error}") from None
    if path.suffix.lower() == ".csv":
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
        if not rows or "sound_id" not in rows[0]:
            raise UserError(f"{path} has no column sound_id: give DCASE's CSV or a WavCaps blacklist (JSON)")
        youtube: list[str] = []
        sound = [row["sound_id"].strip() for row in rows]
    else:
        try:
            lists = json.loads(text)
            youtube = [youtube_id(name) for name in lists.get("AudioSet", [])]
            sound = [str(name) for name in lists.get("FreeSound", [])]
        except (ValueError, AttributeError, TypeError) as error:
            raise UserError(f"{path} is no WavCaps blacklist ({error}): expected keys AudioSet and FreeSound") from None
        if not youtube and not sound:
            raise UserError(f"{path} lists nothing under AudioSet or FreeSound: is it a WavCaps blacklist?")
    ids = frozenset(youtube), frozenset(sound)
    return ExclusionList(path.name, hashlib.sha256(payload).hexdigest(), len(ids[0]) + len(ids[1]), *ids)


def youtube_id(name: str) -> str:
    """The YouTube id in an AudioSet file name: `Yr1nicOVtvkQ.wav` -> `r1nicOVtvkQ`."""
    return name.rsplit(".", 1)[0].removeprefix("Y") if "." in name else name.removeprefix("Y")
