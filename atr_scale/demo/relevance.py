"""The demo's ground truth: how relevant every clip is to every caption, computed from their contents."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from atr_scale.demo.clips import DemoClip
from atr_scale.demo.events import EVENTS, LOUDNESS, PITCHES
from atr_scale.demo.scenes import SEVERAL, Content

GRADES, CONTENTS = "relevance", "contents.json"
# Weights of the stated facts: the presence of a sound counts most, its attributes least.
WEIGHTS = {"presence": 3.0, "relation": 2.0, "pitch": 1.0, "loudness": 1.0, "count": 1.0, "background": 1.0}
_LABELS = {label: k for k, label in enumerate(EVENTS)}
_PITCH = {pitch: k for k, pitch in enumerate(PITCHES)}
_LOUDNESS = {loudness: k for k, loudness in enumerate(LOUDNESS)}
_BEFORE, _WHILE = 1, 2


def relevance(caption: Content, clip: Content) -> float:
    """The relevance of `clip` to `caption`: the weighted fraction, in [0, 1], of the stated facts that are true of it.

    The grade is 1 exactly if every stated fact is true. A caption that mentions only a part of a scene is fully
    relevant to each clip with that part, so a vague caption has many relevant clips. It is 0 if the clip has none of
    the caption's sounds.

    Facts and weights (`WEIGHTS`): the presence of each sound; its pitch (a neighbouring one is half true); its
    loudness; its count (1 - |stated - true| / the larger one; "several" is fully true from three on); whether it is in
    the background; each relation in time. A fact about an absent sound is false. Correcting a false stated fact, or
    stating one more true fact, never lowers the grade. The grade is not symmetric: it does not depend on what the
    caption leaves out.
    """
    return float(relevance_matrix([caption], [clip])[0, 0])


def relevance_matrix(captions: Sequence[Content], clips: Sequence[Content]) -> np.ndarray:
    """`relevance` of every caption with every clip: float32 [captions, clips]."""
    table = _ClipTable(clips)
    return np.stack([table.grades(caption) for caption in captions]).astype(np.float32)


class _ClipTable:
    """Contents of clips as arrays [clips, classes], so that a caption is graded for all clips at once."""

    def __init__(self, clips: Sequence[Content]) -> None:
        shape = (len(clips), len(_LABELS))
        self.present = np.zeros(shape, bool)
        self.pitch, self.loudness, self.count = (np.full(shape, -9, np.int64) for _ in range(3))
        self.background = np.zeros(shape, bool)
        self.relation = np.zeros((*shape, shape[1]), np.int8)
        for row, clip in enumerate(clips):
            for sound in clip.sounds:
                at = row, _LABELS[sound.label]
                self.present[at] = True
                self.background[at] = bool(sound.background)
                if sound.pitch is not None:
                    self.pitch[at] = _PITCH[sound.pitch]
                if sound.loudness is not None:
                    self.loudness[at] = _LOUDNESS[sound.loudness]
                if sound.count is not None:
                    self.count[at] = 3 if sound.count == SEVERAL else sound.count
            for first, second, kind in clip.relations:
                a, b = _LABELS[first], _LABELS[second]
                self.relation[row, a, b] = _BEFORE if kind == "before" else _WHILE
                if kind == "while":
                    self.relation[row, b, a] = _WHILE

    def grades(self, caption: Content) -> np.ndarray:
        """The relevance of every clip to `caption`: float64 [clips]."""
        truths: list[tuple[str, np.ndarray]] = []
        for sound in caption.sounds:
            k = _LABELS[sound.label]
            here = self.present[:, k]
            truths.append(("presence", here))
            if sound.pitch is not None:
                distance = np.abs(self.pitch[:, k] - _PITCH[sound.pitch])
                truths.append(("pitch", here * np.clip(1 - distance / 2, 0, 1)))
            if sound.loudness is not None:
                truths.append(("loudness", here & (self.loudness[:, k] == _LOUDNESS[sound.loudness])))
            if sound.count is not None:
                truths.append(("count", here * _count_truth(sound.count, self.count[:, k])))
            if sound.background is not None:
                truths.append(("background", here & (self.background[:, k] == sound.background)))
        for first, second, kind in caption.relations:
            found = self.relation[:, _LABELS[first], _LABELS[second]]
            truths.append(("relation", found == (_BEFORE if kind == "before" else _WHILE)))
        weights = np.array([WEIGHTS[fact] for fact, _ in truths])
        grades: np.ndarray = weights @ np.stack([truth for _, truth in truths]).astype(np.float64) / weights.sum()
        return grades


def _count_truth(stated: int | str, true: np.ndarray) -> np.ndarray:
    """Grades in [0, 1] of a stated count for clips with the counts `true` [clips]; -9 there means no count."""
    counts: np.ndarray = np.maximum(true, 0)
    if isinstance(stated, str):
        grades: np.ndarray = np.minimum(1.0, counts / 3)
    else:
        grades = 1 - np.abs(stated - counts) / np.maximum(stated, counts)
    return grades


def write_relevance(out: Path, clips: Sequence[DemoClip]) -> None:
    """Write `relevance/<corpus>-<split>.npz`, which evaluation reads, and `contents.json`.

    The latter has the content of every clip and of every caption of each split, in the order of the grades' columns and
    rows.
    """
    (out / GRADES).mkdir(exist_ok=True)
    splits: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for name in dict.fromkeys(clip.name for clip in clips):
        members = [clip for clip in clips if clip.name == name]
        captions = [(clip, k, caption) for clip in members for k, caption in enumerate(clip.captions)]
        grades = relevance_matrix(
            [caption.states for _, _, caption in captions], [clip.scene.content for clip in members]
        )
        np.savez_compressed(
            out / GRADES / f"{name.replace('/', '-')}.npz",
            grades=grades.astype(np.float16),  # precise enough to distinguish 1 from any lower grade
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
    """Sounds with their stated attributes, and relations."""
    sounds = [{key: value for key, value in asdict(sound).items() if value is not None} for sound in content.sounds]
    return {"sounds": sounds, "relations": [list(relation) for relation in content.relations]}
