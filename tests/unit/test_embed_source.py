"""Embedding a folder: equal to `embed_audio`, resumable, with windows, and mistakes in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile

from atr_scale.errors import UserError
from atr_scale.inference import TrainedModel, load_trained
from atr_scale.search import embed
from atr_scale.search.embed import embed_files
from atr_scale.search.parts import PartResult, write_part
from atr_scale.search.sources import item_audio, open_source
from atr_scale.search.spans import windows_of
from atr_scale.search.vectors import Vectors
from tests.tiny_run import save_run, tiny_config

RATE = 16_000


def embedded(model: TrainedModel, run: Path, source: Path, out: Path, windows: float | None = None) -> Vectors:
    embed_files(model, run, source, out, windows=windows)
    return Vectors.read(out)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    return save_run(tiny_config(folder, folder / "run"), folder / "run", 0)


@pytest.fixture(scope="module")
def model(run: Path) -> TrainedModel:
    return load_trained(run, "cpu")


@pytest.fixture
def sounds(tmp_path: Path) -> Path:
    folder = tmp_path / "sounds"
    rng = np.random.default_rng(0)
    for name in ("a/x.wav", "b/x.wav", "b/雨 ü.flac", "c.wav", "d.wav", "e.wav"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / name, 0.1 * rng.standard_normal((int(1.3 * RATE), 2)), RATE)
    (folder / "empty.wav").write_bytes(b"")
    soundfile.write(folder / "silent.wav", np.zeros(RATE), RATE)
    (folder / "captions.csv").write_text('file_name,caption\nc.wav,"a dog, far away"\n')
    return folder


def test_a_folder_is_embedded_like_its_files(model: TrainedModel, run: Path, sounds: Path) -> None:
    found = embedded(model, run, sounds, sounds.parent / "v.npy")
    assert sorted(item.id for item in found.items) == [
        f"sounds/{name}" for name in ("a/x.wav", "b/x.wav", "b/雨 ü.flac", "c.wav", "d.wav", "e.wav")
    ]
    expected = model.embed_audio([item.path for item in found.items])
    np.testing.assert_allclose(found.vectors, expected, atol=1e-5)
    assert [item.captions for item in found.items if item.id == "sounds/c.wav"] == [("a dog, far away",)]
    dropped = [json.loads(line) for line in (sounds.parent / "v.dropped.jsonl").read_text("utf-8").splitlines()]
    assert {line["clip_id"]: line["reason"] for line in dropped} == {
        "sounds/empty.wav": "empty_audio",
        "sounds/silent.wav": "silent_audio",
    }
    assert not (sounds.parent / "v.npy.parts").exists()


def test_windows_are_read_back(model: TrainedModel, run: Path, sounds: Path) -> None:
    found = embedded(model, run, sounds, sounds.parent / "v.parquet", windows=0.5)
    assert len(found.items) == 6 * 3
    assert [(item.start, item.stop) for item in found.items[:3]] == [(0.0, 0.5), (0.5, 1.0), (0.8, 1.3)]
    waveforms = [item_audio(item) for item in found.items]
    assert all(len(waveform) == RATE // 2 and rate == RATE for waveform, rate in waveforms)
    expected = model.embed_audio([waveform for waveform, _ in waveforms], sample_rate=RATE)
    np.testing.assert_allclose(found.vectors, expected, atol=1e-5)


def test_the_tail_of_a_recording_is_a_whole_window() -> None:
    assert windows_of(3.0, 10.0) == [(0.0, 3.0)]
    assert windows_of(1 / 48_000, 10.0) == [(0.0, 0.001)], "one sample is not lost by rounding"
    assert windows_of(20.0, 10.0) == [(0.0, 10.0), (10.0, 20.0)]
    assert windows_of(20.3, 10.0) == [(0.0, 10.0), (10.0, 20.0)]
    assert windows_of(23.0, 10.0)[-1] == (13.0, 23.0)


def test_an_interrupted_job_goes_on(
    model: TrainedModel, run: Path, sounds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = embedded(model, run, sounds, sounds.parent / "whole.npy")
    out = sounds.parent / "v.npy"
    written: list[Path] = []
    write = write_part

    def once(path: Path, part: PartResult) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(path)
        write(path, part)

    monkeypatch.setattr(embed, "write_part", once)
    with pytest.raises(KeyboardInterrupt):
        embedded(model, run, sounds, out)
    made: list[Path] = []
    monkeypatch.setattr(embed, "write_part", lambda path, part: (made.append(path), write(path, part)))
    again = embedded(model, run, sounds, out)
    assert made and written[0] not in made
    assert np.array_equal(again.vectors, whole.vectors) and list(again.items) == list(whole.items)
    made.clear()
    embedded(model, run, sounds, out)
    assert not made, "a complete result is embedded again"
    soundfile.write(sounds / "f.wav", np.random.default_rng(1).standard_normal(RATE) * 0.1, RATE)
    assert len(embedded(model, run, sounds, out).items) == 7
    with pytest.raises(UserError, match="is there with windows of None, not 1"):
        embedded(model, run, sounds, out, windows=1.0)


def test_shards_are_a_source(model: TrainedModel, run: Path, tmp_path: Path) -> None:
    shards = run.parent / "validation" / "shards"
    found = embedded(model, run, shards, tmp_path / "v.npy", windows=0.5)
    assert len(found.items) == 22 and ".tar#" in found.items[0].path and found.items[0].captions
    waveform, rate = item_audio(found.items[1])
    vector = model.embed_audio([waveform], sample_rate=rate)[0]
    np.testing.assert_allclose(found.vectors[1], vector, atol=1e-5)


def test_links_and_pipes_do_not_hold_it_up(sounds: Path) -> None:
    (sounds / "b" / "up").symlink_to("..")
    (sounds / "self").symlink_to("self")
    (sounds / "gone.wav").symlink_to("nowhere.wav")
    (sounds / "other").symlink_to("a")
    os.mkfifo(sounds / "pipe.wav")
    found = open_source(sounds)
    names = ("c.wav", "d.wav", "e.wav", "empty.wav", "silent.wav", "a/x.wav", "b/x.wav", "b/雨 ü.flac", "other/x.wav")
    assert [entry.id for entry in found.entries] == [f"sounds/{name}" for name in names]
    assert {clip.clip_id: clip.reason for clip in found.dropped} == {
        "sounds/gone.wav": "unreadable_file",
        "sounds/pipe.wav": "unreadable_file",
    }


def test_a_table_is_a_source(tmp_path: Path) -> None:
    tone = 0.1 * np.random.default_rng(0).standard_normal(RATE)
    (tmp_path / "audio").mkdir()
    for name in ("a.wav", "b, c.wav"):
        soundfile.write(tmp_path / "audio" / name, tone, RATE)
    rows = ['file_name,caption_1,caption_2', 'a.wav,"a dog, ""loud"", barks",far', '"b, c.wav",rain,',
            './audio/a.wav,again,', 'gone.wav,nothing,']  # fmt: skip
    (tmp_path / "t.csv").write_text("\n".join(rows))
    found = open_source(tmp_path / "t.csv")
    captions = {Path(entry.path).name: entry.captions for entry in found.entries}
    assert captions == {"a.wav": ('a dog, "loud", barks', "far", "again"), "b, c.wav": ("rain",)}
    assert [clip.reason for clip in found.dropped] == ["missing_audio"]
    (tmp_path / "t.tsv").write_text("file_name\tcaption\na.wav\tx, y\n")
    (tmp_path / "t.jsonl").write_text('{"file_name": "a.wav", "caption": "x, y"}\n')
    pyarrow.parquet.write_table(pyarrow.table({"file_name": ["a.wav"], "caption": ["x, y"]}), tmp_path / "t.parquet")
    for name in ("t.tsv", "t.jsonl", "t.parquet"):
        assert [entry.captions for entry in open_source(tmp_path / name).entries] == [("x, y",)]
    for text, words in (("file_name\na.wav\n", "no column caption"), ("name,caption\na,b\n", "no column file_name"),
                        ("file_name,caption\n../x.wav,b\n", r"x\.wav: missing_audio, tried")):  # fmt: skip
        (tmp_path / "bad.csv").write_text(text)
        with pytest.raises(UserError, match=words):
            open_source(tmp_path / "bad.csv")


def test_mistakes_are_one_line(model: TrainedModel, run: Path, sounds: Path, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="no audio files in"):
        open_source(tmp_path / "none")
    with pytest.raises(UserError, match="there is no"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"ends in \.npy"):
        embedded(model, run, sounds, tmp_path / "v")
    (tmp_path / "mine.json").write_text("{}")
    with pytest.raises(UserError, match=r"mine\.json is there"):
        embedded(model, run, sounds, tmp_path / "mine.npy")
    with pytest.raises(UserError, match="give at least"):
        embedded(model, run, sounds, tmp_path / "v.npy", windows=0.0)


@pytest.mark.slow
def test_two_ranks_write_the_same_files(run: Path, sounds: Path) -> None:
    one, two = sounds.parent / "one.npy", sounds.parent / "two.npy"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for out, start in ((one, [sys.executable]), (two, launch)):
        command = [*start, "-m", "atr_scale.cli", "embed", str(run), str(sounds), "--out", str(out)]
        subprocess.run(command, check=True, timeout=200)
    assert one.read_bytes() == two.read_bytes()
    assert one.with_suffix(".jsonl").read_bytes() == two.with_suffix(".jsonl").read_bytes()
