"""The status of a run follows from the files of its folder, whatever is missing, damaged or old."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from atr_scale import cli
from atr_scale.errors import UserError
from atr_scale.run_files import ATTEMPTS, METRICS, PREEMPTED, append_json_lines, rank_file
from atr_scale.status import RUNNING, RunStatus, read_status
from atr_scale.status_text import status_page, status_table

HERE = socket.gethostname()


@pytest.fixture(scope="module")
def dead() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def start(run: Path, attempt: int = 1, at: float = 100.0, step: int | None = 0, world_size: int = 2) -> None:
    common = {"attempt": attempt, "time": at, "world_size": world_size, "host": "gpu01", "pid": 4, "job": "77"}
    append_json_lines(run / ATTEMPTS, [{"event": "start", **common}])
    if step is not None:
        line = {"event": "training", "attempt": attempt, "time": at + 10, "step": step, "steps": 100}
        append_json_lines(run / ATTEMPTS, [line])


def end(run: Path, reason: str, step: int, attempt: int = 1, at: float = 200.0, rc: int | None = 0) -> None:
    line = {"event": "end", "attempt": attempt, "time": at, "rank": 0, "reason": reason, "step": step, "rc": rc}
    append_json_lines(run / ATTEMPTS, [line])


def beat(run: Path, rank: int = 0, *, age: float = 1.0, idle: float = 1.0, **fields: Any) -> None:
    """A rank that wrote `age` seconds ago, and had made progress `idle` seconds before that."""
    now = time.time() - age
    values = {
        "rank": rank, "host": HERE, "pid": os.getpid(), "attempt": 1, "state": "training", "wait": None, "step": 40,
        "steps": 100, "samples_seen": 480, "dropped": {}, "skipped_steps": 0, "fp16_overflows": 0, "retries": 0,
        "step_seconds": 2.0, "started": time.time(), "beat": now - idle, "limit": 60.0, "written": now, "reason": None,
    }  # fmt: skip
    path = rank_file(run, rank)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**values, **fields}))
    os.utime(path, (now, now))


def state(run: Path) -> tuple[str, str | None]:
    found = read_status(run)
    assert status_page(found) and status_table([found]) and json.dumps(found.as_json(), allow_nan=False)
    return found.state, found.reason


@pytest.mark.parametrize("phase", ["starting", "training", "evaluating", "saving"])
def test_a_run_does_what_its_ranks_do(tmp_path: Path, phase: str) -> None:
    start(tmp_path)
    beat(tmp_path, 0, state=phase)
    beat(tmp_path, 1)
    assert state(tmp_path) == (phase, None)
    assert read_status(tmp_path).step == 40


def test_a_run_whose_rank_waits_for_the_store_waits(tmp_path: Path) -> None:
    start(tmp_path)
    beat(tmp_path, 0)
    beat(tmp_path, 1, state="waiting", wait="the store s3://bucket", retries=3)
    assert state(tmp_path) == ("waiting", "the store s3://bucket")
    assert read_status(tmp_path).retries == 3


@pytest.mark.parametrize("age", [1.0, 200.0])
def test_the_rank_that_others_wait_for_is_named(tmp_path: Path, age: float) -> None:
    """It may write on while its training thread is blocked, or be stopped as a whole."""
    start(tmp_path)
    beat(tmp_path, 0, idle=90)
    beat(tmp_path, 1, idle=1000, step=39, age=age)
    found, why = state(tmp_path)
    assert found == "hung" and why is not None and why.startswith(f"rank 1 on {HERE} at step 39: no progress for 1")
    assert read_status(tmp_path).silent_ranks == ([] if age == 1 else [1])


def test_a_long_wait_that_is_declared_is_no_hang(tmp_path: Path) -> None:
    start(tmp_path)
    beat(tmp_path, state="saving", idle=90, limit=3600.0)
    assert state(tmp_path) == ("saving", None)


def test_a_rank_whose_process_is_gone_is_named(tmp_path: Path, dead: int) -> None:
    start(tmp_path)
    beat(tmp_path, 0)
    beat(tmp_path, 1, pid=dead, age=6)
    assert state(tmp_path) == ("hung", f"rank 1 on {HERE} left no word, the others wait")


def test_processes_that_are_gone_without_a_word_were_killed(tmp_path: Path, dead: int) -> None:
    start(tmp_path)
    beat(tmp_path, 0, pid=dead, age=6)
    assert state(tmp_path)[0] == "killed"


def test_a_process_with_a_used_process_id_is_another_one(tmp_path: Path) -> None:
    start(tmp_path)
    beat(tmp_path, started=1e9, age=6)
    assert state(tmp_path)[0] == "killed"


@pytest.mark.parametrize(("age", "expected"), [(5, "training"), (-900, "training"), (100, "hung"), (400, "killed")])
def test_on_another_machine_the_age_of_the_signs_tells(tmp_path: Path, age: float, expected: str) -> None:
    start(tmp_path)
    beat(tmp_path, host="elsewhere", age=age)
    assert state(tmp_path)[0] == expected


def test_a_machine_whose_clock_is_behind_is_not_dead(tmp_path: Path) -> None:
    start(tmp_path)
    beat(tmp_path, host="elsewhere", age=4000)
    os.utime(rank_file(tmp_path, 0))  # the file server's clock
    assert state(tmp_path) == ("training", None)


@pytest.mark.parametrize(
    ("reason", "rc", "expected"),
    [("done", 0, "done"), ("preempted", 0, "preempted"), ("the store could not be reached", 1, "failed")],
)
def test_the_end_says_why(tmp_path: Path, reason: str, rc: int, expected: str, dead: int) -> None:
    start(tmp_path)
    beat(tmp_path, pid=dead, state="ended")
    end(tmp_path, reason, 55, rc=rc)
    (tmp_path / PREEMPTED).write_text("SIGTERM\n")
    why = {"done": None, "preempted": "told to stop (SIGTERM), and it has saved", "failed": reason}[expected]
    assert state(tmp_path) == (expected, why)
    assert read_status(tmp_path).step == 55


def test_a_run_that_was_told_to_stop_before_it_trained_has_saved_nothing(tmp_path: Path) -> None:
    start(tmp_path, step=None)
    end(tmp_path, "preempted", 0)
    (tmp_path / PREEMPTED).write_text("SIGTERM\n")
    assert state(tmp_path) == ("preempted", "told to stop (SIGTERM), and it had not yet trained")


def test_a_reason_that_only_a_rank_has_left_counts(tmp_path: Path, dead: int) -> None:
    start(tmp_path)
    beat(tmp_path, 0, pid=dead, age=6)
    beat(tmp_path, 1, pid=dead, age=6, state="ended", reason="no space left")
    assert state(tmp_path) == ("failed", f"rank 1 on {HERE}: no space left")


def test_a_rank_that_was_killed_is_named_before_what_its_peers_saw(tmp_path: Path, dead: int) -> None:
    start(tmp_path)
    beat(tmp_path, 0, pid=dead, age=6, state="ended", reason="connection closed")
    beat(tmp_path, 1, pid=dead, age=6)
    line = {"event": "end", "attempt": 1, "time": 200.0, "rank": 0, "reason": "RuntimeError: connection closed"}
    append_json_lines(tmp_path / ATTEMPTS, [{**line, "step": 4, "rc": 1, "known": False}])
    found, why = state(tmp_path)
    assert found == "failed" and why is not None
    assert why.startswith(f"rank 1 on {HERE} left no word: killed") and why.endswith("RuntimeError: connection closed")


def test_signs_of_an_attempt_before_do_not_count(tmp_path: Path) -> None:
    start(tmp_path)
    end(tmp_path, "killed", 44, rc=None)
    start(tmp_path, 2, at=time.time(), step=30)
    beat(tmp_path, 0, attempt=2, step=0)
    beat(tmp_path, 1, attempt=1, step=44)
    found = read_status(tmp_path)
    assert (found.state, found.step, found.silent_ranks) == ("training", 30, [1])


def test_attempts_tell_what_restarts_have_cost(tmp_path: Path) -> None:
    start(tmp_path, 1, at=100, step=0)
    end(tmp_path, "killed", 45, 1, at=200, rc=None)  # 90 s for 45 steps
    start(tmp_path, 2, at=260, step=30)
    end(tmp_path, "done", 100, 2, at=500)
    start(tmp_path, 3, at=9000, step=100)
    found = read_status(tmp_path)
    assert [attempt.repeated_steps for attempt in found.attempts] == [0, 15, 0]
    # 60 s between them, 10 s of starting, 15 steps of 2 s; a run that is prolonged has only lost the start
    assert [attempt.lost_s for attempt in found.attempts] == [0, 60 + 10 + 30, 10]
    assert found.repeated_steps == 15 and found.lost_s == 110
    assert "3; lost 110 s, 15 steps repeated" in status_page(found).replace("2 min", "110 s")


def test_counts_and_checkpoints_are_shown(tmp_path: Path) -> None:
    start(tmp_path)
    beat(tmp_path, 0, dropped={"silent_audio": 7}, skipped_steps=2)
    beat(tmp_path, 1, step=39, idle=3)
    append_json_lines(tmp_path / METRICS, [{"kind": "train", "step": 40, "samples_per_s": 123.4}])
    for step in (20, 30):
        folder = tmp_path / "checkpoints" / f"step-{step}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
        (folder / "state.json").write_text('{"step": 30, "best": 0.25, "best_metric": "t2a/R@1"}')
    (tmp_path / "best").symlink_to(Path("checkpoints") / "step-20")
    found = read_status(tmp_path)
    assert (found.checkpoint_step, found.best_step, found.best_value) == (30, 20, 0.25)
    assert found.checkpoint_age_s is not None and found.checkpoint_age_s < 60
    assert found.slowest is not None and found.slowest.rank == 1
    page = status_page(found)
    assert "training, step 40 of 100 (40 %)" in page and "7 silent_audio" in page and "2 non-finite" in page
    assert "step 30, 0 s ago; best: step 20 (t2a/R@1 0.25)" in page and "123.4 samples/s, 2 s a step, ETA" in page
    assert "2 of 2 give signs of life; last in line: rank 1" in page
    assert "step 20 (validation score 0.25)" in status_page(replace(found, best_metric=None))


@pytest.mark.parametrize(("step", "expected"), [(100, "done"), (60, "unknown")])
def test_a_run_of_an_older_version(tmp_path: Path, step: int, expected: str) -> None:
    append_json_lines(tmp_path / METRICS, [{"kind": "train", "step": step, "dropped/cut_shard": 3.0}])
    (tmp_path / "results.json").write_text('{"training": {"step": 0, "steps": 100}}')
    assert state(tmp_path)[0] == expected
    found = read_status(tmp_path)
    assert (found.step, found.steps, found.dropped, found.attempts) == (step, 100, {"cut_shard": 3}, [])


def test_what_is_no_run_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run at .*: the folder holds none of"):
        read_status(tmp_path)
    with pytest.raises(UserError, match=r"no run at .*: there is no such folder"):
        read_status(tmp_path / "nothing")


def test_a_file_without_permission_is_not_a_missing_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / ATTEMPTS)  # as root all is permitted
    with pytest.raises(UserError, match=r"attempts\.jsonl cannot be read \(permission denied\)"):
        read_status(tmp_path)


def test_the_verb_prints_a_page_a_table_or_json(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        start(tmp_path / name)
        end(tmp_path / name, "done", 100)
    (tmp_path / "other").mkdir()

    def output(*arguments: str) -> str:
        result = CliRunner().invoke(cli.app, ["status", *arguments])
        assert result.exit_code == 0, result.output
        return result.stdout

    one, two, other = (str(tmp_path / name) for name in ("one", "two", "other"))
    assert output(one).startswith(f"{one}: done, step 100 of 100 (100 %)\n")
    assert [line.split()[1] for line in output(one, two, other).splitlines()] == ["state", "done", "done"]
    found = json.loads(output(one, "--json"))
    assert (found["schema"], found["step"], found["state"], found["reason"]) == (1, 100, "done", None)
    assert [each["run"] for each in json.loads(output(one, two, "--json"))] == [one, two]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "a", "\n\0", "\ud800"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_no_damage_is_a_traceback(tmp_path: Path, data: st.DataObject) -> None:
    files: dict[str, Any] = {
        "status/rank-0.json": {"rank": 0, "host": HERE, "pid": 1, "attempt": 1, "state": "training", "step": 4,
            "steps": 9, "step_seconds": 1.5, "started": 1e9, "beat": 1e9, "written": 1e9, "limit": 60.0,
            "dropped": {"a": 1}, "reason": None, "retries": 0},
        ATTEMPTS: {"event": "start", "attempt": 1, "time": 1e9, "host": HERE, "pid": 1, "world_size": 2},
        METRICS: {"kind": "train", "step": 3, "samples_per_s": 2.0, "dropped/a": 1.0},
        "results.json": {"training": {"step": 1, "steps": 9}},
        "checkpoints/step-3/state.json": {"step": 3, "best": 0.1, "best_metric": "R@1"},
    }  # fmt: skip
    for name, values in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        spoiled = data.draw(st.sets(st.sampled_from(sorted(values)), max_size=3))
        changed = {key: data.draw(JSON) if key in spoiled else value for key, value in values.items()}
        whole = json.dumps(changed).encode() + b"\n"
        path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))] if data.draw(st.booleans()) else whole)
    found: RunStatus = read_status(tmp_path)
    assert (status_page(found) + status_table([found, found])).encode()
    assert json.dumps(found.as_json(), allow_nan=False)


def test_the_page_explains_every_state_and_key(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "operations.md").read_text(encoding="utf-8")
    start(tmp_path)
    beat(tmp_path)
    found = read_status(tmp_path).as_json()
    keys = {*found, *found["attempts"][0], *found["ranks"][0]}
    named = set(re.findall(r"`(\w+)`", page))
    assert keys - named == set()
    assert {*RUNNING, "done", "preempted", "failed", "killed", "unknown"} - named == set()
