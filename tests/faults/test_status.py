"""`atr-scale status` beside a real run: while it trains, after kill -9, after SIGTERM and at its end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from atr_scale.run_files import DROPPED, read_json_lines
from atr_scale.status import RunStatus, read_status
from atr_scale.status_text import status_page
from tests.tiny_run import tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def train(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts the run as a process; none is left behind."""
    processes: list[subprocess.Popen[bytes]] = []

    def begin(**train: Any) -> subprocess.Popen[bytes]:
        path = tmp_path / "run.yaml"
        path.write_text(tiny_config(tmp_path, tmp_path / "run", checkpoint_every=10, **train).to_yaml())
        log = (tmp_path / "log").open("ab")
        command = [sys.executable, "-m", "atr_scale.train", str(path)]
        processes.append(subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}))
        return processes[-1]

    yield begin
    for process in processes:
        process.kill()
        process.wait()


def spoil_a_clip(shards: Path) -> str:
    """Overwrite the audio of one sample; its place as the run names it."""
    shard = min(shards.glob("*.tar"))
    with tarfile.open(shard) as tar:
        member = next(member for member in tar.getmembers() if not member.name.endswith(".json"))
    with shard.open("r+b") as file:
        file.seek(member.offset_data)
        file.write(bytes(member.size))
    return f"{shard.name}/{member.name.partition('.')[0]}"


def until(run: Path, holds: Callable[[RunStatus], bool], seconds: float = 150) -> RunStatus:
    deadline, seen = time.monotonic() + seconds, "no run"
    while time.monotonic() < deadline:
        if run.is_dir():
            found = read_status(run)
            if holds(found):
                return found
            seen = status_page(found)
        time.sleep(0.3)
    raise AssertionError(f"not so after {seconds} s: {seen}\n{(run.parent / 'log').read_text()[-3000:]}")


def shown(run: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "atr_scale.cli", "status", str(run), "--json"]
    return dict(json.loads(subprocess.run(command, check=True, capture_output=True, timeout=60).stdout))


@pytest.mark.fault(
    "who comes back asks how a run goes: training, killed with kill -9, told to stop, done",
    expected="`status` says state, step and reason from the files alone, and what the restarts have cost",
)
def test_status_of_a_run_through_its_life(
    train: Callable[..., subprocess.Popen[bytes]], tmp_path: Path, outcome: Callable[[str], None]
) -> None:
    run = tmp_path / "run"
    tiny_config(tmp_path, run)
    spoiled = spoil_a_clip(tmp_path / "train" / "shards")
    process = train(steps=100_000)
    training = until(run, lambda status: status.state == "training" and status.step > 12)
    assert training.step_seconds and training.eta_s and training.checkpoint_step and not training.silent_ranks

    process.kill()
    started = time.monotonic()
    killed = until(run, lambda status: not status.running, 30)
    noticed = time.monotonic() - started
    assert killed.state == "killed" and killed.step >= training.step

    process = train(steps=100_000)
    resumed = until(run, lambda status: status.state == "training" and status.step > killed.step)
    assert resumed.attempts[0].reason == "killed" and resumed.lost_s > 0
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 0
    found = shown(run)
    stopped = found["step"]
    assert (found["state"], found["checkpoint_step"]) == ("preempted", stopped)
    assert found["reason"].startswith("told to stop (SIGTERM)") and found["eta_s"] is None

    assert train(steps=stopped + 2).wait(150) == 0
    found = shown(run)
    assert (found["state"], found["step"], found["steps"]) == ("done", stopped + 2, stopped + 2)
    assert [attempt["reason"] for attempt in found["attempts"]] == ["killed", "preempted", "done"]
    assert found["repeated_steps"] == found["attempts"][1]["repeated_steps"] <= 10 + 5
    dropped = read_json_lines(run / DROPPED)
    assert {line["sample"].partition("/")[2] for line in dropped} == {spoiled}
    assert 0 < len(dropped) == sum(found["dropped"].values()), "each visit is counted and named once"
    assert f"for example corpus/{spoiled}" in (tmp_path / "log").read_text()
    outcome(f"right in all four; killed is seen after {noticed:.0f} s")
