"""Captions to token ids: the papers' cleaning rules and the text encoder's own tokenizer."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence

from torch import Tensor

from atr_scale.config import RunConfig
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
    """Cleaned captions -> (input_ids, attention_mask), each [captions, L] int64, truncated by tokens."""

    def __init__(self, name: str, cleaning: str = "none", max_tokens: int = 64) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"no tokenizer at {name!r}: give a transformers model name or folder ({reason})") from None
        self._clean = CLEANING[cleaning]
        self._max_tokens = max_tokens

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        # A caption of punctuation alone keeps its text rather than becoming empty.
        cleaned = [self._clean(c) or c for c in captions]
        out = self._tokenizer(cleaned, padding=True, truncation=True, max_length=self._max_tokens, return_tensors="pt")
        return out["input_ids"], out["attention_mask"]


def caption_tokenizer(config: RunConfig) -> CaptionTokenizer:
    """The tokenizer of a run. UserError where there is none for its text encoder."""
    captions = config.data.captions
    return CaptionTokenizer(config.model.text.name, captions.cleaning, captions.max_tokens)
