"""Scenes: which sounds occur when, and the clip that is rendered from that.

`Content` describes clips and captions alike: sounds with their attributes, and their relations in time. The content of
a scene is complete; that of a caption has the facts that its text states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeVar

import numpy as np

from atr_scale.demo.events import BACKGROUND_LOUDNESS, BACKGROUNDS, EVENTS, LOUDNESS, PITCHES, synthesise

Relation = Literal["before", "while"]
T = TypeVar("T")
SEVERAL: Final = "several"  # a stated count: three or more

NOISE_FLOOR = 1e-3  # peak to peak
_LAYOUTS: dict[int, tuple[tuple[int, ...], ...]] = {
    1: ((1,),),
    2: ((1, 1), (1, 1), (2,)),
    3: ((1, 1, 1), (1, 1, 1), (2, 1), (1, 2)),
    4: ((1, 1, 2), (1, 2, 1), (2, 1, 1), (2, 2)),
}
_NUM_EVENTS = (0.1, 0.52, 0.88)  # cumulative probability of one, two, three events
_SLOT = 3.3  # seconds: the longest discrete event, and a pause
_PAUSE = 0.1


@dataclass(frozen=True)
class Sound:
    """One sound. None: not stated, or without a count (sustained classes). background: lasts for the whole clip."""

    label: str
    pitch: str | None = None
    loudness: str | None = None
    count: int | Literal["several"] | None = None
    background: bool | None = None


@dataclass(frozen=True)
class Content:
    """Sounds of distinct classes, and relations in time (first label, second label, "before" | "while") between them.

    "before": the first ends before the second begins. "while": they overlap. The background has no relations.
    """

    sounds: tuple[Sound, ...]
    relations: tuple[tuple[str, str, Relation], ...] = ()

    def __post_init__(self) -> None:
        labels = {sound.label for sound in self.sounds}
        assert len(labels) == len(self.sounds), "two sounds of one class"
        assert all({first, second} <= labels for first, second, _ in self.relations)


@dataclass(frozen=True)
class Event:
    """A sound with its onset and length in seconds."""

    sound: Sound
    onset: float
    seconds: float


@dataclass(frozen=True)
class Scene:
    """A clip before it is rendered: events in order of time, an optional background, and the seed of the synthesis."""

    seconds: float
    events: tuple[Event, ...]
    background: Sound | None
    seed: int

    @property
    def content(self) -> Content:
        """All sounds of the clip and all their relations."""
        relations: list[tuple[str, str, Relation]] = []
        for i, first in enumerate(self.events):
            for second in self.events[i + 1 :]:
                apart = first.onset + first.seconds <= second.onset
                relations.append((first.sound.label, second.sound.label, "before" if apart else "while"))
        sounds = tuple(event.sound for event in self.events)
        return Content(sounds + ((self.background,) if self.background else ()), tuple(relations))

    @property
    def signature(self) -> str:
        """A text that two scenes share exactly if their content is the same; onsets do not matter."""
        content = self.content
        sounds = sorted(repr(sound) for sound in content.sounds)
        relations = sorted((*(sorted((a, b)) if kind == "while" else (a, b)), kind) for a, b, kind in content.relations)
        return repr((sounds, relations))


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """One of `options`, all equally likely."""
    return options[int(rng.integers(len(options)))]


def draw_scene(rng: np.random.Generator, seconds: float = 10.0) -> Scene:
    """A random scene of `seconds` (>= 3.5): one to four events, mostly two or three; half have a background."""
    most_groups = min(3, int(seconds // _SLOT))
    assert most_groups >= 1
    num_events = int(np.searchsorted(_NUM_EVENTS, rng.random())) + 1
    while not (layouts := [groups for groups in _LAYOUTS[num_events] if len(groups) <= most_groups]):
        num_events -= 1
    groups = pick(rng, layouts)

    background = None
    if rng.random() < 0.5:
        loudness = pick(rng, list(BACKGROUND_LOUDNESS))
        background = Sound(pick(rng, BACKGROUNDS), "mid", loudness, None, background=True)
    used = {background.label} if background else set()
    events: list[Event] = []
    slot = (seconds - _PAUSE) / len(groups)
    for k, size in enumerate(groups):
        events += _draw_group(rng, size, _PAUSE + k * slot, slot - _PAUSE, used)
    return Scene(seconds, tuple(events), background, int(rng.integers(2**31)))


def render(scene: Scene, sample_rate: int) -> np.ndarray:
    """The scene as float32 [samples] in [-1, 1], mono at `sample_rate` Hz; equal scenes give equal samples."""
    samples = round(scene.seconds * sample_rate)
    rng = np.random.default_rng([scene.seed, len(scene.events)])
    out = (rng.random(samples, np.float32) - np.float32(0.5)) * np.float32(NOISE_FLOOR)
    if scene.background:
        level = BACKGROUND_LOUDNESS[str(scene.background.loudness)]
        out += synthesise(rng, scene.background.label, sample_rate, level=level, seconds=scene.seconds)[:samples]
    for k, event in enumerate(scene.events):
        sound, start = event.sound, round(event.onset * sample_rate)
        waveform = synthesise(
            np.random.default_rng([scene.seed, len(scene.events), k]),
            sound.label,
            sample_rate,
            pitch=str(sound.pitch),
            level=LOUDNESS[str(sound.loudness)],
            count=sound.count if isinstance(sound.count, int) else 0,
            seconds=event.seconds,
        )
        out[start : start + len(waveform)] += waveform[: samples - start]
    np.tanh(out, out=out)  # a limiter: nearly linear at the levels used, and never clips
    return out


def _draw_group(rng: np.random.Generator, size: int, start: float, span: float, used: set[str]) -> list[Event]:
    """One event, or two that overlap: then the first is sustained and the second lies within it."""
    events: list[Event] = []
    for k in range(size):
        sustained_only = size == 2 and k == 0
        choices = [c for c in EVENTS if c not in used and not (sustained_only and EVENTS[c].discrete)]
        label = pick(rng, choices)
        used.add(label)
        pitch = pick(rng, list(PITCHES))
        # A soft sound would be masked by a loud one.
        loud = rng.random() < 0.55 or (k == 1 and events[0].sound.loudness == "loud")
        loudness = "loud" if loud else "soft"
        event = EVENTS[label]
        if event.discrete:
            count = int(rng.integers(1, event.max_count + 1))
            seconds = event.seconds(count)
        else:
            count, seconds = None, min(span, rng.uniform(2.4, 3.2) * max(1.0, span / 4))
        if sustained_only:
            seconds = span
        if k == 1 and not event.discrete:
            seconds = min(seconds, 0.8 * span)
        onset = start + rng.uniform(0, max(0.0, span - seconds))
        events.append(Event(Sound(label, pitch, loudness, count, background=False), onset, seconds))
    return events
