"""Scenes: what is heard, when, and how well a caption's content corresponds to a clip's.

`Content` is the common currency: the sounds with whatever is known or stated of each, and how they lie in time. A
scene's content knows everything; a caption's states some of it.
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
    """One sound. None: not stated. `count` is None for sustained classes; `background`: beneath the whole clip."""

    label: str
    pitch: str | None = None
    loudness: str | None = None
    count: int | Literal["several"] | None = None
    background: bool | None = None


@dataclass(frozen=True)
class Content:
    """Sounds of distinct classes, and relations (first label, second label, "before" | "while") between events.

    "before": the first ends before the second begins. "while": they overlap. The background has no relations.
    """

    sounds: tuple[Sound, ...]
    relations: tuple[tuple[str, str, Relation], ...] = ()

    def __post_init__(self) -> None:
        labels = {sound.label for sound in self.sounds}
        assert len(labels) == len(self.sounds), "the sounds of one content are of distinct classes"
        assert all({first, second} <= labels for first, second, _ in self.relations)


@dataclass(frozen=True)
class Event:
    """A sound with its place in time (seconds)."""

    sound: Sound
    onset: float
    seconds: float


@dataclass(frozen=True)
class Scene:
    """A clip before it is rendered: events in order of groups, an optional background, a seed for the sound itself."""

    seconds: float
    events: tuple[Event, ...]
    background: Sound | None
    seed: int

    @property
    def content(self) -> Content:
        """Everything that is true of the clip."""
        relations: list[tuple[str, str, Relation]] = []
        for i, first in enumerate(self.events):
            for second in self.events[i + 1 :]:
                apart = first.onset + first.seconds <= second.onset
                relations.append((first.sound.label, second.sound.label, "before" if apart else "while"))
        sounds = tuple(event.sound for event in self.events)
        return Content(sounds + ((self.background,) if self.background else ()), tuple(relations))

    @property
    def signature(self) -> str:
        """Equal exactly for scenes with the same content, whatever their timing to the second."""
        content = self.content
        sounds = sorted(repr(sound) for sound in content.sounds)
        relations = sorted((*(sorted((a, b)) if kind == "while" else (a, b)), kind) for a, b, kind in content.relations)
        return repr((sounds, relations))


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """One of `options`, each as likely as the others."""
    return options[int(rng.integers(len(options)))]


def draw_scene(rng: np.random.Generator, seconds: float = 10.0) -> Scene:
    """A random scene of `seconds` (>= 3.5): one to four events, mostly two or three, half of them over a background."""
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
        heard = synthesise(
            np.random.default_rng([scene.seed, len(scene.events), k]),
            sound.label,
            sample_rate,
            pitch=str(sound.pitch),
            level=LOUDNESS[str(sound.loudness)],
            count=sound.count if isinstance(sound.count, int) else 0,
            seconds=event.seconds,
        )
        out[start : start + len(heard)] += heard[: samples - start]
    return np.tanh(out, out=out)  # a limiter: nearly linear at the levels used, and never clips


# Weights of the stated facts; the presence of a sound counts most, its attributes least.
WEIGHTS = {"presence": 3.0, "relation": 2.0, "pitch": 1.0, "loudness": 1.0, "count": 1.0, "background": 1.0}
_LABELS = {label: k for k, label in enumerate(EVENTS)}
_PITCH = {pitch: k for k, pitch in enumerate(PITCHES)}
_LOUDNESS = {loudness: k for k, loudness in enumerate(LOUDNESS)}
_BEFORE, _WHILE = 1, 2


def correspondence(caption: Content, clip: Content) -> float:
    """How far what `caption` states is true of `clip`, in [0, 1]: the weighted share of its stated facts that hold.

    1 exactly where every stated fact holds: a caption that mentions only a part of a scene corresponds fully to each
    clip in which that part is heard, so a vague caption has many clips. 0 where none of its sounds is heard. Facts and
    weights (`WEIGHTS`): each sound's presence; its pitch (a step away is half true), its loudness, its count (1 -
    |stated - heard| / the larger; "several" is fully true from three on), its being background; each relation in time.
    A fact about an absent sound is false. Making a false stated fact true, or stating one more true fact, never lowers
    the grade. Not symmetric: it asks what the caption says, not what it leaves out.
    """
    return float(correspondence_matrix([caption], [clip])[0, 0])


def correspondence_matrix(captions: Sequence[Content], clips: Sequence[Content]) -> np.ndarray:
    """`correspondence` of every caption with every clip: float32 [captions, clips]."""
    table = _ClipTable(clips)
    return np.stack([table.grades(caption) for caption in captions]).astype(np.float32)


class _ClipTable:
    """Contents as arrays [clips, classes], so that a caption is graded against all clips at once."""

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
            heard = self.relation[:, _LABELS[first], _LABELS[second]]
            truths.append(("relation", heard == (_BEFORE if kind == "before" else _WHILE)))
        weights = np.array([WEIGHTS[fact] for fact, _ in truths])
        return weights @ np.stack([truth for _, truth in truths]).astype(np.float64) / weights.sum()


def _count_truth(stated: int | str, heard: np.ndarray) -> np.ndarray:
    heard = np.maximum(heard, 0)
    if isinstance(stated, str):
        return np.minimum(1.0, heard / 3)
    return 1 - np.abs(stated - heard) / np.maximum(stated, heard)


def _draw_group(rng: np.random.Generator, size: int, start: float, room: float, used: set[str]) -> list[Event]:
    """One event, or two that overlap: the first then is sustained and the second lies within it."""
    events: list[Event] = []
    for k in range(size):
        sustained_only = size == 2 and k == 0
        choices = [c for c in EVENTS if c not in used and not (sustained_only and EVENTS[c].discrete)]
        label = pick(rng, choices)
        used.add(label)
        pitch = pick(rng, list(PITCHES))
        # A soft sound would drown in a loud one.
        loud = rng.random() < 0.55 or (k == 1 and events[0].sound.loudness == "loud")
        loudness = "loud" if loud else "soft"
        event = EVENTS[label]
        if event.discrete:
            count = int(rng.integers(1, event.max_count + 1))
            seconds = event.seconds(count)
        else:
            count, seconds = None, min(room, rng.uniform(2.4, 3.2) * max(1.0, room / 4))
        if sustained_only:
            seconds = room
        if k == 1 and not event.discrete:
            seconds = min(seconds, 0.8 * room)
        onset = start + rng.uniform(0, max(0.0, room - seconds))
        events.append(Event(Sound(label, pitch, loudness, count, background=False), onset, seconds))
    return events
