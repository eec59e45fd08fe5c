"""The demo corpora of the study: clips, captions, and the relevance of each caption for each clip."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor

from atr_scale.demo.captions import DemoCaption, write_captions
from atr_scale.demo.clips import DemoClip, Sizes, plan_clips
from atr_scale.demo.scenes import correspondence_matrix
from atr_scale.errors import UserError

TRAINING = {"audiocaps": "audiocaps/train", "clotho": "clotho/development", "wavcaps": "wavcaps/train"}
TESTS = {"audiocaps": "audiocaps/test", "clotho": "clotho/evaluation"}
VALIDATION = "audiocaps/val"
SAMPLE_RATE = 16_000


@dataclass(frozen=True)
class Split:
    """Clips of demo corpora in `folder`, each with at least one caption."""

    folder: Path
    clips: tuple[DemoClip, ...]

    @cached_property
    def captions(self) -> list[DemoCaption]:
        """All captions; those of a clip follow one another."""
        return [caption for clip in self.clips for caption in clip.captions]

    @cached_property
    def owner(self) -> Tensor:
        """The clip of each caption, int64 [captions]."""
        return torch.tensor([k for k, clip in enumerate(self.clips) for _ in clip.captions])

    @cached_property
    def grades(self) -> np.ndarray:
        """Relevance of clips for captions, float32 [captions, clips]; 1 if all statements of the caption are true."""
        return correspondence_matrix(
            [caption.states for caption in self.captions], [clip.scene.content for clip in self.clips]
        )

    def seconds(self, clip: int) -> float:
        return self.clips[clip].scene.seconds

    def waveform(self, clip: int, start: int = 0, samples: int = -1) -> Tensor:
        """Samples of a clip, float32 [samples] at SAMPLE_RATE."""
        values, _ = soundfile.read(self.folder / self.clips[clip].path, samples, start, dtype="float32")
        return torch.from_numpy(values)

    def with_more_captions(self, count: int, seed: int = 0) -> Split:
        """The split with `count` further captions of its scene for every clip."""

        def more(number: int, clip: DemoClip) -> DemoClip:
            rng = np.random.default_rng([seed, number])
            written = write_captions(rng, clip.scene, len(clip.captions) + count)
            known = {caption.text for caption in clip.captions}
            new = [caption for caption in written if caption.text not in known][:count]
            return replace(clip, captions=(*clip.captions, *new))

        return Split(self.folder, tuple(more(number, clip) for number, clip in enumerate(self.clips)))


@dataclass(frozen=True)
class Demo:
    """training: clips of the training splits, without the clips of WavCaps that are also in another corpus."""

    training: Split
    validation: Split
    tests: dict[str, Split]

    def of(self, corpora: tuple[str, ...]) -> Split:
        """The training clips of some corpora."""
        return Split(self.training.folder, tuple(clip for clip in self.training.clips if clip.corpus in corpora))


def read_demo(folder: Path) -> Demo:
    """Read the finished demo corpora in `folder`. Raises UserError if there are none."""
    try:
        made_with = json.loads((folder / "demo.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no demo corpora in {folder}: make them with `atr-scale demo-data --out {folder}`") from None
    if not made_with["complete"] or made_with["sample_rate"] != SAMPLE_RATE:
        raise UserError(
            f"the demo corpora in {folder} are unfinished or not at {SAMPLE_RATE} Hz: make them anew with"
            " `atr-scale demo-data`"
        )
    clips = plan_clips(made_with["seed"], Sizes(**made_with["sizes"]))
    elsewhere = {clip.scene for clip in clips if clip.corpus != "wavcaps"}

    def split(*names: str) -> Split:
        chosen = (clip for clip in clips if clip.name in names)
        return Split(folder, tuple(c for c in chosen if c.corpus != "wavcaps" or c.scene not in elsewhere))

    return Demo(split(*TRAINING.values()), split(VALIDATION), {name: split(place) for name, place in TESTS.items()})
