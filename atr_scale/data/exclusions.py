"""Exclusion lists: clips that must not be trained on because an evaluation set contains them."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from atr_scale.data.values import id_text
from atr_scale.errors import UserError


@dataclass(frozen=True)
class ExclusionList:
    """An exclusion list, with ids as strings, also if they were written as 7 or 7.0.

    name and sha256: of its file. entries: distinct ids (the published lists repeat some).
    """

    name: str
    sha256: str
    entries: int
    youtube_ids: frozenset[str]
    sound_ids: frozenset[str]

    def covers(self, meta: Mapping[str, Any]) -> bool:
        """Whether a clip with this metadata (`youtube_id`, `sound_id`) is on the list."""
        youtube, sound = (id_text(meta.get(name)) for name in ("youtube_id", "sound_id"))
        return youtube in self.youtube_ids or sound in self.sound_ids


class ExcludedIds(NamedTuple):
    """YouTube and Freesound ids of an exclusion list."""

    youtube: Iterable[str]
    sound: Iterable[str]


def _read_sound_ids(text: str) -> ExcludedIds | None:
    """The column sound_id of a CSV file, the format of DCASE's list."""
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
    except csv.Error:
        return None
    if not rows or "sound_id" not in rows[0]:
        return None
    return ExcludedIds([], list(filter(None, (id_text(row["sound_id"]) for row in rows))))


# Description of a format -> its reader, which returns None for a text in another format. A corpus adds its own format.
EXCLUSION_FORMATS: dict[str, Callable[[str], ExcludedIds | None]] = {
    "DCASE's list (CSV with a column sound_id)": _read_sound_ids,
}


def read_exclusions(path: Path) -> ExclusionList:
    """Read a list of any format in EXCLUSION_FORMATS. Raises UserError if the file has none of them."""
    try:
        payload = path.read_bytes()
        text = payload.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the exclusion list {path}: {error}") from None
    found = next((ids for read in EXCLUSION_FORMATS.values() if (ids := read(text)) is not None), None)
    if found is None:
        raise UserError(f"{path} is not an exclusion list: give {', or '.join(EXCLUSION_FORMATS)}")
    youtube, sound = frozenset(found.youtube), frozenset(found.sound)
    if not youtube and not sound:
        raise UserError(f"the exclusion list {path} has no ids: download it again")
    return ExclusionList(path.name, hashlib.sha256(payload).hexdigest(), len(youtube) + len(sound), youtube, sound)
