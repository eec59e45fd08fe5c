"""Trackers of accelerate beside TensorBoard: what wandb's own file holds, and trackers that fail or block."""

from __future__ import annotations

import importlib
import json
import logging
import os
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState, tracking

from atr_scale.errors import UserError
from atr_scale.training import trackers
from atr_scale.training.monitor import Monitor, record_evaluation
from atr_scale.training.trackers import check_trackers

Line = tuple[int, dict[str, Any]]


class Fake(tracking.GeneralTracker):  # type: ignore[misc]
    """Remembers what it was told. Subclasses fail or block."""

    name = "fake"
    requires_logging_directory = False
    told: list[Line]
    step = 0

    def __init__(self, project: str) -> None:
        super().__init__()
        type(self).told = []

    @property
    def tracker(self) -> Any:
        return self

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        assert step is not None
        self.told.append((step, values))


def use(monkeypatch: pytest.MonkeyPatch, kind: type[Fake]) -> None:
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "fake", kind)


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def records(file: Path) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format, blocks of 32 KiB, with 7 more bytes in front of the first."""
    content, at, record = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        size, kind = struct.unpack_from("<HB", content, at + 4)
        record += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or its last part
            yield record
            record = b""


def in_wandb(file: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The hyperparameters and the logged values in the file of an offline run, which has ended."""
    proto: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
    hyperparameters, logged = {}, []
    found: list[Any] = []
    deadline = time.monotonic() + 30  # another process writes the file
    while "exit" not in (kinds := [record.WhichOneof("record_type") for record in found]):
        assert time.monotonic() < deadline, f"the file of {file.stat().st_size} bytes ends behind {kinds}"
        found = [proto.Record.FromString(content) for content in records(file)]
    for record in found:
        for item in [*record.run.config.update, *record.config.update]:
            hyperparameters[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
        if values := record.history.item:
            logged.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in values})
    return hyperparameters, logged


@pytest.mark.slow
def test_wandb_offline_holds_all_scalars_and_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "run"
    monitor = Monitor(run, True, trackers=["wandb"])
    monitor.hyperparameters(
        {"train": {"lr": 0.1}, "data": {"shards": "s3://user:password@host/x"}, "mine": {"api_key": "hidden"}}
    )
    for step in (1, 2):
        monitor.train(step, {"loss": 1 / step})
    monitor.evaluation(2, "validation", {"t2a/R@1": 0.25})
    monitor.saving(1, 1)
    monitor.text("configuration", "text")
    monitor.heatmap(2, [[1.0]])  # type: ignore[arg-type]
    monitor.close()

    assert [line["kind"] for line in lines(run)] == ["train", "train", "evaluation", "saving"]
    assert not (run / "tensorboard").exists()
    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    hyperparameters, logged = in_wandb(file)
    assert hyperparameters.get("train.lr") == 0.1, hyperparameters
    assert (
        hyperparameters["data.shards"] == "s3://[redacted]@host/x" and hyperparameters["mine.api_key"] == "[redacted]"
    )
    assert not any(b"password" in path.read_bytes() for path in run.rglob("*") if path.is_file())
    found = {(line["_step"], key): value for line in logged for key, value in line.items() if key[0] != "_"}
    assert found == {
        (1, "train/loss"): 1.0,
        (2, "train/loss"): 0.5,
        (2, "validation/t2a/R@1"): 0.25,
        (2, "saving/failed"): 1,
    }

    record_evaluation(run, 2, {"test": {"t2a/R@1": 0.5}})
    resumed = Monitor(run, True, resume_step=2, trackers=["wandb"])
    resumed.train(3, {"loss": 0.25})
    resumed.close()
    files = sorted(run.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
    assert len(files) == 3 and len({path.name for path in files}) == 1, "the same run goes on"
    assert [in_wandb(path)[1][0].get("test/t2a/R@1") for path in files] == [None, 0.5, None]
    assert in_wandb(files[2])[1][0]["train/loss"] == 0.25


def test_a_tracker_that_fails_is_noted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(Fake):
        def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
            if step != 3:
                raise ConnectionError("the network is down: token=abcdefgh")
            super().log(values, step)

    use(monkeypatch, Failing)
    monitor = Monitor(tmp_path, True, trackers=["tensorboard", "fake"])
    for step in (1, 2, 3):
        monitor.train(step, {"loss": 1.0})
    monitor.close()
    assert len(lines(tmp_path)) == 3
    assert Failing.told == [(3, {"train/loss": 1.0})], "later values are tried"
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        "monitor: fake: ConnectionError: the network is down: token=[redacted]; the run goes on",
        "monitor: 2 lines of values did not reach fake",
    ]


def test_a_tracker_that_cannot_start_is_noted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Fake):
        def start(self) -> None:
            raise SystemExit("no account")

    use(monkeypatch, Broken)
    monitor = Monitor(tmp_path, True, trackers=["fake"])
    monitor.train(1, {"loss": 1.0})
    monitor.close()
    assert [line["loss"] for line in lines(tmp_path)] == [1.0]
    assert "monitor: fake: SystemExit: no account; the run goes on" in caplog.messages


def test_a_tracker_that_blocks_holds_up_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    never = threading.Event()

    class Blocked(Fake):
        def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
            never.wait()

    use(monkeypatch, Blocked)
    for name, value in (("MOST_WAITING", 10), ("FINISH_S", 0.05), ("GRACE_S", 0.05)):
        monkeypatch.setattr(trackers, name, value)
    monitor = Monitor(tmp_path, True, trackers=["fake"])
    for step in range(1, 31):
        monitor.train(step, {"loss": 1.0})
    monitor.close()
    never.set()
    assert len(lines(tmp_path)) == 30
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        "monitor: fake: has not answered for 10 lines of values, later ones are lost; the run goes on",
        "monitor: fake has not taken all values within 0 s, the rest is lost",
    ]


def test_steps_that_a_continued_run_has_are_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Continued(Fake):
        step = 13

    use(monkeypatch, Continued)
    monitor = Monitor(tmp_path, True, resume_step=10, trackers=["fake"])
    for step in range(11, 16):
        monitor.train(step, {"loss": 1.0})
    monitor.close()
    assert [step for step, _ in Continued.told] == [13, 14, 15]


def test_what_cannot_work_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_trackers(["tensorboard", "wandb"])
    with pytest.raises(UserError, match="no tracker is called 'wandbb', did you mean wandb: give some of aim, "):
        check_trackers(["wandbb"])
    monkeypatch.setattr(tracking, "get_available_trackers", list)
    with pytest.raises(UserError, match=r'wandb is not installed: pip install "atr-scale\[trackers\]", or take it'):
        check_trackers(["tensorboard", "wandb"])


def test_accelerate_leaves_the_process_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below `accelerate launch --use_deepspeed` its state would start a process group."""
    PartialState._reset_state()
    given = {"LOCAL_RANK": "1", "RANK": "1", "WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    use(monkeypatch, Fake)
    Monitor(tmp_path, True, trackers=["fake"]).close()
    state = PartialState()
    assert (state.num_processes, state.device.type) == (1, "cpu")
    assert not torch.distributed.is_initialized()
    assert {name: os.environ[name] for name in given} == given and "ACCELERATE_TORCH_DEVICE" not in os.environ
    PartialState._reset_state()
