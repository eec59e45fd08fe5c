"""The rule for keeping paraphrases of a caption.

Shape suffixes: N candidates, D width of the text embeddings.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from atr_scale.data.sample import clean_captions
from atr_scale.data.tokenizer import CLEANING

MAX_WORDS = 20

# Texts -> embeddings of unit length [N, D].
Embed = Callable[[Sequence[str]], Tensor]


@dataclass(frozen=True)
class Chooser:
    """Keeps the candidates closest to their caption.

    embed and text_encoder: the text encoder and its name. keep: paraphrases kept of each caption. threshold: least
    cosine to the caption.
    """

    embed: Embed
    text_encoder: str
    keep: int
    threshold: float

    def choose(self, caption: str, candidates: Sequence[str]) -> tuple[list[tuple[str, float]], Counter[str]]:
        """The kept candidates and their cosines to `caption`, closest first, and counts of the others by reason.

        Changes of letter case and punctuation alone do not count as a new wording. Candidates that break a rule of the
        prompt in a way that a program can detect are rejected too: too many words, new numbers.
        """
        distinct, rejected = _distinct(caption, candidates)
        if not distinct:
            return [], rejected
        embeddings_ND = self.embed([caption, *distinct])
        cosines = (embeddings_ND[1:] @ embeddings_ND[0]).tolist()
        ranked = sorted(zip(distinct, cosines, strict=True), key=lambda pair: -pair[1])
        close = [pair for pair in ranked if pair[1] >= self.threshold]
        rejected["too_far"] += len(ranked) - len(close)
        rejected["surplus"] += len(close[self.keep :])
        return close[: self.keep], +rejected


def _distinct(caption: str, candidates: Sequence[str]) -> tuple[list[str], Counter[str]]:
    rejected: Counter[str] = Counter()
    wording = CLEANING["lower_no_punctuation"]
    most_words = max(MAX_WORDS, len(caption.split()))
    seen, distinct = {wording(caption)}, []
    texts = clean_captions(candidates)
    rejected["empty"] += len(candidates) - len(texts)
    for text in texts:
        if wording(text) == wording(caption):
            rejected["copy"] += 1
        elif wording(text) in seen:
            rejected["duplicate"] += 1
        elif len(text.split()) > most_words:
            rejected["too_long"] += 1
        elif not _numbers(text) <= _numbers(caption):
            rejected["new_number"] += 1
        else:
            seen.add(wording(text))
            distinct.append(text)
    return distinct, rejected


def _numbers(text: str) -> set[str]:
    return set(re.findall(r"\d+", text))
