"""`evaluate --moments` and `search --moments` with small runs that were never trained."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import Mock

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

from atr_scale.cli import app
from atr_scale.errors import UserError
from atr_scale.evaluation.moments import window_ious
from atr_scale.experiments.evaluated import read_experiments
from atr_scale.inference import load_trained
from atr_scale.moments import Moment
from atr_scale.search.index import build_index
from tests.tiny import RATE
from tests.tiny_run import save_run, tiny_config


class Files(NamedTuple):
    """Two runs, a folder with two recordings of 4 s, an index of them by windows of 2 s, and a file of moments."""

    tap: Path
    dual: Path
    audio: Path
    index_dir: Path
    moments: Path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("moments")
    config = tiny_config(folder, folder / "unused")
    tap, dual = (save_run(config, folder / name, seed=0, scorer=name) for name in ("tap", "meanmax"))
    for run in (tap, dual):
        (run / "checkpoints/step-3/state.json").write_text('{"step": 3}')
    rng = np.random.default_rng(0)
    (folder / "audio").mkdir()
    for name in ("yard", "road"):
        wave = rng.normal(0, 1, 4 * RATE) * np.repeat(rng.uniform(0, 0.2, 16), RATE // 4)
        soundfile.write(folder / "audio" / f"{name}.wav", wave, RATE)
    build_index(str(dual), str(folder / "audio"), folder / "index", windows=2.0)
    rows: list[dict[str, Any]] = [
        {"qid": 5, "query": "a low tone", "vid": "yard", "duration": 4, "relevant_windows": [[0, 1], [2.5, 4]]},
        {"qid": "b", "query": "a loud and high tone", "vid": "road", "relevant_windows": [[1, 2]]},
        {"query": "a soft tone", "path": "yard.wav", "relevant_windows": [[0.5, 3]]},
    ]
    moments = folder / "night.jsonl"
    moments.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Files(tap, dual, folder / "audio", folder / "index", moments)


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_evaluate_measures_and_records_moments(files: Files, tmp_path: Path) -> None:
    arguments = ("evaluate", files.tap, "--moments", files.moments, "--audio", files.audio, "--out", tmp_path)
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0].split() == ["3", "queries", "R1@0.5", "R1@0.7", "mIoU"]

    table = json.loads((tmp_path / "moments-night.json").read_text())
    assert table["counts"] == {"clips": 3, "queries": 3, "left_out": 0}
    assert (table["checkpoint"], table["step"], table["method"]) == ("best", 3, "tap")
    assert (table["file"], table["audio"], table["shards"]) == (str(files.moments), str(files.audio), None)
    [entry] = json.loads((tmp_path / "results.json").read_text())["results"]
    assert (entry["split"], entry["kind"], entry["file"]) == ("moments/night", "moments", "moments-night.json")
    assert entry["metrics"]["moments/mIoU"] == table["metrics"]["mIoU"]
    assert entry["metrics"]["whole_clip/R1@0.5"] == table["chance"]["whole clip"]["R1@0.5"]

    lines = [json.loads(line) for line in (tmp_path / "moments-night.jsonl").read_text().splitlines()]
    assert [(line["qid"], line["vid"]) for line in lines] == [(5, "yard"), ("b", "road"), (3, "yard.wav")]
    model = load_trained(files.tap)
    ious = []
    for line in lines:
        path = files.audio / f"{Path(line['vid']).stem}.wav"
        spans = model.moments(line["query"], path, seconds=4).spans
        best = [[span.start, span.stop] for span in spans[:1]]
        assert np.array(line["pred_relevant_windows"])[:, :2] == pytest.approx(
            np.array([[span.start, span.stop] for span in spans]), abs=1e-3
        )
        ious.append(window_ious(np.array(best), np.array(line["relevant_windows"], np.float64)).max())
    assert [line["iou"] for line in lines] == pytest.approx(ious, abs=1e-3)
    assert table["metrics"]["mIoU"]["value"] == pytest.approx(np.mean(ious), abs=1e-3)

    with pytest.raises(UserError, match=r"moments/night holds moments, in moments-night\.json; compare needs"):
        read_experiments([tmp_path], "moments/night")

    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert call(*arguments).exit_code == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_results_of_two_files_of_one_name(files: Files, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = tmp_path / "other" / files.moments.name
    other.parent.mkdir()
    other.write_text(files.moments.read_text().splitlines()[0])
    arguments = ("evaluate", files.tap, "--audio", files.audio, "--out", tmp_path, "--moments")
    for more in ((files.moments,), (files.moments,), (other, "--split", "my/own")):
        assert call(*arguments, *more).exit_code == 0
    assert not caplog.messages
    assert json.loads((tmp_path / "moments-night.json").read_text())["queries"] == 3
    assert json.loads((tmp_path / "moments-my-own.json").read_text())["queries"] == 1
    splits = [entry["split"] for entry in json.loads((tmp_path / "results.json").read_text())["results"]]
    assert splits == ["moments/night", "moments/my/own"]
    call(*arguments, other)
    assert f"the result night of {files.moments} is replaced" in caplog.text


def test_evaluate_refuses_what_has_no_moments(files: Files, tmp_path: Path) -> None:
    cases: list[tuple[tuple[object, ...], str]] = [
        ((files.dual, "--moments", files.moments, "--audio", files.audio), "meanmax.* has no attention over frames"),
        (
            (files.tap, "--moments", files.moments),
            "none of its clips .*line 1: .*yard.*--audio or --shards",
        ),
        ((files.tap, "--moments", files.moments, "--audio", tmp_path / "no"), "there is no folder"),
        ((files.tap, "--moments", files.moments, "--rerank", 5), "--rerank is for retrieval"),
        ((files.tap, "--moments", files.moments, "--audio", files.audio, "--shards", "s"), "--audio and --shards both"),
        ((files.tap, "--audio", files.audio), "--audio is the folder of the clips of --moments"),
    ]
    for arguments, says in cases:
        with pytest.raises(UserError, match=says):
            app([str(part) for part in ("evaluate", *arguments, "--out", tmp_path / "out")], standalone_mode=False)
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot create .*choose another --out"):
        arguments = (
            "evaluate",
            files.tap,
            "--moments",
            files.moments,
            "--audio",
            files.audio,
            "--out",
            tmp_path / "file",
        )
        app([str(part) for part in arguments], standalone_mode=False)


@pytest.mark.slow
def test_search_tells_the_moments_of_its_hits(files: Files) -> None:
    query = ("search", files.index_dir, "a loud tone", "--rerank", files.tap, "--all-windows", "--json")
    plain = json.loads(call(*query).stdout)["results"]
    result = call(*query, "--moments")
    assert result.exit_code == 0, result.output
    located = json.loads(result.stdout)["results"]
    model = load_trained(files.tap)
    assert [hit["id"] for hit in located] == [hit["id"] for hit in plain]
    for hit, window in zip(located, plain, strict=True):
        assert list(hit) == [*window, "moments"] and set(hit["moments"][0]) == {"start", "stop", "score"}
        assert hit["score"] == window["score"]
        assert (hit["start"], hit["stop"]) == (hit["moments"][0]["start"], hit["moments"][0]["stop"])
        wave, rate = soundfile.read(hit["path"], dtype="float32")
        part = wave[round(window["start"] * rate) : round(window["stop"] * rate)]
        spans = model.moments("a loud tone", part, rate, 2.0).spans
        assert len(hit["moments"]) == len(spans)
        for moment, span in zip(hit["moments"], spans, strict=True):
            assert moment["start"] == pytest.approx(window["start"] + span.start, abs=1e-6)
            assert window["start"] <= moment["start"] < moment["stop"] <= window["stop"] + 1e-6
    assert {window["start"] for window in plain} == {0.0, 2.0}
    assert call(*query[:-1], "--moments").stdout.splitlines()[0].split() == ["rank", "score", "time", "path", "caption"]


def test_search_refuses_moments_that_no_model_tells(files: Files) -> None:
    cases: list[tuple[tuple[object, ...], str]] = [
        (("a tone",), "the scorer meanmax of this search has no attention over frames: re-rank with"),
        (("a tone", "--captions"), "--moments tells when a text is heard in sounds"),
        (("--audio", files.audio / "yard.wav"), "--moments tells when a text is heard in sounds"),
    ]
    for arguments, says in cases:
        with pytest.raises(UserError, match=says):
            app([str(part) for part in ("search", files.index_dir, *arguments, "--moments")], standalone_mode=False)


def test_a_hit_whose_sound_is_gone_has_no_moments(files: Files, tmp_path: Path) -> None:
    from atr_scale.search.moments import locate_hits
    from atr_scale.search.query import Hit, Searcher

    searcher = Searcher(files.index_dir, rerank=files.tap)
    hits = [Hit("x", 0.5, str(tmp_path / "x.wav"), 0.0, 2.0, None), searcher.by_text(["a tone"], 1)[0][0]]
    gone, there = locate_hits(searcher, "a tone", hits)
    assert gone.hit == hits[0] and gone.moments == [] and there.moments


def test_times_have_no_digits_that_a_sum_of_floats_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    from atr_scale.search import moments
    from atr_scale.search.query import Hit

    model = SimpleNamespace(moments=lambda *_: SimpleNamespace(spans=[Moment(8.51, 9.31, 0.5)]))
    monkeypatch.setattr(moments, "needed_locator", lambda _: model)
    monkeypatch.setattr(moments, "item_audio", lambda _: (np.zeros(10 * RATE, np.float32), RATE))
    (located,) = moments.locate_hits(Mock(), "a tone", [Hit("x", 0.5, "x.wav", 10.0, 20.0, None)])
    assert (located.hit.start, located.hit.stop) == (18.51, 19.31)
