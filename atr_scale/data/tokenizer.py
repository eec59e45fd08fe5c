"""Captions to token ids: the papers' cleaning rules and the text encoder's own tokenizer."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from atr_scale.data.options import CaptionSection

_WAVCAPS = str.maketrans(dict.fromkeys('(,.!?;:|*")', " "))
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _unchanged(caption: str) -> str:
    return caption


def _wavcaps(caption: str) -> str:
    """WavCaps' and Mei et al.'s retrieval code: lower case, these marks replaced by spaces."""
    return " ".join(caption.lower().translate(_WAVCAPS).split())


def _lower_no_punctuation(caption: str) -> str:
    """Estimated correspondences (arXiv 2408.11641): lower case, all punctuation removed."""
    return " ".join(caption.lower().translate(_PUNCTUATION).split())


CLEANING: dict[str, Callable[[str], str]] = {
    "none": _unchanged,
    "wavcaps": _wavcaps,
    "lower_no_punctuation": _lower_no_punctuation,
}


class CaptionTokenizer:
    """Captions -> (input_ids, attention_mask), each [captions, L] int64, cleaned, then truncated to `max_tokens`.

    tokenizer: the text encoder's own, called as those of transformers are. cleaning: a name in CLEANING.
    """

    def __init__(self, tokenizer: Callable[..., Any], cleaning: str = "none", max_tokens: int = 64) -> None:
        self._tokenizer = tokenizer
        self._clean = CLEANING[cleaning]
        self._max_tokens = max_tokens

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        # A caption of punctuation alone keeps its text rather than becoming empty.
        cleaned = [self._clean(c) or c for c in captions]
        out = self._tokenizer(cleaned, padding=True, truncation=True, max_length=self._max_tokens, return_tensors="pt")
        return out["input_ids"], out["attention_mask"]


def caption_tokenizer(tokenizer: Callable[..., Any], captions: CaptionSection) -> CaptionTokenizer:
    """What makes token ids of captions as a run's `data.captions` says; tokenizer: the text encoder's own."""
    return CaptionTokenizer(tokenizer, captions.cleaning, captions.max_tokens)
