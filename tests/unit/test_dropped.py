"""Samples that could not be read are named, in a file and in the log."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest

from atr_scale.batch import DroppedSample
from atr_scale.data.sample import READ_FAULTS
from atr_scale.errors import Failure, UserError
from atr_scale.run_files import DROPPED, read_json_lines
from atr_scale.training import dropped as module
from atr_scale.training.dropped import DroppedSamples
from atr_scale.training.record import check_drop_rate


def sample(number: int) -> DroppedSample:
    return DroppedSample(f"clotho/shard-000001.tar/clip-{number}", "silent_audio", "no sound")


def named(run: Path) -> list[str]:
    return [line["sample"].rpartition("-")[2] for line in read_json_lines(run / DROPPED)]


def test_every_dropped_sample_has_a_line(tmp_path: Path) -> None:
    DroppedSamples(tmp_path, 0).add([(3, sample(1)), (4, sample(2))])
    assert read_json_lines(tmp_path / DROPPED)[0] == {
        "step": 3, "sample": "clotho/shard-000001.tar/clip-1", "reason": "silent_audio", "detail": "no sound",
    }  # fmt: skip
    assert named(tmp_path) == ["1", "2"]


def test_steps_that_come_again_name_their_samples_once(tmp_path: Path) -> None:
    DroppedSamples(tmp_path, 0).add([(3, sample(1)), (7, sample(2))])
    resumed = DroppedSamples(tmp_path, 5)
    resumed.add([(7, sample(2))])
    assert named(tmp_path) == ["1", "2"]
    DroppedSamples(tmp_path, 0)
    assert named(tmp_path) == []


def test_the_file_does_not_grow_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_NAMED", 3)
    samples = DroppedSamples(tmp_path, 0)
    samples.add([(1, sample(1)), (1, sample(2))])
    samples.add([(2, sample(3)), (2, sample(4))])
    samples.add([(3, sample(5))])
    DroppedSamples(tmp_path, 3).add([(4, sample(6))])
    assert named(tmp_path) == ["1", "2", "3"]


def test_the_log_names_a_sample_and_counts_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    samples = DroppedSamples(tmp_path, 0)
    with caplog.at_level(logging.WARNING):
        samples.add([(1, sample(1))])
        samples.add([(2, sample(2))])
        now[0] += module.PAUSE
        samples.add([(3, sample(3))])
    first, second = caplog.messages
    assert "dropped 1 unreadable samples (1 silent_audio), for example clotho/shard-000001.tar/clip-1" in first
    assert "dropped 2 unreadable samples (2 silent_audio), for example clotho/shard-000001.tar/clip-2" in second


def test_a_drop_rate_above_the_limit_is_the_users_mistake_only_if_samples_are_damaged() -> None:
    check_drop_rate({"silent_audio": 100}, 500, 0.01)  # of the first 10,000 samples
    with pytest.raises(UserError, match=r"101 of 500 samples were unreadable \(\{'silent_audio': 101\}\)"):
        check_drop_rate({"silent_audio": 101}, 500, 0.01)
    check_drop_rate({"silent_audio": 101}, 20_000, 0.01)
    for reason in READ_FAULTS:
        with pytest.raises(Failure, match="101 of 500 samples were unreadable"):
            check_drop_rate({"silent_audio": 100, reason: 1}, 500, 0.01)
