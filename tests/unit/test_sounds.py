"""Clips of a split as MP3 files in a run folder."""

from __future__ import annotations

import errno
import io
import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import soundfile

from atr_scale.data.shard_reader import ShardSet
from atr_scale.evaluation import sounds
from atr_scale.evaluation.evaluate import Evaluation
from atr_scale.evaluation.sounds import Sounds, sound_path
from atr_scale.training.players import retrieved_clips
from tests.unit.test_report import retrieval_result

RATE = 24_000


class Shards:
    """40 tones of 12 s in reverse order; `gone`: a row that cannot be read."""

    keys = tuple(map(str, range(40)))

    def __init__(self, gone: int | None = None) -> None:
        self.gone = gone
        self.read_rows: list[int] = []

    def read(self, row: int) -> Any:
        self.read_rows.append(row)
        if row == self.gone:
            raise OSError(errno.ENOENT, "No such file")
        tone = 20_000 * np.sin(np.arange(12 * RATE) * (0.01 + 0.01 * row))
        return SimpleNamespace(audio=tone.astype("<i2").tobytes(), extension="pcm", sample_rate=RATE)


def of(shards: Shards) -> Sounds:
    return Sounds(cast(ShardSet, shards), [39 - clip for clip in range(40)])


def test_a_sound_is_the_beginning_of_its_clip() -> None:
    shards = Shards()
    found = of(shards)
    assert found.mp3(30) == found.mp3(30) and shards.read_rows == [9], "read once, in the order of the shards"
    sound, rate = soundfile.read(io.BytesIO(found.mp3(30)))
    assert rate == 16_000 and len(sound) / rate == pytest.approx(10, abs=0.2)
    peak = np.abs(np.fft.rfft(sound)).argmax() * rate / len(sound)
    assert peak == pytest.approx(0.1 * RATE / (2 * np.pi), rel=0.01)
    assert len(found.mp3(30)) < 50_000


def test_a_clip_that_cannot_be_read_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sounds, "SPLIT_BYTES", 100_000)
    result = retrieval_result()
    lost = result.misses[0].clips[0]
    with caplog.at_level(logging.WARNING):
        of(Shards(gone=39 - lost)).save(tmp_path, result)
    assert f"the sound of {39 - lost} is left out" in caplog.text
    assert not sound_path(tmp_path, "test", lost).exists()
    assert sound_path(tmp_path, "test", result.misses[0].clips[1]).exists()


def test_the_sounds_of_a_split_have_a_limit_and_replace_older_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = sound_path(tmp_path, "test", 99)
    old.parent.mkdir(parents=True)
    old.touch()
    monkeypatch.setattr(sounds, "SPLIT_BYTES", 100_000)
    result = retrieval_result()
    of(Shards()).save(tmp_path, result)
    files = list(old.parent.iterdir())
    assert 0 < sum(file.stat().st_size for file in files) <= 100_000 and old not in files
    assert sound_path(tmp_path, "test", result.misses[0].clips[0]) in files, "the worst miss comes first"


def test_the_right_clip_that_was_missed_has_a_player_of_its_own() -> None:
    result = retrieval_result()
    evaluation = cast(Evaluation, SimpleNamespace(results=[replace(result, examples=result.misses + result.examples)]))
    found = retrieved_clips(evaluation, of(Shards()))
    missed, near = (next(each for each in found if (each.rank > 3) == far) for far in (True, False))
    assert [clip.rank for clip in missed.clips] == [1, 2, 3, missed.rank]
    assert [clip.hit for clip in missed.clips] == [False, False, False, True]
    assert [clip.rank for clip in near.clips] == [1, 2, 3] and near.clips[near.rank - 1].hit
    tags = [value.tag for value in missed.players("a").value]
    assert tags == ["a/1", "a/2", "a/3", "a/right"]
