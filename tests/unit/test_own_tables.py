"""The corpus `folder` with a table and audio of one's own: formats, columns, random splits."""

from __future__ import annotations

import datetime
import json
import sys
import types
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

from atr_scale.cli import app
from atr_scale.data.corpora import open_corpus
from atr_scale.data.corpora.corpus import Clip
from atr_scale.data.shard_reader import open_shards
from atr_scale.errors import UserError

RATE = 8000


def write_noise(folder: Path, *names: str) -> None:
    folder.mkdir(exist_ok=True, parents=True)
    for name in names:
        soundfile.write(folder / name, np.random.default_rng(0).integers(-999, 999, 800).astype(np.int16), RATE)


def clips(root: Path, split: str = "", **options: Any) -> list[Clip]:
    return open_corpus("folder", root, options).read_clips(split)


def test_the_command_with_a_table_and_a_folder_anywhere(tmp_path: Path) -> None:
    write_noise(tmp_path / "wavs", "a.wav", "b.wav")
    table = tmp_path / "mine" / "my.csv"
    table.parent.mkdir()
    table.write_bytes("path;text;place;né\na.wav;Ein Käuzchen;Wald;1\nb;Regen;;2\n".encode("latin-1"))
    arguments = ["--captions", str(table), "--audio", str(tmp_path / "wavs"), "--columns", "file=path,caption=text"]
    arguments += ["--delimiter", ";", "--text-encoding", "latin-1", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(
        app,
        ["shards", "build", "folder", *arguments, "--sample-rate", str(RATE), "--workers=1"],
        catch_exceptions=False,
    )
    assert result.exit_code == 0, result.output
    shards = open_shards(str(tmp_path / "out"))
    found = {shards.read(i).clip_id: shards.read(i) for i in range(2)}
    assert found.keys() == {"mine/a.wav", "mine/b"} and found["mine/b"].captions == ["Regen"]
    sample = found["mine/a.wav"]
    assert sample.captions == ["Ein Käuzchen"] and (sample.meta["place"], sample.meta["né"]) == ("Wald", "1")
    assert shards.manifest["options"]["delimiter"] == ";"


def test_json_lines_keep_types_and_name_bad_lines(tmp_path: Path) -> None:
    lines = [
        {"path": "a.wav", "caption": ["one", None, "two"], "tags": ["x", 1], "gain": -3.5, "none": None},
        {"path": "b.wav", "caption": {"text": 1}},
        {"path": None, "caption": "x"},
        ["c.wav"],
    ]
    text = "\n".join(map(json.dumps, lines)) + '\n{"path": \n\n' + '{"path": "d.wav", "caption": null}\n'
    (tmp_path / "t.jsonl").write_text("\ufeff" + text)
    corpus = open_corpus("folder", tmp_path, {"captions": str(tmp_path / "t.jsonl"), "columns": "file=path"})
    first, last = corpus.read_clips("")
    assert first.captions == ["one", "two"] and first.meta == {"tags": ["x", 1], "gain": -3.5}
    assert last.captions == []
    assert {place.rpartition(" ")[2]: detail.partition(":")[0] for place, detail in corpus.bad_rows.items()} == {
        "2": "a caption is an object, not a text", "3": "names no file", "4": "a list, not an object",
        "5": "Expecting value",
    }  # fmt: skip


def test_parquet_is_read_by_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    options = {"captions": str(tmp_path / "t.parquet")}
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="parquet needs pyarrow: pip install pyarrow"):
        clips(tmp_path, **options)
    day = datetime.date(2026, 1, 2)
    rows = [{"file_name": "a.wav", "caption": "x", "day": day, "bytes": b"RIFF", "hole": float("nan"), "label": 3.0}]
    parquet = types.SimpleNamespace(read_table=lambda path: types.SimpleNamespace(to_pylist=lambda: rows))
    monkeypatch.setitem(sys.modules, "pyarrow", types.SimpleNamespace(parquet=parquet))
    (clip,) = clips(tmp_path, **options)
    assert clip.label == "3" and clip.meta == {"day": "2026-01-02"}


def test_several_columns_of_captions_and_tabs(tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_text("f\tfirst\tsecond\na.wav\tone\ttwo\n")
    options = {"captions": str(tmp_path / "t.tsv"), "columns": "file=f,caption=second,caption=first"}
    assert clips(tmp_path, **options)[0].captions == ["two", "one"]
    (tmp_path / "t.csv").write_text((tmp_path / "t.tsv").read_text())
    assert clips(tmp_path, **options | {"captions": str(tmp_path / "t.csv"), "delimiter": "tab"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"captions": "none.csv"}, "there is no table of captions at none.csv"),
        ({"captions": "{}/t.xlsx"}, r"tables of captions are \.csv, \.tsv"),
        ({"columns": "file=nothing"}, "has no column nothing: its columns are file_name, caption"),
        ({"columns": "name=caption"}, "give FIELD=COLUMN with the fields file, caption, split, label"),
        ({"delimiter": ";;"}, "give one character, or tab"),
        ({"encoding": "utf-99"}, "unknown encoding 'utf-99'"),
        ({"encoding": "utf-16"}, "is not utf-16"),
        ({"shares": "train=0.8"}, "that add up to 1"),
        ({"shares": "train"}, "that add up to 1"),
        ({"shares": "a=0.5,b=0.5", "group_by": "who"}, "has no column who"),
        ({"shares": "a=0.5,b=0.5", "seed": "x"}, "'seed'"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, options: dict[str, str], message: str) -> None:
    (tmp_path / "captions.csv").write_text("file_name,caption\na.wav,x\n")
    (tmp_path / "t.xlsx").write_bytes(b"x")
    with pytest.raises(UserError, match=message):
        clips(tmp_path, **{name: value.format(tmp_path) for name, value in options.items()})


def test_a_random_split_keeps_groups_and_does_not_change_with_other_rows(tmp_path: Path) -> None:
    rows = [f"{n}.wav,caption,speaker {n % 250}\n" for n in range(1000)]
    options = {"shares": "train=0.8,val=0.1,test=0.1", "group_by": "who"}

    def split_of(rows: list[str], **more: Any) -> dict[str, str]:
        (tmp_path / "captions.csv").write_text("file_name,caption,who\n" + "".join(rows))
        corpus = open_corpus("folder", tmp_path, {**options, **more})
        assert set(corpus.find_splits()) == {"train", "val", "test", "all"}
        found = {split: corpus.read_clips(split) for split in ("train", "val", "test")}
        assert sum(map(len, found.values())) == len(corpus.read_clips("all")) == len(rows)
        return {clip.clip_id: split for split, some in found.items() for clip in some}

    first = split_of(rows)
    for split, count in Counter(first.values()).items():
        assert abs(count - 1000 * (0.8 if split == "train" else 0.1)) < 60
    for n in range(250):
        assert len({first[f"{tmp_path.name}/{m}.wav"] for m in range(n, 1000, 250)}) == 1
    assert split_of(rows[300:]).items() <= first.items()
    assert split_of(rows, seed=1) != first
    with pytest.raises(UserError, match="has a column split: drop shares"):
        (tmp_path / "captions.csv").write_text("file_name,caption,who,split\na.wav,x,y,train\n")
        open_corpus("folder", tmp_path, options).find_splits()
