"""Hard negatives: captions in which one stated fact is made false with as few changed words as possible.

Examples: "a dog barks three times" and "a dog barks twice"; "rain falls, then a bell rings" and the reverse order, with
the same words; "a loud horn honks" and "a soft horn honks". The statements of a caption are true of its clip, so the
changed caption is false.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from atr_scale.demo.captions import DemoCaption
from atr_scale.demo.lexicon import (
    LOUDNESS_ADJECTIVES,
    LOUDNESS_ADVERBS,
    NUMBERS,
    PITCH_ADJECTIVES,
    PITCH_PHRASES,
    TIMES,
)
from tools.study.corpora import Split

KINDS = ("count", "order", "pitch", "loudness")
# Conjunctions around which the two events can be exchanged.
JOINTS = (", then ", ", and after that ", " and then ", " and later ", " followed by ", " before ", " after ")


@dataclass(frozen=True)
class Negatives:
    """For every changed caption its text, its kind, and the number of the original caption in the split."""

    texts: list[str]
    kinds: list[str]
    sources: list[int]


def hard_negatives(split: Split) -> Negatives:
    """Up to one negative of each kind for every caption."""
    found = [
        (text, kind, number)
        for number, caption in enumerate(split.captions)
        for kind in KINDS
        if (text := _changed(caption, kind)) is not None
    ]
    texts, kinds, sources = zip(*found, strict=True) if found else ((), (), ())
    return Negatives(list(texts), list(kinds), list(sources))


def _changed(caption: DemoCaption, kind: str) -> str | None:
    """The caption with a fact of this kind made false, None if it states no such fact."""
    if kind == "order":
        return _other_order(caption)
    return _replaced(caption.text, _PHRASES[kind])


def _other_counts(stated: Mapping[int, tuple[str, ...]]) -> dict[str, str]:
    """For each phrase of a count, a phrase of a count that differs by two."""
    return {
        phrase: stated[count + 2 if count + 2 in stated else count - 2][0]
        for count, phrases in stated.items()
        for phrase in phrases
    }


def _opposites(table: Mapping[str, tuple[str, ...]], one: str, other: str) -> dict[str, str]:
    """For each phrase of the two ends of a scale, a phrase of the other end."""
    return {
        phrase: table[to][min(k, len(table[to]) - 1)]
        for end, to in ((one, other), (other, one))
        for k, phrase in enumerate(table[end])
    }


_PHRASES = {
    # Nouns stay plural: "two barks" becomes "four barks", never "one barks".
    "count": _other_counts(TIMES) | _other_counts({n: (word,) for n, word in NUMBERS.items() if n > 1}),
    "pitch": _opposites(PITCH_ADJECTIVES, "low", "high") | _opposites(PITCH_PHRASES, "low", "high"),
    "loudness": _opposites(LOUDNESS_ADJECTIVES, "soft", "loud") | _opposites(LOUDNESS_ADVERBS, "soft", "loud"),
}


def _other_order(caption: DemoCaption) -> str | None:
    """The caption with its two events exchanged, None if it does not have the form "one, then the other"."""
    kinds = [kind for _, _, kind in caption.states.relations]
    if len(caption.states.sounds) != 2 or kinds != ["before"]:
        return None
    text = caption.text.rstrip(".")
    joint = next((joint for joint in JOINTS if joint in text), None)
    if joint is None or text.lower().startswith("first "):
        return None
    first, second = text.split(joint, 1)
    return f"{second}{joint}{first[0].lower()}{first[1:]}"


def _replaced(text: str, phrases: dict[str, str]) -> str | None:
    """The text with one phrase replaced, None if it holds none. Longer phrases are tried first ("two times", "two")."""
    for phrase in sorted(phrases, key=len, reverse=True):
        pattern = rf"(?<![\w-]){re.escape(phrase)}(?![\w-])"
        if re.search(pattern, text, re.IGNORECASE):
            return re.sub(pattern, phrases[phrase], text, count=1, flags=re.IGNORECASE)
    return None
