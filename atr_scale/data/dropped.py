"""Clips that a build leaves out: the first of each reason are named in the log, all of them in dropped.jsonl."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from atr_scale.data import storage
from atr_scale.data.values import valid_unicode
from atr_scale.run_files import DROPPED

logger = logging.getLogger(__name__)

SHOWN = 20  # of each reason in the log


@dataclass(frozen=True)
class DroppedClip:
    """A clip, or a row of a table, that a build leaves out.

    clip_id: empty for a row that is not a clip. path: its audio file, or the file and the line of the row.
    """

    clip_id: str
    path: str
    reason: str
    detail: str


class DropLog:
    """A log of dropped clips that names the first SHOWN of each reason. file: where all of them will be named."""

    def __init__(self, file: str = DROPPED) -> None:
        self._counts: Counter[str] = Counter()
        self._file = file

    def add(self, clips: Iterable[DroppedClip]) -> None:
        for clip in clips:
            self._counts[clip.reason] += 1
            if self._counts[clip.reason] <= SHOWN:
                name = clip.clip_id + (f" ({clip.path})" if clip.path else "") if clip.clip_id else clip.path
                logger.warning("%s left out: %s%s", name, clip.reason, f": {clip.detail}" if clip.detail else "")
            elif self._counts[clip.reason] == SHOWN + 1:
                logger.warning("more clips are left out for %s: %s names all of them", clip.reason, self._file)


def write_dropped(location: str, clips: Sequence[DroppedClip], name: str = DROPPED) -> None:
    """Write dropped.jsonl beside the shards, or remove it if no clip was dropped. name: another name of the file."""
    path = storage.join(location, name)
    if clips:
        lines = (json.dumps(valid_unicode(asdict(clip)), ensure_ascii=False) + "\n" for clip in clips)
        storage.write_bytes(path, "".join(lines).encode())
    else:
        storage.remove_file(path)
