from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from atr_scale.data.collate import DecodedClip, collate
from atr_scale.data.options import CaptionSection
from atr_scale.data.tokenizer import CLEANING, CaptionTokenizer, caption_tokenizer

TEXT_ENCODER = str(Path(__file__).parents[1] / "fixtures" / "run_0_1" / "text_encoder")

CAPTION = 'A "Dog,cat" pair:  barks (loudly), it\'s 3-fold!'


@pytest.mark.parametrize(
    ("rule", "cleaned"),
    [
        ("none", CAPTION),
        ("wavcaps", "a dog cat pair barks loudly it's 3-fold"),
        ("lower_no_punctuation", "a dogcat pair barks loudly its 3fold"),
    ],
)
def test_rules(rule: str, cleaned: str) -> None:
    assert CLEANING[rule](CAPTION) == cleaned


def test_captions_are_cleaned_then_truncated_and_padded() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TEXT_ENCODER)
    tokenize = CaptionTokenizer(tokenizer, "lower_no_punctuation", max_tokens=5)
    input_ids, attention_mask = tokenize(["A low, and low tone!", "low", "?!"])
    low, mark = (tokenizer.convert_tokens_to_ids(piece) for piece in ("low", "?"))
    assert input_ids.shape == (3, 5) and attention_mask.sum(1).tolist() == [5, 3, 4]
    assert input_ids[0, 2] == input_ids[1, 1] == low
    assert input_ids[2, 1] == mark, "what cleaning leaves nothing of stays as it is"


def test_control_tokens_inside_a_caption_are_text() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TEXT_ENCODER)
    (ids,), _ = CaptionTokenizer(tokenizer)(["low [SEP] tone [PAD] low [CLS]"])
    special = [position for position, token in enumerate(ids.tolist()) if token in tokenizer.all_special_ids]
    assert special[0] == 0 and special[-1] == len(ids) - 1
    assert {tokenizer.convert_ids_to_tokens(int(ids[n])) for n in special[1:-1]} <= {tokenizer.unk_token}


def test_a_caption_of_megabytes_is_cut_before_the_tokenizer_reads_it(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TEXT_ENCODER)
    read: list[int] = []

    def recorded(captions: list[str], **named: Any) -> Any:
        read.extend(map(len, captions))
        return tokenizer(captions, **named)

    recorded.model_max_length = tokenizer.model_max_length  # type: ignore[attr-defined]
    long = "low tone " * 200_000
    ids, _ = CaptionTokenizer(recorded, max_tokens=8)([long, "low tone"])
    assert read == [8 * 256, 8] and ids.shape == (2, 8)
    whole = tokenizer([long[:5000]], truncation=True, max_length=8, return_tensors="pt")["input_ids"]
    assert torch.equal(ids[:1], whole)
    assert "a caption of 1800000 characters is cut: 'low tone low tone" in caplog.text


def test_a_tokenizer_without_a_limit_is_asked_for_none() -> None:
    """One of a plug-in: its encoder takes captions of any length."""
    asked: list[int | None] = []

    def tokenizer(captions: list[str], max_length: int | None, **_: Any) -> dict[str, torch.Tensor]:
        asked.append(max_length)
        return dict.fromkeys(("input_ids", "attention_mask"), torch.ones(len(captions), 1, dtype=torch.int64))

    for captions in (CaptionSection(max_tokens=None), CaptionSection(max_tokens=1000), CaptionSection()):
        caption_tokenizer(tokenizer, captions)(["a low tone"])
    assert asked == [None, 1000, 64]


@pytest.mark.parametrize(("cleaning", "equal"), [("none", 3), ("wavcaps", 2), ("lower_no_punctuation", 1)])
def test_ids_of_captions_are_those_of_what_the_encoder_reads(cleaning: str, equal: int) -> None:
    """Captions that cleaning makes equal are positives of each other."""
    tokenizer = caption_tokenizer(AutoTokenizer.from_pretrained(TEXT_ENCODER), CaptionSection(cleaning=cleaning))
    captions = ["It's a low tone", "it's a low, tone.", "its a low tone"]
    clips = [DecodedClip(4, caption, caption, 0, f"clip {n}", "place") for n, caption in enumerate(captions)]
    batch = collate(np.zeros((3, 4), np.int16), clips, tokenizer, [])
    assert len(set(batch.caption_ids.tolist())) == equal and len(set(batch.clip_ids.tolist())) == 3


def test_loader_workers_get_the_tokenizer_by_pickle() -> None:
    tokenize = caption_tokenizer(
        AutoTokenizer.from_pretrained(TEXT_ENCODER), CaptionSection(cleaning="wavcaps", max_tokens=6)
    )
    captions = ["a low (and loud) tone", "Bright"]
    for ours, theirs in zip(tokenize(captions), pickle.loads(pickle.dumps(tokenize))(captions), strict=True):
        assert ours.tolist() == theirs.tolist() and ours.shape == (2, 6)
