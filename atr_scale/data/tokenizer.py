"""Captions to token ids: the papers' cleaning rules and the text encoder's own tokenizer."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from atr_scale.data.options import CaptionSection
from atr_scale.errors import UserError

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


def load_tokenizer(name: str) -> Callable[..., Any]:
    """The tokenizer of a transformers model, by its name or folder. Raises UserError if there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"no tokenizer at {name!r}: give a transformers model name or folder ({reason})") from None


def caption_tokenizer(name: str, captions: CaptionSection) -> CaptionTokenizer:
    """What makes tokens of captions for the text encoder `name`. Raises UserError if it has no tokenizer."""
    return CaptionTokenizer(load_tokenizer(name), captions.cleaning, captions.max_tokens)
