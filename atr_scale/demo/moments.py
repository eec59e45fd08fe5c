"""The demo's ground truth in time: when the sounds of every clip are heard, as queries with their windows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from atr_scale.demo.captions import describe_sound
from atr_scale.demo.clips import DemoClip

MOMENTS = "moments"
_OF_MOMENTS = 17  # in the seeds of the queries: they have numbers of their own, and change no audio and no caption


def write_moments(out: Path, clips: Sequence[DemoClip]) -> None:
    """Write `moments/<corpus>-<split>.jsonl`, which `atr-scale evaluate --moments` reads.

    A row is a sound that does not last for the whole clip. Its query describes this sound alone, in the words of the
    captions; no other sound of the clip has its class. Its window is the time from the sound's begin to its end.
    """
    (out / MOMENTS).mkdir(exist_ok=True)
    for name in dict.fromkeys(clip.name for clip in clips):
        rows = (row for clip in clips if clip.name == name for row in _rows(clip))
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (out / MOMENTS / f"{name.replace('/', '-')}.jsonl").write_text(text, encoding="utf-8")


def _rows(clip: DemoClip) -> Iterator[dict[str, Any]]:
    scene = clip.scene
    for k, event in enumerate(scene.events):
        window = [round(event.onset, 3), round(min(event.onset + event.seconds, scene.seconds), 3)]
        yield {
            "qid": f"{clip.clip_id}#{k + 1}",
            "query": describe_sound(np.random.default_rng([scene.seed, k, _OF_MOMENTS]), event.sound),
            "vid": clip.clip_id,
            "path": str(PurePosixPath("..") / clip.path),
            "duration": scene.seconds,
            "relevant_windows": [window],
        }
