"""Shards of other projects: archives that end early or go on, and JSON and text files in other forms."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

from atr_scale.data.shard_check import check_shards
from atr_scale.data.shard_reader import open_shards


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
