"""A full disk is told from other faults, space is made where it may be, and nothing of a failed save is left."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from atr_scale import checkpoint_writer
from atr_scale.checkpoint import read_weights
from atr_scale.checkpoint_writer import DiskFull, HostCopies, Writing
from atr_scale.config import RunConfig
from atr_scale.distributed.world import World
from atr_scale.errors import Failure
from atr_scale.files import full_disk_in_one_line, is_full, unless_full
from atr_scale.run_checkpoints import Score, newest_first, verify, write_score
from atr_scale.training.monitor import Monitor
from atr_scale.training.saving import Saver
from tests.tiny_run import tiny_config

NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    config = tiny_config(tmp_path, tmp_path / "run", keep_checkpoints=2)
    (tmp_path / "run").mkdir()
    return config


class Fake:
    """A model of a thousand weights whose saves raise `fault`."""

    def __init__(self, fault: Exception | None = None) -> None:
        self.fault = fault
        self.model: Any = torch.nn.Linear(10, 100, bias=False)
        vars(self.model)["text_encoder"] = SimpleNamespace(save_files=self.save_files)

    def save_files(self, folder: Path) -> None:
        (folder / "config.json").write_bytes(bytes(1000))
        if self.fault:
            raise self.fault

    def state(self) -> dict[str, Any]:
        return {}

    def files(self, copies: HostCopies) -> dict[str, dict[str, torch.Tensor]]:
        return {"optimizer/rank-0.safetensors": {"moment": torch.zeros(1000)}}

    def copy_weights(self, copies: HostCopies) -> Callable[[], dict[str, torch.Tensor]]:
        copied = {name: copies.copy(name, value) for name, value in self.model.state_dict().items()}
        return lambda: copied


def saved(saver: Saver, fault: Exception | None = None, step: int = 1, ends: bool = False) -> bool:
    saver.start(Fake(fault), {"step": step}, lambda: ends)
    return saver.finish(lambda: ends)


def saver(config: RunConfig) -> Saver:
    return Saver(config, World(), Monitor(Path(config.run.dir), is_main=True), None)


def names(config: RunConfig) -> list[str]:
    return sorted(path.name for path in (Path(config.run.dir) / "checkpoints").iterdir())


def test_a_save_without_space_is_tried_again(config: RunConfig, caplog: pytest.LogCaptureFixture) -> None:
    tried = saver(config)
    assert saved(tried, None, 1, False)
    assert not saved(tried, NO_SPACE, 2, False)
    assert names(config) == ["step-1"]
    assert "step 2 of " in caplog.text and "nothing is saved since step-1; training goes on" in caplog.text
    with pytest.raises(Failure, match="nothing is saved since step-1: make space, and start the same command again"):
        saved(tried, NO_SPACE, 3, True)
    assert saved(tried, None, 4, False)
    lines = (Path(config.run.dir) / "metrics.jsonl").read_text()
    assert [line for line in lines.splitlines() if "saving" in line] == [
        f'{{"kind": "saving", "step": {step}, "failed": {failed}}}' for step, failed in ((2, 1), (3, 2), (4, 0))
    ]


def test_a_full_disk_of_another_machine_is_named(config: RunConfig, caplog: pytest.LogCaptureFixture) -> None:
    saver(config)._note(DiskFull("the disk /scratch of gpu02 is full: 1 MB are free"))
    assert "cannot be saved: the disk /scratch of gpu02 is full: 1 MB are free, a checkpoint needs " in caplog.text


def test_another_fault_of_writing_is_tried_again_too(config: RunConfig, caplog: pytest.LogCaptureFixture) -> None:
    tried, fault = saver(config), OSError(errno.EIO, "Input/output error")
    assert not saved(tried, fault, 1, False)
    assert "cannot be saved: [Errno 5] Input/output error; nothing is saved since the start" in caplog.text
    with pytest.raises(Failure, match="nothing is saved since the start: mend that, and start the same") as error:
        saved(tried, fault, 2, True)
    assert not isinstance(error.value, DiskFull)
    assert names(config) == []
    assert saved(tried, None, 3, False)
    assert (tried.failed, tried.heartbeat.fields()["failed_saves"]) == (0, 0)


def test_a_fault_is_said_when_it_happens(config: RunConfig, caplog: pytest.LogCaptureFixture) -> None:
    """Not when the next save asks for the result."""
    tried = saver(config)
    tried.start(Fake(NO_SPACE), {"step": 4}, lambda: False)
    end = time.monotonic() + 20
    while not tried.heartbeat.fields()["failed_saves"] and time.monotonic() < end:
        time.sleep(0.01)
    tried.record()
    assert caplog.text.count("step 4 of ") == 1
    line = json.loads((Path(config.run.dir) / "metrics.jsonl").read_text())
    assert (line["kind"], line["step"], line["failed"]) == ("saving", 4, 1)
    assert not tried.finish(lambda: False)
    assert caplog.text.count("step 4 of ") == 1 and tried.failed == 1


def test_a_save_waits_for_the_one_before(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are written, each with the weights of its own moment, although they share the memory of the copies."""
    own_files, order = Writing._own_files, list[str]()

    def slowly(writing: Writing) -> Any:
        time.sleep(0.3)
        order.append(f"{writing.final.name} is written")
        return own_files(writing)

    monkeypatch.setattr(Writing, "_own_files", slowly)
    tried, trained = saver(config), Fake()
    for step in (1, 2):
        trained.model.weight.data.fill_(step)
        tried.start(trained, {"step": step}, lambda: False)
        order.append(f"training goes on from step {step}")
    trained.model.weight.data.fill_(3)
    assert tried.finish(lambda: True)
    assert order == [
        "training goes on from step 1", "step-1 is written", "training goes on from step 2", "step-2 is written",
    ]  # fmt: skip
    for step in (1, 2):
        folder = Path(config.run.dir) / "checkpoints" / f"step-{step}"
        assert verify(folder) == [] and set(read_weights(folder)["weight"].unique().tolist()) == {step}


@pytest.mark.parametrize("suffices", [True, False])
def test_space_is_made_where_keep_allows(config: RunConfig, suffices: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best one, step-1, and the newest one are never removed for it."""
    run, tried = Path(config.run.dir), saver(config)
    for step in (1, 2, 3):
        assert saved(tried, None, step, False)
        if step == 1:
            write_score(run / "checkpoints" / "step-1", Score("t2a/R@1", 1.0))
    assert names(config) == ["step-1", "step-2", "step-3"]

    def usage(path: Path) -> SimpleNamespace:
        return SimpleNamespace(free=10**9 if suffices and len(newest_first(run)) < 3 else 0)

    monkeypatch.setattr("shutil.disk_usage", usage)
    assert saved(tried, None, 4, False) == suffices
    assert names(config) == ["step-1", "step-3", *(["step-4"] if suffices else [])]


def test_the_first_checkpoint_is_measured_by_its_parameters(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=(1 << 20) + 12 * 1000 - 1))
    assert not saved(saver(config), None, 1, False)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=(1 << 20) + 12 * 1000))
    assert saved(saver(config), None, 1, False)


def test_what_a_full_disk_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_full(NO_SPACE, tmp_path) and is_full(OSError(errno.EDQUOT, "quota"), tmp_path)
    assert is_full(SafetensorError("I/O error: No space left on device (os error 28)"), tmp_path)
    assert not is_full(SafetensorError("I/O error: Input/output error (os error 5)"), tmp_path)
    assert not is_full(OSError(errno.EIO, "x"), tmp_path)
    of_torch = OSError("basic_ios::clear: iostream error")  # torch does not say why
    assert not is_full(of_torch, tmp_path) and list(tmp_path.iterdir()) == []

    def full(path: Path, data: bytes) -> int:
        raise NO_SPACE

    monkeypatch.setattr(Path, "write_bytes", full)
    assert is_full(of_torch, tmp_path)


def test_only_a_full_disk_is_gone_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with unless_full(tmp_path, "results"):
        raise NO_SPACE
    assert "the disk is full, results cannot be written" in caplog.text
    with pytest.raises(PermissionError), unless_full(tmp_path, "results"):
        raise PermissionError(errno.EACCES, "x")


def test_weights_on_a_disk_without_space(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint_writer, "save_file", full)
    assert not saved(saver(config), None, 1, False)
    assert names(config) == []


def test_a_full_disk_elsewhere_is_one_line(tmp_path: Path) -> None:
    with (
        pytest.raises(Failure, match=r"the disk / is full: make space there for .*run"),
        full_disk_in_one_line(tmp_path / "run"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/no/such/file")
    with pytest.raises(PermissionError), full_disk_in_one_line(tmp_path):
        raise PermissionError(errno.EACCES, "x")
