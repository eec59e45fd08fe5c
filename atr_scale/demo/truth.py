"""The true correspondence of every caption with every clip, written beside the corpora."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from atr_scale.demo.clips import DemoClip
from atr_scale.demo.scenes import WEIGHTS, Content, correspondence_matrix
from atr_scale.errors import UserError

_GRADES, _CONTENTS = "correspondences.npz", "correspondences.json"


@dataclass(frozen=True)
class Correspondences:
    """Grades in [0, 1] of one split's captions and clips; 1: everything the caption says is true of the clip."""

    caption_ids: list[tuple[str, int]]  # (clip_id, caption index) of each row
    clip_ids: list[str]  # of each column
    grades: np.ndarray  # float32 [captions, clips]


def write_correspondences(out: Path, clips: Sequence[DemoClip]) -> None:
    """Write `correspondences.npz` ("corpus/split" -> float16 [captions, clips]) and `correspondences.json` (rows,
    columns, what each caption states and what each clip holds)."""
    grades: dict[str, np.ndarray] = {}
    splits: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for name in dict.fromkeys(clip.name for clip in clips):
        members = [clip for clip in clips if clip.name == name]
        captions = [(clip, k, caption) for clip in members for k, caption in enumerate(clip.captions)]
        grades[name] = correspondence_matrix(
            [caption.states for _, _, caption in captions], [clip.scene.content for clip in members]
        ).astype(np.float16)  # fine enough to keep 1 apart from anything less
        splits[name] = {
            "clips": [{"clip_id": clip.clip_id, **_plain(clip.scene.content)} for clip in members],
            "captions": [
                {"clip_id": clip.clip_id, "caption_index": k, "text": caption.text, **_plain(caption.states)}
                for clip, k, caption in captions
            ],
        }
    np.savez_compressed(out / _GRADES, **grades)  # type: ignore[arg-type]
    (out / _CONTENTS).write_text(json.dumps({"weights": WEIGHTS, "splits": splits}) + "\n", encoding="utf-8")


def read_correspondences(folder: Path, name: str) -> Correspondences:
    """The grades of the split `name` ("audiocaps/test") of the demo corpora in `folder`.

    Raises UserError where the folder holds no correspondences or no such split.
    """
    try:
        splits = json.loads((folder / _CONTENTS).read_text(encoding="utf-8"))["splits"]
    except FileNotFoundError:
        raise UserError(f"no {_CONTENTS} in {folder}: make the demo corpora with `atr-scale demo-data`") from None
    if name not in splits:
        raise UserError(f"no split {name!r} in {folder / _CONTENTS}: it has {', '.join(splits)}")
    with np.load(folder / _GRADES) as grades:
        return Correspondences(
            [(caption["clip_id"], caption["caption_index"]) for caption in splits[name]["captions"]],
            [clip["clip_id"] for clip in splits[name]["clips"]],
            grades[name].astype(np.float32),
        )


def _plain(content: Content) -> dict[str, Any]:
    """Sounds without what is not stated, and relations."""
    sounds = [{key: value for key, value in asdict(sound).items() if value is not None} for sound in content.sounds]
    return {"sounds": sounds, "relations": [list(relation) for relation in content.relations]}
