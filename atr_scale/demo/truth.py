"""What is true of the demo's clips: the grades of every caption and clip of a split, and what these grades stand on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from atr_scale.demo.clips import DemoClip
from atr_scale.demo.scenes import WEIGHTS, Content, correspondence_matrix

GRADES, CONTENTS = "relevance", "correspondences.json"


def write_truth(out: Path, clips: Sequence[DemoClip]) -> None:
    """Write `relevance/<corpus>-<split>.npz`, as evaluation reads it, and `correspondences.json`: for every split what
    each clip holds and what each caption states, in the order of the grades' columns and rows."""
    (out / GRADES).mkdir(exist_ok=True)
    splits: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for name in dict.fromkeys(clip.name for clip in clips):
        members = [clip for clip in clips if clip.name == name]
        captions = [(clip, k, caption) for clip in members for k, caption in enumerate(clip.captions)]
        grades = correspondence_matrix(
            [caption.states for _, _, caption in captions], [clip.scene.content for clip in members]
        )
        np.savez_compressed(
            out / GRADES / f"{name.replace('/', '-')}.npz",
            grades=grades.astype(np.float16),  # fine enough to keep 1 apart from anything less
            clip_ids=np.array([clip.clip_id for clip in members]),
            caption_clip=np.array([clip.clip_id for clip, _, _ in captions]),
            caption_index=np.array([k for _, k, _ in captions]),
        )
        splits[name] = {
            "clips": [{"clip_id": clip.clip_id, **_plain(clip.scene.content)} for clip in members],
            "captions": [
                {"clip_id": clip.clip_id, "caption_index": k, "text": caption.text, **_plain(caption.states)}
                for clip, k, caption in captions
            ],
        }
    (out / CONTENTS).write_text(json.dumps({"weights": WEIGHTS, "splits": splits}) + "\n", encoding="utf-8")


def _plain(content: Content) -> dict[str, Any]:
    """Sounds without what is not stated, and relations."""
    sounds = [{key: value for key, value in asdict(sound).items() if value is not None} for sound in content.sounds]
    return {"sounds": sounds, "relations": [list(relation) for relation in content.relations]}
