"""Signs of life of a rank: its file, its declared waits, and the limits that follow from its steps."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from atr_scale.config import RunConfig
from atr_scale.distributed.world import World
from atr_scale.run_files import rank_file
from atr_scale.training.attempts import Attempt
from atr_scale.training.heartbeat import HANG_STEPS, LEAST_HANG_S, WAIT_S, Heartbeat, watched_rank
from tests.tiny_run import tiny_config


class Clock:
    """Seconds that pass when a test says so."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def after_steps(clock: Clock, seconds: float, steps: int = 3) -> Heartbeat:
    heartbeat = Heartbeat(clock=clock)
    for step in range(1, steps + 1):
        clock.now += seconds
        heartbeat.beat(step)
    return heartbeat


def test_the_limit_is_ten_median_steps_and_at_least_a_minute() -> None:
    assert after_steps(Clock(), 2.0).limit == LEAST_HANG_S
    assert after_steps(Clock(), 30.0).limit == HANG_STEPS * 30.0


def test_a_given_limit_replaces_that_of_the_steps() -> None:
    heartbeat = Heartbeat(hang_s=5.0)
    assert heartbeat.limit == WAIT_S  # starting
    heartbeat.beat(1)
    assert heartbeat.doing == "starting"  # the first step may be slow
    heartbeat.beat(2)
    assert (heartbeat.doing, heartbeat.limit) == ("training", 5.0)


def test_compiled_encoders_have_longer(tmp_path: Path) -> None:
    """A batch of a new shape is compiled in the middle of a run."""
    config = tiny_config(tmp_path / "inputs", tmp_path / "run")
    assert limit_of(config) == LEAST_HANG_S
    config.model.audio.compile = True
    assert limit_of(config) == 600.0


def limit_of(config: RunConfig) -> float:
    with watched_rank(config, World(), Attempt(Path(config.run.dir), World())) as heartbeat:
        for step in (1, 2):
            heartbeat.beat(step)
        return heartbeat.limit


def test_declared_waits_have_their_own_limit_and_are_no_part_of_a_step() -> None:
    clock = Clock()
    heartbeat = after_steps(clock, 20.0)
    with heartbeat.wait("evaluating"):
        clock.now += 400
        with heartbeat.wait("outage: s3://bucket"):
            clock.now += 400
            assert (heartbeat.doing, heartbeat.fields()["state"]) == ("outage: s3://bucket", "waiting")
        assert (heartbeat.fields()["state"], heartbeat.fields()["wait"]) == ("evaluating", "evaluating")
        assert heartbeat.limit == WAIT_S
    clock.now += 20
    heartbeat.beat(4)
    assert heartbeat.fields()["step_seconds"] == 20.0
    assert heartbeat.limit == HANG_STEPS * 20.0


def test_the_end_of_a_wait_is_progress_before_it_lowers_the_limit() -> None:
    """Else the watchdog could see the long age of the wait with the short limit of a step."""

    class Observed(Heartbeat):
        def beat(self, step: int | None = None) -> None:
            super().beat(step)
            limits.append(self.limit)

    limits: list[float] = []
    heartbeat = Observed(hang_s=5.0)
    heartbeat.beat(1)
    heartbeat.beat(2)
    with heartbeat.wait("saving"):
        pass
    assert limits == [WAIT_S, 5.0, WAIT_S, WAIT_S]
    assert heartbeat.limit == 5.0


def test_a_rank_that_is_blocked_in_reading_is_behind() -> None:
    heartbeat = after_steps(Clock(), 1.0)
    with heartbeat.reading():
        assert (heartbeat.doing, heartbeat.batches_read) == ("reading a batch", 0)
    assert (heartbeat.doing, heartbeat.batches_read) == ("training", 1)
    heartbeat.beat(4)
    assert heartbeat.batches_read == 0


def test_the_file_is_fresh_while_the_training_thread_is_blocked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("atr_scale.training.heartbeat.WRITE_S", 0.01)
    path = rank_file(tmp_path, 0)
    with pytest.raises(OSError, match="gone"), Heartbeat(tmp_path, attempt=2) as heartbeat:
        heartbeat.beat(7)
        heartbeat.tell(steps=10, samples_seen=70)
        beat = heartbeat.fields()["beat"]
        until = time.monotonic() + 20
        while not path.exists() or json.loads(path.read_text())["written"] < beat + 0.1:
            assert time.monotonic() < until
            time.sleep(0.01)
        found = json.loads(path.read_text())
        assert (found["step"], found["steps"], found["samples_seen"], found["attempt"]) == (7, 10, 70, 2)
        assert (found["state"], found["wait"], found["reason"]) == ("starting", "starting", None)
        assert found["beat"] == beat
        raise OSError("the disk is gone")
    found = json.loads(path.read_text())
    assert (found["state"], found["wait"], found["reason"]) == ("ended", None, "the disk is gone")


def test_a_folder_that_vanishes_does_not_end_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("atr_scale.training.heartbeat.WRITE_S", 0.01)
    path = rank_file(tmp_path, 0)
    with Heartbeat(tmp_path) as heartbeat:
        until = time.monotonic() + 20
        while not path.exists():
            assert time.monotonic() < until
            time.sleep(0.01)
        path.parent.rename(tmp_path / "gone")  # at once: the thread writes while files are removed one by one
        heartbeat.beat(1)
    assert f"{path} cannot be written any more" in caplog.text
