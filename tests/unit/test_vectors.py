"""Embeddings as files: what is written is read back, and damaged files are one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from atr_scale.errors import UserError
from atr_scale.search import vectors
from atr_scale.search.vectors import Item, ItemLines, ModelId, Vectors, read_about

MODEL = ModelId("runs/a/checkpoints/step-3", 3, "ab" * 32, 4, 16_000)


def some_vectors() -> Vectors:
    items = [
        Item("a/ü 雨.wav", "/x/a/ü 雨.wav", None, None, ("a dog barks", 'says "hi"\n')),
        Item("b.wav#t=10,20", "s3://bucket/shard-000001.tar#b", 10.0, 20.0),
        Item("c", "c.wav"),
    ]
    values = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    return Vectors(values, items, MODEL, {"source": "/x", "windows": 10.0, "dropped": {"silent_audio": 1}})


@pytest.mark.parametrize("name", ["v.npy", "v.parquet"])
def test_what_is_written_is_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / "new" / name
    written = some_vectors()
    assert read_about(path) is None
    written.write(path)
    found = Vectors.read(path)
    assert np.array_equal(found.vectors, written.vectors) and found.vectors.dtype == np.float32
    assert (list(found.items), found.model, found.about) == (written.items, MODEL, written.about)
    assert read_about(path) == (MODEL, written.about)
    assert len(list(path.parent.iterdir())) == (3 if name == "v.npy" else 1)


def test_files_are_plain(tmp_path: Path) -> None:
    some_vectors().write(tmp_path / "v.npy")
    assert np.load(tmp_path / "v.npy").shape == (3, 4)
    assert isinstance(Vectors.read(tmp_path / "v.npy").vectors, np.memmap)
    lines = [json.loads(line) for line in (tmp_path / "v.jsonl").read_text("utf-8").splitlines()]
    assert lines[1] == {
        "id": "b.wav#t=10,20", "path": "s3://bucket/shard-000001.tar#b", "start": 10.0, "stop": 20.0, "captions": [],
    }  # fmt: skip
    assert json.loads((tmp_path / "v.json").read_text("utf-8"))["count"] == 3


def test_items_are_read_one_by_one_and_found_by_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "_key", lambda id: np.uint64(len(id) // 100))  # all ids share a key
    written, path = some_vectors(), tmp_path / "v.jsonl"
    written.write(tmp_path / "v.npy")
    plain = ItemLines(path)
    assert (
        list(plain) == written.items
        and plain[-1] == written.items[2]
        and plain[1:] == written.items[1:]
        and plain[::2] == written.items[::2]
    )
    found = ItemLines(path, plain.table())
    assert [found.find(item.id) for item in written.items] == written.items
    assert found.find("d") is None and found.find("d" * 100) is None
    path.write_bytes(path.read_bytes().replace(b'"c.wav"', b'0c.wav"'))
    assert found.find(written.items[1].id) == written.items[1]
    with pytest.raises(UserError, match=r"v\.jsonl, line 3, cannot be read .*: write it with `atr-scale embed`"):
        found.find("c")


def test_mistakes_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "v.npy"
    for name in ("v", "v.csv"):
        with pytest.raises(UserError, match=r"ends in \.npy .* or \.parquet"):
            some_vectors().write(tmp_path / name)
    with pytest.raises(UserError, match=r"v\.npy cannot be read .*No such file"):
        Vectors.read(path)
    some_vectors().write(path)
    (tmp_path / "v.jsonl").write_text((tmp_path / "v.jsonl").read_text("utf-8").splitlines()[0] + "\n", "utf-8")
    with pytest.raises(UserError, match=r"holds float32 \[3, 4\], but .* say float32 \[1, 4\]"):
        Vectors.read(path)
    path.write_bytes(b"")  # numpy raises EOFError, which the command line would call "Aborted!"
    with pytest.raises(UserError, match=r"v\.npy cannot be read .*: write it with `atr-scale embed`"):
        Vectors.read(path)
    some_vectors().write(path)
    (tmp_path / "v.json").write_text('{"format": 9}')
    with pytest.raises(UserError, match="format 9, this version reads 1"):
        Vectors.read(path)
    (tmp_path / "v.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match=r"v\.parquet"):
        Vectors.read(tmp_path / "v.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install \"atr-scale\[search\]\""):
        Vectors.read(tmp_path / "v.parquet")


def test_the_same_weights_are_the_same_model() -> None:
    assert MODEL.same(ModelId("elsewhere", 3, MODEL.weights, 4, 16_000))
    assert not MODEL.same(ModelId(MODEL.run, 3, "cd" * 32, 4, 16_000))
