"""Captions to token ids: the cleaning rules of the papers, then the text encoder's tokenizer."""

from __future__ import annotations

import logging
import string
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor

from atr_scale.data.options import CaptionSection
from atr_scale.errors import UserError

logger = logging.getLogger(__name__)

# A tokenizer reads all of a caption before it cuts, 10 MB in a minute and a half. Words are shorter than this.
CHARACTERS_PER_TOKEN = 256
WAVCAPS_MARKS = '(,.!?;:|*")'
_WAVCAPS = str.maketrans(dict.fromkeys(WAVCAPS_MARKS, " "))
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _unchanged(caption: str) -> str:
    return caption


def _wavcaps(caption: str) -> str:
    """The rule of the retrieval code of WavCaps and of Mei et al.: lower case, these marks replaced by spaces."""
    return " ".join(caption.lower().translate(_WAVCAPS).split())


def _lower_no_punctuation(caption: str) -> str:
    """The rule of estimated audio-caption correspondences (arXiv 2408.11641): lower case, no punctuation."""
    return " ".join(caption.lower().translate(_PUNCTUATION).split())


CLEANING: dict[str, Callable[[str], str]] = {
    "none": _unchanged,
    "wavcaps": _wavcaps,
    "lower_no_punctuation": _lower_no_punctuation,
}


class ReadWord(NamedTuple):
    """A word of a caption as it was given, and the numbers of its tokens among those of the caption."""

    text: str
    tokens: list[int]


class CaptionTokenizer:
    """Captions -> (input_ids, attention_mask), each [captions, L] int64; cleaned, then cut if they are too long.

    tokenizer: the text encoder's, with the call signature of transformers' tokenizers. cleaning: a name in CLEANING.
    max_tokens: of a caption, special tokens included; None: as many as the text encoder takes, the tokenizer's
    `model_max_length`, which is never exceeded: the attribute `max_tokens` is the smaller of both.
    """

    def __init__(self, tokenizer: Callable[..., Any], cleaning: str = "none", max_tokens: int | None = 64) -> None:
        self._tokenizer = tokenizer
        if hasattr(tokenizer, "split_special_tokens"):
            tokenizer.split_special_tokens = True  # a caption that says [SEP] or </s> is text, not the end of one
        self._rule = CLEANING[cleaning]
        own: int | None = getattr(tokenizer, "model_max_length", None)
        self.max_tokens = max_tokens if max_tokens is None or own is None else min(max_tokens, own)
        limit = self.max_tokens or own or 0
        self._longest = CHARACTERS_PER_TOKEN * limit if 0 < limit < 1e6 else None

    def clean(self, caption: str) -> str:
        """The caption as the text encoder reads it. One that cleaning would empty (punctuation alone) is unchanged."""
        if self._longest and len(caption) > self._longest:
            logger.warning("a caption of %d characters is cut: %.60r ...", len(caption), caption)
            caption = caption[: self._longest]
        return self._rule(caption) or caption

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        out = self._tokens([self.clean(c) for c in captions])
        return out["input_ids"], out["attention_mask"]

    def words(self, caption: str) -> list[ReadWord]:
        """The words of a caption that the text encoder reads, in their order.

        Words are what spaces separate. One that cleaning removes, or that is behind the longest caption, is left out.
        Raises UserError if the tokenizer does not tell which characters a token stands for.
        """
        if not getattr(self._tokenizer, "is_fast", False):
            raise UserError(
                "the tokenizer of this text encoder does not tell which characters its tokens stand for, so words have "
                "no tokens: use a fast tokenizer of transformers"
            )
        cleaned = self.clean(caption)
        places = self._tokens([cleaned], return_offsets_mapping=True)["offset_mapping"][0].tolist()
        found, end = [], 0
        for word in caption[: self._longest].split():
            start = cleaned.find(self.clean(word), end)
            if start < 0:
                continue
            end = start + len(self.clean(word))
            # A token may begin with the space before its word, but it ends inside of it.
            tokens = [number for number, (first, last) in enumerate(places) if first < last and start < last <= end]
            if tokens:
                found.append(ReadWord(word, tokens))
        return found

    def _tokens(self, cleaned: list[str], **more: Any) -> Any:
        """What the text encoder's tokenizer makes of cleaned captions."""
        limit = self.max_tokens
        return self._tokenizer(cleaned, padding=True, truncation=True, max_length=limit, return_tensors="pt", **more)

    @cached_property
    def padding(self) -> int:
        """The id that fills the rows of shorter captions; 0 if all captions are equally long."""
        input_ids, attention_mask = self(["wind", "a dog barks at a passing train while it rains"])
        ids: list[int] = input_ids[attention_mask == 0].tolist()
        return ids[0] if ids else 0


def caption_tokenizer(tokenizer: Callable[..., Any], captions: CaptionSection) -> CaptionTokenizer:
    """The tokenizer that a run's `data.captions` describes, on top of the text encoder's `tokenizer`."""
    return CaptionTokenizer(tokenizer, captions.cleaning, captions.max_tokens)
