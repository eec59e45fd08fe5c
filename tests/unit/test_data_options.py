"""The section `data` of a configuration."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from atr_scale.data.options import DataSection


def section(validation: Any) -> DataSection:
    return DataSection.model_validate({"train": [{"shards": "a"}], "validation": validation})


@pytest.mark.parametrize(
    ("validation", "sets"),
    [
        (None, {}),
        ("s3://bucket/val", {"validation": "s3://bucket/val"}),
        ({"audiocaps": "a", "clotho-val_2": "b"}, {"audiocaps": "a", "clotho-val_2": "b"}),
        ({}, {}),
    ],
)
def test_validation_is_one_place_or_several_by_name(validation: Any, sets: dict[str, str]) -> None:
    assert section(validation).validation_sets == sets


@pytest.mark.parametrize("name", ["train", "test", "t2a", "zero_shot", "", "a b", "a/b", "a.b", "ä", "a\n"])
def test_names_of_validation_sets_are_plain_words(name: str) -> None:
    with pytest.raises(ValidationError, match="cannot name a validation set: use letters, digits, _ and -"):
        section({"fine": "a", name: "b"})
