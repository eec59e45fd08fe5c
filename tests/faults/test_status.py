"""`atr-scale status` beside a real run: while it trains, after kill -9, after SIGTERM and at its end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from atr_scale.run_files import DROPPED, read_json_lines
from atr_scale.status import RunStatus, is_run, read_status
from tests.faults.runs import TinyRuns, tiny_runs
from tests.tiny_run import tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def spoil_a_clip(shards: Path) -> str:
    """Overwrite the audio of one sample; its place as the run names it."""
    shard = min(shards.glob("*.tar"))
    with tarfile.open(shard) as tar:
        member = next(member for member in tar.getmembers() if not member.name.endswith(".json"))
    with shard.open("r+b") as file:
        file.seek(member.offset_data)
        file.write(bytes(member.size))
    return f"{shard.name}/{member.name.partition('.')[0]}"


def until(runs: TinyRuns, holds: Callable[[RunStatus], bool], what: str, seconds: float = 150) -> RunStatus:
    """The status when `holds` is true of it."""
    run = runs.folder()

    def found() -> RunStatus | None:
        status = read_status(run) if run.is_dir() and is_run(run) else None
        return status if status and holds(status) else None

    status: RunStatus = runs.until(found, what, seconds)
    return status


def shown(run: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "atr_scale.cli", "status", str(run), "--json"]
    return dict(json.loads(subprocess.run(command, check=True, capture_output=True, timeout=60).stdout))


@pytest.mark.fault(
    "who comes back asks how a run goes: training, killed with kill -9, told to stop, done",
    expected="`status` says state, step and reason from the files alone, and what the restarts have cost",
)
def test_status_of_a_run_through_its_life(tmp_path: Path, outcome: Callable[[str], None]) -> None:
    inputs = tmp_path / "inputs"
    with tiny_runs(tmp_path, inputs) as runs:
        run = runs.folder()
        tiny_config(inputs, run)
        spoiled = spoil_a_clip(inputs / "train" / "shards")
        process = runs.start(steps=100_000, checkpoint_every=10)
        training = until(runs, lambda status: status.state == "training" and status.step > 12, "step 13")
        assert training.step_seconds and training.eta_s and training.checkpoint_step and not training.silent_ranks

        process.kill()
        started = time.monotonic()
        killed = until(runs, lambda status: not status.running, "an end is seen", 30)
        noticed = time.monotonic() - started
        assert killed.state == "killed" and killed.step >= training.step

        process = runs.start(steps=100_000, checkpoint_every=10)
        resumed = until(
            runs, lambda status: status.state == "training" and status.step > killed.step, "the run has gone on"
        )
        assert resumed.attempts[0].reason == "killed" and resumed.lost_s > 0
        process.send_signal(signal.SIGTERM)
        assert runs.ended(process) == 0
        found = shown(run)
        stopped = found["step"]
        assert (found["state"], found["checkpoint_step"]) == ("preempted", stopped)
        assert found["reason"].startswith("told to stop (SIGTERM)") and found["eta_s"] is None

        assert runs.ended(runs.start(steps=stopped + 2, checkpoint_every=10)) == 0
        found, said = shown(run), runs.said()
    assert (found["state"], found["step"], found["steps"]) == ("done", stopped + 2, stopped + 2)
    assert [attempt["reason"] for attempt in found["attempts"]] == ["killed", "preempted", "done"]
    assert found["repeated_steps"] == found["attempts"][1]["repeated_steps"] <= 10 + 5
    dropped = read_json_lines(run / DROPPED)
    assert {line["sample"].partition("/")[2] for line in dropped} == {spoiled}
    assert 0 < len(dropped) == sum(found["dropped"].values()), "each visit is counted and named once"
    assert f"for example corpus/{spoiled}" in said
    outcome(f"right in all four; killed is seen after {noticed:.0f} s")
