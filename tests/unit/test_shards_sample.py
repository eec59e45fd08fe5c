"""The JSON of a sample: any content is cleaned or refused."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atr_scale.data.sample import BadSample, parse_texts


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"{", "bad_json"),
        (b"[1]", "bad_json"),
        (b"[" * 100_000, "bad_json"),
        (b'{"captions": ["\xff\xfe"]}', "bad_json"),
        (b'{"captions": 3}', "bad_json"),
        (b'{"captions": ["x", 3]}', "bad_json"),
        (b'{"captions": ["x"], "clip_id": 7}', "bad_json"),
        (b'{"captions": ["x"], "sample_rate": "16000"}', "bad_json"),
        (b'{"captions": []}', "no_caption"),
        (b"{}", "no_caption"),
        (b'{"captions": ["", " \\u0000\\t"]}', "no_caption"),
        (b'{"captions": ["\\ud800"]}', "no_caption"),
    ],
)
def test_unusable_json_is_a_bad_sample(payload: bytes, reason: str) -> None:
    with pytest.raises(BadSample) as caught:
        parse_texts("k", {"json": payload}, "set")
    assert caught.value.reason == reason


def test_captions_are_cleaned_and_kept_whole() -> None:
    captions = ["  A\x00 dog\nbarks ", "café", "🐕‍🦺 barks", "long " * 2000, ""]
    fields, meta = parse_texts("k", {"json": json.dumps({"captions": captions, "extra": 1}).encode()}, "set")
    assert fields["captions"] == ["A dog barks", "café", "🐕‍🦺 barks", ("long " * 2000).strip()]
    assert fields["clip_id"] == "set/k" and meta == {"extra": 1}


@given(st.lists(st.text(), max_size=4))
def test_any_text_is_cleaned_or_refused(captions: list[str]) -> None:
    try:
        fields, _ = parse_texts("k", {"json": json.dumps({"captions": captions}).encode()}, "set")
    except BadSample as error:
        assert error.reason == "no_caption"
        return
    assert all(c and c == c.strip() and "\0" not in c and c.encode("utf-8") for c in fields["captions"])
