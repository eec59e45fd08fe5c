"""Captions of scenes from a small, varied grammar. A caption records exactly the facts that its text states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from atr_scale.demo.lexicon import (
    LEXICON,
    LOUDNESS_ADJECTIVES,
    LOUDNESS_ADVERBS,
    MANY,
    MANY_TIMES,
    NUMBERS,
    PITCH_ADJECTIVES,
    PITCH_PHRASES,
    TIMES,
)
from atr_scale.demo.scenes import Content, Relation, Scene, Sound, pick

# Probabilities that a caption states a fact; like human captions, it leaves some out.
P_PITCH = {"low": 0.65, "mid": 0.06, "high": 0.65}
P_LOUDNESS = 0.5
P_COUNT = {1: 0.3, 2: 0.75, 3: 0.75, 4: 0.75, 5: 0.75}
P_SEVERAL = 0.25
P_BACKGROUND = 0.75
P_LEAVE_ONE_OUT = 0.12
P_NO_ORDER = 0.1

# {a} and {b} are clauses ("a dog barks"), {A} and {B} are phrases ("a dog barking", "three barks").
_WHILE = (
    "{a} while {b}",
    "{a} as {b}",
    "{a} with {B}",
    "while {a}, {b}",
    "{a} over the sound of {B}",
    "{A} and {B} at the same time",
    "{A} together with {B}",
    "{a} during {B}",
)
_WHILE_WITHIN = (
    "{a} while {b}",
    "{a} as {b}",
    "{a} with {B}",
)  # within a sequence: unambiguous beside others
_BEFORE = (
    "{a}, then {b}",
    "{a} and then {b}",
    "{a} followed by {B}",
    "{A} followed by {B}",
    "{a}, and after that {b}",
    "{a} before {b}",
    "{b} after {a}",
    "after {A}, {b}",
    "first {a}, then {b}",
    "{A} and later {B}",
)
_CONTINUE = ("{x}, then {b}", "{x} and then {b}", "{x}, followed by {B}", "{x}, and after that {b}")
_FINISH = (*_CONTINUE, "{x}, and finally {b}", "{x}, with {B} at the end")
_NO_ORDER = ("{A}, {B}", "{A} and {B}", "{a} and {b}", "the sounds of {B} and {A}")
_BACKGROUND = (
    "{x} with {B} in the background",
    "{x}, {B} in the background",
    "{x} and {B} in the background",
    "in the background {b} and {x}",
    "{x} while {b} in the background",
    "{B} in the background, {x}",
)


@dataclass(frozen=True)
class DemoCaption:
    """A text and the facts that it states; its own scene has the relevance 1."""

    text: str
    states: Content


def write_captions(rng: np.random.Generator, scene: Scene, count: int) -> list[DemoCaption]:
    """`count` captions of `scene` with different texts."""
    captions: dict[str, DemoCaption] = {}
    while len(captions) < count:
        caption = write_caption(rng, scene)
        captions.setdefault(caption.text, caption)
    return list(captions.values())


def write_caption(rng: np.random.Generator, scene: Scene) -> DemoCaption:
    """One caption: usually all events with most of their attributes and their order."""
    kinds = {(first, second): kind for first, second, kind in scene.content.relations}
    events = [event.sound for event in scene.events]
    if len(events) > 2 and rng.random() < P_LEAVE_ONE_OUT:
        events.pop(rng.integers(len(events)))
    stated = [_state(rng, sound) for sound in events]
    clauses = [_Mention(rng, sound) for sound in stated]
    relations: list[tuple[str, str, Relation]] = []

    if len(events) == 2 and rng.random() < P_NO_ORDER:
        text = _fill(rng, _NO_ORDER, clauses[0], clauses[1])
    else:
        groups: list[list[int]] = []
        for k, sound in enumerate(events):
            if groups and kinds[events[groups[-1][-1]].label, sound.label] == "while":
                groups[-1].append(k)
            else:
                groups.append([k])
        text = _sequence(rng, [[clauses[k] for k in group] for group in groups])
        relations = [
            (first.label, second.label, kinds[first.label, second.label])
            for k, first in enumerate(events)
            for second in events[k + 1 :]
        ]
    if scene.background and rng.random() < P_BACKGROUND:
        loudness = scene.background.loudness if rng.random() < P_LOUDNESS else None
        background = replace(scene.background, pitch=None, loudness=loudness)
        stated.append(background)
        mention = _Mention(rng, background)
        text = pick(rng, _BACKGROUND).format(x=text, b=mention.clause, B=mention.phrase)
    if rng.random() < 0.6:
        text = text[0].upper() + text[1:]
    if rng.random() < 0.5:
        text += "."
    return DemoCaption(text, Content(tuple(stated), tuple(relations)))


def describe_sound(rng: np.random.Generator, sound: Sound) -> str:
    """A clause or a phrase about one sound of a scene, with most of its attributes."""
    return _sequence(rng, [[_Mention(rng, _state(rng, sound))]])


def _state(rng: np.random.Generator, sound: Sound) -> Sound:
    """The facts about an event that the caption will state."""
    pitch = sound.pitch if rng.random() < P_PITCH[str(sound.pitch)] else None
    loudness = sound.loudness if rng.random() < P_LOUDNESS else None
    if not isinstance(sound.count, int) or rng.random() >= P_COUNT[sound.count]:
        return Sound(sound.label, pitch, loudness)
    several = sound.count >= 3 and rng.random() < P_SEVERAL
    return Sound(sound.label, pitch, loudness, "several" if several else sound.count)


class _Mention:
    """One sound in words, as a clause ("a loud dog barks twice") and as a phrase ("two loud dog barks")."""

    def __init__(self, rng: np.random.Generator, sound: Sound) -> None:
        words = LEXICON[sound.label]
        determiner, _, subject = pick(rng, words.subjects).partition("|")
        third, participle = pick(rng, words.verbs)
        before, after = _attributes(rng, sound, adjectives=determiner != "-")
        noun_phrase = subject if determiner == "-" else _determine(determiner, [*before, subject])
        verb = f"is {participle}" if rng.random() < 0.35 and not third.startswith("is ") else third
        times = _times(rng, sound.count)
        self.clause = _join(noun_phrase, verb, after, times)
        noun = pick(rng, words.nouns)
        if rng.random() < 0.5 and (sound.count is not None or len(noun) == 1):
            before, after = _attributes(rng, sound, adjectives=True)
            self.phrase = _join(_counted(rng, before, noun, sound.count), after)
        else:  # a countable noun would state a count, so it is used only if there is one
            self.phrase = _join(noun_phrase, participle, after, times)


def _attributes(rng: np.random.Generator, sound: Sound, *, adjectives: bool) -> tuple[list[str], str]:
    """Pitch and loudness as adjectives before the noun, or as phrases after the verb."""
    before: list[str] = []
    after: list[str] = []
    if sound.loudness is not None:
        if adjectives and rng.random() < 0.65:
            before.append(pick(rng, LOUDNESS_ADJECTIVES[sound.loudness]))
        else:
            after.append(pick(rng, LOUDNESS_ADVERBS[sound.loudness]))
    if sound.pitch is not None:
        if adjectives and rng.random() < 0.75:
            before.append(pick(rng, PITCH_ADJECTIVES[sound.pitch]))
        else:
            after.append(pick(rng, PITCH_PHRASES[sound.pitch]))
    return before, " ".join(after)


def _times(rng: np.random.Generator, count: int | str | None) -> str:
    if count is None:
        return ""
    return pick(rng, TIMES[count] if isinstance(count, int) else MANY_TIMES)


def _counted(rng: np.random.Generator, adjectives: list[str], noun: tuple[str, ...], count: int | str | None) -> str:
    """A noun with its number, or a mass noun."""
    if len(noun) == 1:
        return _determine("the" if rng.random() < 0.5 else "", [*adjectives, noun[0]])
    assert count is not None
    one, many = noun
    if count == 1:
        return " ".join([pick(rng, ("one", "a single")), *adjectives, one])
    number = NUMBERS[count] if isinstance(count, int) else pick(rng, MANY)
    return " ".join([number, *adjectives, many])


def _sequence(rng: np.random.Generator, groups: list[list[_Mention]]) -> str:
    """Text of groups that follow each other; the members of a group occur at the same time."""
    if len(groups) == 1 and len(groups[0]) == 1:
        return groups[0][0].clause if rng.random() < 0.6 else groups[0][0].phrase
    if len(groups) == 2 and len(groups[0]) == len(groups[1]) == 1:
        return _fill(rng, _BEFORE, groups[0][0], groups[1][0])
    text = ""
    for k, group in enumerate(groups):
        if len(group) == 2:
            pair = _fill(rng, _WHILE if len(groups) == 1 else _WHILE_WITHIN, *_shuffled(rng, group))
            text = pair if not text else pick(rng, ("{x}, then {y}", "{x}, and after that {y}")).format(x=text, y=pair)
        elif not text:
            text = group[0].clause if rng.random() < 0.7 else group[0].phrase
        else:
            joints = _FINISH if k == len(groups) - 1 else _CONTINUE
            text = pick(rng, joints).format(x=text, b=group[0].clause, B=group[0].phrase)
    return text


def _fill(rng: np.random.Generator, templates: Sequence[str], first: _Mention, second: _Mention) -> str:
    return pick(rng, templates).format(a=first.clause, A=first.phrase, b=second.clause, B=second.phrase)


def _shuffled(rng: np.random.Generator, pair: list[_Mention]) -> list[_Mention]:
    return pair if rng.random() < 0.5 else pair[::-1]


def _determine(determiner: str, words: list[str]) -> str:
    if determiner in ("a", "an"):
        determiner = "an" if words[0][0] in "aeiou" else "a"
    return _join(determiner, *words)


def _join(*parts: str) -> str:
    return " ".join(part for part in parts if part)
