"""Which paraphrases of a caption are kept.

Shape suffixes: N candidates, D width of the text embeddings.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

from torch import Tensor

from atr_scale.data.sample import clean_captions
from atr_scale.data.tokenizer import CLEANING

MAX_WORDS = 20

# Texts -> unit vectors [N, D].
Embed = Callable[[Sequence[str]], Tensor]


def choose(
    caption: str, candidates: Sequence[str], embed: Embed, *, keep: int, threshold: float
) -> tuple[list[tuple[str, float]], Counter[str]]:
    """The at most `keep` candidates closest to `caption`, closest first, and what was rejected, by reason.

    Each comes with its cosine to the caption, which is `threshold` or more. Letter case and punctuation alone make no
    new wording. Whatever a program can see of what the prompt forbids is rejected: too many words, new numbers.
    """
    distinct, rejected = _distinct(caption, candidates)
    if not distinct:
        return [], rejected
    vectors_ND = embed([caption, *distinct])
    cosines = (vectors_ND[1:] @ vectors_ND[0]).tolist()
    ranked = sorted(zip(distinct, cosines, strict=True), key=lambda pair: -pair[1])
    close = [pair for pair in ranked if pair[1] >= threshold]
    rejected["too_far"] += len(ranked) - len(close)
    rejected["surplus"] += len(close[keep:])
    return close[:keep], +rejected


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
