"""Moments: IoU and metrics against cases by hand, the file formats, what is refused, clips in folders and shards."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from atr_scale.data.corpora.audio_files import audio_stem
from atr_scale.data.sample import BadSample
from atr_scale.data.shard_reader import open_shards
from atr_scale.distributed.world import World
from atr_scale.errors import UserError
from atr_scale.evaluation.moment_clips import MomentClips, locate_all
from atr_scale.evaluation.moments import (
    LocatedQuery,
    MomentQuery,
    MomentResult,
    best_iou,
    read_moments,
    window_ious,
)
from atr_scale.moments import Moment
from tests.tiny import RATE, make_tiny_inputs


def located(windows: list[list[float]], *spans: tuple[float, float], seconds: float = 10, clip: str = "a") -> Any:
    row = MomentQuery(1, 1, "a dog barks", (clip,), np.array(windows, np.float64))
    return LocatedQuery(row, [Moment(start, stop, 1.0) for start, stop in spans], seconds)


@pytest.mark.parametrize(
    ("span", "window", "iou"),
    [
        ((2, 4), (2, 4), 1.0),
        ((2, 4), (3, 5), 1 / 3),
        ((2, 4), (4, 6), 0.0),  # they touch
        ((2, 4), (7, 9), 0.0),
        ((0, 10), (4, 5), 0.1),
        ((4, 5), (0, 10), 0.1),
        ((3, 3), (2, 4), 0.0),
    ],
)
def test_iou_by_hand(span: tuple[float, float], window: tuple[float, float], iou: float) -> None:
    found = window_ious(np.array([span], np.float64), np.array([window], np.float64))
    assert found.shape == (1, 1) and found[0, 0] == pytest.approx(iou)


def test_the_best_span_counts_with_the_window_that_fits_best() -> None:
    assert best_iou(located([[0, 1], [4, 8]], (4, 6), (0, 1)))[0] == pytest.approx(0.5)
    assert best_iou(located([[0, 1]]))[0] == 0, "no span found"


def test_metrics_and_chance_by_hand() -> None:
    queries = [
        located([[0, 5]], (0, 2.5)),  # 0.5, exactly the threshold
        located([[2, 4]], (2, 4)),  # 1
        located([[6, 9]], (0, 3), clip="b"),  # 0
        located([[0, 9]], (0, 6), clip="b"),  # 2/3
    ]
    result = MomentResult.of(queries)
    assert (result.queries, result.clips) == (4, 2)
    assert {key: one["value"] for key, one in result.metrics.items()} == pytest.approx(
        {"R1@0.5": 3 / 4, "R1@0.7": 1 / 4, "mIoU": (0.5 + 1 + 0 + 2 / 3) / 4}
    )
    whole = {key: one["value"] for key, one in result.chance["whole clip"].items()}
    assert whole == pytest.approx({"R1@0.5": 2 / 4, "R1@0.7": 1 / 4, "mIoU": (0.5 + 0.2 + 0.3 + 0.9) / 4})
    third = 10 / 3
    by_hand = [(5 - third) / (2 * third), (4 - third) / (2 * third - 2), (2 * third - 6) / (9 - third), third / 9]
    assert result.chance["middle third"]["mIoU"]["value"] == pytest.approx(np.mean(by_hand))
    for one in result.metrics.values():
        assert one["low"] <= one["value"] <= one["high"]
    # Two clips: a resample has one of them twice, or both.
    assert result.metrics["R1@0.5"] == {"value": 0.75, "low": 0.5, "high": 1.0}
    names = result.by_name()
    assert names["moments/mIoU"] == result.metrics["mIoU"] and "same_length_anywhere/R1@0.7" in names
    assert [line.split("  ")[0] for line in result.table().splitlines()[1:]] == ["the model", *result.chance]


def test_chance_of_a_length_is_that_of_all_places() -> None:
    one = located([[4, 6]], (0, 2))
    rng = np.random.default_rng(0)
    starts = rng.uniform(0, 8, 20_000)
    ious = window_ious(np.stack([starts, starts + 2], 1), one.row.windows)
    chance = MomentResult.of([one]).chance["same length anywhere"]
    assert chance["mIoU"]["value"] == pytest.approx(ious.mean(), abs=0.01)
    assert chance["R1@0.5"]["value"] == pytest.approx((ious >= 0.5).mean(), abs=0.015)


def test_rows_of_the_public_files_are_read(tmp_path: Path) -> None:
    file = tmp_path / "val.jsonl"
    rows: list[dict[str, Any]] = [
        {"qid": 8, "query": "Engine noise", "duration": 154, "vid": "rwT", "relevant_windows": [[89, 154], [1, 2.5]]},
        {"qid": "00", "query": "a bell", "vid": 7, "id": "b", "path": "c/d.wav", "relevant_windows": [[0, 1]], "fg": 1},
        {"query": "rain", "vid": "x", "relevant_windows": [[0, 1]], "saliency_scores": [[1, 2]]},
    ]
    file.write_text("\ufeff" + json.dumps(rows[0]) + "\r\n\n" + json.dumps(rows[1]) + "\n" + json.dumps(rows[2]))
    found = read_moments(file)
    assert [(row.line, row.qid, row.query, row.clip) for row in found] == [
        (1, 8, "Engine noise", ("rwT",)),
        (3, "00", "a bell", ("c/d.wav", "b", "7")),
        (4, 4, "rain", ("x",)),
    ]
    assert found[0].windows.tolist() == [[89, 154], [1, 2.5]]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2: no JSON"),
        ("[1]", "no object"),
        ('{"vid": "a", "relevant_windows": [[0, 1]]}', "query is None; give a text"),
        ('{"query": "x", "relevant_windows": [[0, 1]]}', "it names no clip; give its vid, id or path"),
        ('{"query": "x", "vid": "a"}', "relevant_windows is None; give"),
        ('{"query": "x", "vid": "a", "relevant_windows": []}', r"relevant_windows is \[\]"),
        ('{"query": "x", "vid": "a", "relevant_windows": [[1, 1]]}', r"a window is \[1, 1\]; give .*start < stop"),
        ('{"query": "x", "vid": "a", "relevant_windows": [[-1, 1]]}', "a window is"),
        ('{"query": "x", "vid": "a", "relevant_windows": [[0, NaN]]}', "a window is"),
        ('{"query": "x", "vid": "a", "relevant_windows": [[0, "1"]]}', "a window is"),
        ('{"query": "x", "vid": "a", "relevant_windows": [[0, 1, 2]]}', "a window is"),
        ('{"query": "x", "vid": "a", "relevant_windows": [3]}', "a window is 3"),
        ('{"query": "x", "vid": "a", "qid": [1], "relevant_windows": [[0, 1]]}', "qid is"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, line: str, says: str) -> None:
    file = tmp_path / "m.jsonl"
    file.write_text('{"query": "x", "vid": "a", "relevant_windows": [[0, 1]]}\n' + line)
    with pytest.raises(UserError, match=f"m.jsonl, line 2: .*{says.removeprefix('line 2: ')}"):
        read_moments(file)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_moments(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="has no rows"):
        read_moments(tmp_path / "empty.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"query": "\xe9"}')
    with pytest.raises(UserError, match="not UTF-8"):
        read_moments(tmp_path / "latin.jsonl")


def queries_of(*names: str) -> list[MomentQuery]:
    rows = enumerate(names, 1)
    return [MomentQuery(line, line, name, (name,), np.array([[0.0, 0.5]])) for line, name in rows]


def locate(texts: Sequence[str], waveform: NDArray[np.float32]) -> list[list[Moment]]:
    return [[Moment(0.0, len(waveform) / RATE, float(np.abs(waveform).max()))] for _ in texts]


def test_clips_of_a_folder_and_of_shards_are_found_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shards = make_tiny_inputs(tmp_path).shards
    clips = MomentClips(open_shards(str(shards)), RATE)
    ids = [open_shards(str(shards)).read_text(i)[0] for i in (3, 4)]
    first, second = (audio_stem(name) for name in ids)
    key = open_shards(str(shards)).keys[0]
    found = locate_all(queries_of(ids[0], second, key, ids[0]), clips, locate, "m.jsonl", World())
    assert [one.row.line for one in found] == [1, 2, 3, 4] and not caplog.text
    assert [one.seconds for one in found] == [1.0] * 4 and found[0].spans == found[3].spans

    audio = tmp_path / "corpus" / "audio"
    folder = MomentClips(audio, RATE)
    rows = queries_of(first, f"../audio/{second}.wav", str(audio / "tone-0.wav"), "nothing", "broken")
    (audio / "broken.wav").write_bytes(b"RIFF")
    files = locate_all(rows, folder, locate, "m.jsonl", World())
    assert [one.row.line for one in files] == [1, 2, 3]
    assert files[0].spans[0].score == pytest.approx(found[0].spans[0].score, abs=1e-3)
    assert files[1].spans[0].score == pytest.approx(found[1].spans[0].score, abs=1e-3)
    assert "m.jsonl: 2 of 5 rows are left out, the first is line 4: " in caplog.text
    assert "has no audio file nothing" in caplog.text
    with pytest.raises(BadSample, match="File name too long"):
        folder.read(("x" * 300,))
    with pytest.raises(UserError, match=r"none of its clips can be used \(the first is line 1: .*--audio or --shards"):
        locate_all(queries_of("nothing"), folder, locate, "m.jsonl", World())
    with pytest.raises(UserError, match="has no clip nothing"):
        locate_all(queries_of("nothing"), clips, locate, "m.jsonl", World())


def test_a_clip_that_the_model_refuses_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, samples in (("a", 10), ("b", RATE)):
        soundfile.write(tmp_path / f"{name}.wav", np.full(samples, 0.1), RATE)

    def strict(texts: Sequence[str], waveform: NDArray[np.float32]) -> list[list[Moment]]:
        if len(waveform) < RATE:
            raise UserError("audio is too short for one frame")
        return locate(texts, waveform)

    found = locate_all(queries_of("a", "b"), MomentClips(tmp_path, RATE), strict, "m.jsonl", World())
    assert [one.row.line for one in found] == [2]
    assert "m.jsonl: 1 of 2 rows are left out, the first is line 1: audio is too short" in caplog.text


def test_windows_behind_the_end_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    soundfile.write(tmp_path / "a.wav", np.full(RATE, 0.1), RATE)
    row = MomentQuery(9, 1, "x", ("a",), np.array([[7.0, 8.0]]))
    locate_all([row], MomentClips(tmp_path, RATE), locate, "m.jsonl", World())
    assert "line 9: all windows begin after the end of the clip, at 1.0 s" in caplog.text
