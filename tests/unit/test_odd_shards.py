"""Shards of other projects: archives that end early or go on, and JSON and text files in other forms."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

from atr_scale.cli import app
from atr_scale.data.sample import BadSample
from atr_scale.data.shard_check import check_shards
from atr_scale.data.shard_reader import open_shards, refuse_repeated_ids
from atr_scale.errors import UserError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def flac() -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.random.default_rng(0).integers(-999, 999, 800).astype(np.int16), 8000, format="FLAC")
    return file.getvalue()


def tar_bytes(*members: tuple[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def pair(key: str, **record: object) -> list[tuple[str, bytes]]:
    return [(f"{key}.flac", flac()), (f"{key}.json", json.dumps(record or {"text": f"caption {key}"}).encode())]


def test_a_second_archive_in_a_file_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = tar_bytes(*pair("a"), *pair("b"))
    (tmp_path / "x.tar").write_bytes(first + tar_bytes(*pair("c")))
    shards = open_shards(str(tmp_path))
    assert shards.keys == ["a", "b"] and shards.dropped == {"cut_shard": 1}
    expected = f"more data, perhaps a second archive, behind the end marker at byte {len(first)}"
    assert expected in caplog.text
    assert check_shards(str(tmp_path)) == [f"x.tar: broken tar: {expected}"]
    (tmp_path / "x.tar").write_bytes(first + b"\0" * 100_000)  # padding to any size is no second archive
    assert check_shards(str(tmp_path), deep=True) == []


def test_shards_cut_between_two_samples_and_empty_ones_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = tar_bytes(*pair("a"), *pair("b"))
    (tmp_path / "good.tar").write_bytes(tar_bytes(*pair("g")))
    boundary = len(tar_bytes(*pair("a"))[: -tarfile.RECORDSIZE].rstrip(b"\0")) // 512 * 512
    end = next(n for n in range(boundary, len(whole), 512) if whole[n : n + 6] == b"b.flac")
    (tmp_path / "cut.tar").write_bytes(whole[:end])
    (tmp_path / "empty.tar").write_bytes(b"")
    for _ in range(2):  # when the index is made, and when it is read
        caplog.clear()
        shards = open_shards(str(tmp_path))
        assert sorted(shards.keys) == ["a", "g"] and shards.dropped == {"cut_shard": 2}
        assert "left out of the index: {'cut_shard': 2}" in caplog.text
    found = check_shards(str(tmp_path))
    assert found == [
        f"cut.tar: no end marker at byte {end}: the tar is cut at a member boundary",
        "empty.tar: no end marker at byte 0: the tar is cut at a member boundary",
    ]


@pytest.mark.parametrize(
    ("members", "captions"),
    [
        ({"json": {"text": ["one", None, "two"]}}, ["one", "two"]),
        ({"json": {"caption": "one"}}, ["one"]),
        ({"json": {"captions": None, "caption": ["one"], "text": ""}}, ["one"]),
        ({"txt": "one\n"}, ["one"]),
        ({"txt": "one", "json": {"tag": ["dog"]}}, ["one"]),
        ({"txt": "other", "json": {"text": "one"}}, ["one"]),
    ],
)
@pytest.mark.parametrize("audio_first", [True, False])
def test_captions_of_other_layouts(tmp_path: Path, members: dict, captions: list[str], audio_first: bool) -> None:
    texts = [
        (f"k.{extension}", content.encode() if isinstance(content, str) else json.dumps(content).encode())
        for extension, content in members.items()
    ]
    audio = [("k.flac", flac())]
    (tmp_path / "x.tar").write_bytes(tar_bytes(*(audio + texts if audio_first else texts + audio)))
    shards = open_shards(str(tmp_path))
    assert shards.read(0).captions == shards.read_text(0)[1] == captions
    assert shards.num_captions == len(captions) and check_shards(str(tmp_path), deep=True) == []


@pytest.mark.parametrize("text", ["\u200b\u200d", "\u00ad", "\ufffd \ufffd", "\u2800", "\ufeff", "\u0301", "\u3164"])
def test_captions_that_show_nothing_are_no_captions(tmp_path: Path, text: str) -> None:
    members = [*pair("a", captions=[text, "a dog \ufffd", "🐕‍🦺"]), *pair("b", captions=[text])]
    (tmp_path / "x.tar").write_bytes(tar_bytes(*members))
    shards = open_shards(str(tmp_path))
    assert shards.read(0).captions == ["a dog \ufffd", "🐕‍🦺"]
    with pytest.raises(BadSample, match="no_caption"):
        shards.read(1)


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("set/x.tar", "it is one shard: give the folder {}/set, whose shards are all read"),
        ("set/*.tar", "it is a pattern: give the folder {}/set"),
        ("set/x-{000..007}.tar", "it is a pattern: give the folder {}/set"),
        ("s*", "it is a pattern: give the folder {}, "),
    ],
)
def test_one_shard_and_patterns_say_what_to_give(tmp_path: Path, location: str, message: str) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "x.tar").write_bytes(tar_bytes(*pair("a")))
    for use in (open_shards, check_shards):
        with pytest.raises(UserError) as caught:
            use(f"{tmp_path}/{location}")
        assert message.format(tmp_path) in str(caught.value)


def test_a_folder_with_the_marks_of_a_pattern_is_read(tmp_path: Path) -> None:
    (tmp_path / "set [1]").mkdir()
    (tmp_path / "set [1]" / "x.tar").write_bytes(tar_bytes(*pair("a")))
    assert open_shards(str(tmp_path / "set [1]")).keys == ["a"]


def test_a_key_that_begins_with_a_slash_is_refused() -> None:
    with pytest.raises(UserError, match=r"give s3://bucket/sets/x$"):
        open_shards("s3://bucket//sets/x")


def test_home_and_variables_in_paths_of_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "x.tar").write_bytes(tar_bytes(*pair("a")))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SETS", str(tmp_path))
    for location in ("~/set", "$SETS/set"):
        result = CliRunner().invoke(app, ["shards", "check", location])
        assert result.exit_code == 0, result.output
    result = CliRunner().invoke(app, ["shards", "check", "$NO_SUCH/set"])
    assert isinstance(result.exception, UserError) and "variable $NO_SUCH is not set" in str(result.exception)


def test_a_clip_id_that_occurs_twice_is_named_with_both_places(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(
        tar_bytes(*pair("a", clip_id="one", text="t"), *pair("b", clip_id="two", text="t"))
    )
    (tmp_path / "y.tar").write_bytes(tar_bytes(*pair("c", clip_id="one", text="t"), *pair("d", text="t")))
    assert check_shards(str(tmp_path)) == ["y.tar: sample c: its clip id 'one' is also that of sample a of x.tar"]
    with pytest.raises(UserError, match=r"clip id 'one' is that of sample a of x.tar and of sample c of y.tar"):
        refuse_repeated_ids(open_shards(str(tmp_path)))
    (tmp_path / "y.tar").write_bytes(tar_bytes(*pair("a", text="t"), *pair("b")))
    assert check_shards(str(tmp_path)) == []
    refuse_repeated_ids(open_shards(str(tmp_path)))
