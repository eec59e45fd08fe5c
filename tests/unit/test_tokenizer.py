from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from transformers import AutoTokenizer

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


def test_loader_workers_get_the_tokenizer_by_pickle() -> None:
    tokenize = caption_tokenizer(
        AutoTokenizer.from_pretrained(TEXT_ENCODER), CaptionSection(cleaning="wavcaps", max_tokens=6)
    )
    captions = ["a low (and loud) tone", "Bright"]
    for ours, theirs in zip(tokenize(captions), pickle.loads(pickle.dumps(tokenize))(captions), strict=True):
        assert ours.tolist() == theirs.tolist() and ours.shape == (2, 6)
