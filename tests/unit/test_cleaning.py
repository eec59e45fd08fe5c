from __future__ import annotations

import pytest

from atr_scale.data.tokenizer import CLEANING

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
