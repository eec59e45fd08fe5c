"""Lock files: who is refused, who takes over, and what is left."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from atr_scale import locks
from atr_scale.errors import UserError
from atr_scale.locks import Holder, hold


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(locks, "TOUCH_S", 0.05)
    monkeypatch.setattr(locks, "STALE_S", 0.5)
    monkeypatch.setattr(locks, "GRACE_S", 0.3)
    return tmp_path / "run.lock"


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def left_by(lock: Path, **changes: Any) -> None:
    lock.write_text(json.dumps(asdict(replace(Holder.me(), token="other", **changes))))


def test_a_lock_is_there_while_it_is_held_and_nothing_is_left(lock: Path) -> None:
    with hold(lock, "the run"):
        assert [path.name for path in lock.parent.iterdir()] == ["run.lock"]
        first = lock.stat().st_mtime_ns
        time.sleep(0.3)
        assert lock.stat().st_mtime_ns > first, "it is touched"
    assert not list(lock.parent.iterdir())


def test_the_second_is_refused_and_leaves_the_first_alone(lock: Path) -> None:
    with hold(lock, "the run x"):
        with (
            pytest.raises(UserError, match=r"^the run folder x is in use by process \d+ on .+ since 2"),
            hold(lock, "the run folder x"),
        ):
            pass
        assert Holder.of(lock) is not None
        assert [path.name for path in lock.parent.iterdir()] == ["run.lock"]


def test_a_process_that_ends_is_waited_for(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank sees after seconds that its launcher was killed; the next start must not be refused meanwhile."""
    monkeypatch.setattr(locks, "GRACE_S", 60)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        left_by(lock, pid=process.pid, started=locks._start_of(process.pid))
        end = threading.Timer(0.3, process.communicate)
        end.start()
        with hold(lock, "x"):
            assert locks._start_of(process.pid) is None
        end.join()


def test_a_process_that_nobody_waits_for_has_ended() -> None:
    with subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.read()
        while locks._start_of(process.pid) is not None:
            time.sleep(0.01)
        assert Path(f"/proc/{process.pid}").exists(), "a zombie"
    assert locks._start_of(os.getpid()) is not None


def test_a_job_is_named(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    with hold(lock, "x"), pytest.raises(UserError, match=r"\(SLURM job 17, restart 0\)"), hold(lock, "x"):
        pass


@pytest.mark.parametrize("started", [None, 1], ids=["dead", "number in use by a younger process"])
def test_a_dead_process_of_this_machine_is_followed_at_once(
    started: int | None, lock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "STALE_S", 3600)
    left_by(lock, **({"pid": dead_process()} if started is None else {"started": started}))
    with hold(lock, "x"):
        found = Holder.of(lock)
        assert found and found.token != "other"


def test_a_lock_of_another_machine_is_void_without_a_sign_of_life(lock: Path, caplog: pytest.LogCaptureFixture) -> None:
    left_by(lock, machine="another", host="node9")
    with hold(lock, "x"):
        found = Holder.of(lock)
        assert found and found.token != "other"
    assert "on node9" in caplog.text and "no sign of life" in caplog.text


def test_a_lock_of_another_machine_that_is_touched_is_respected_whatever_the_clocks(lock: Path) -> None:
    left_by(lock, machine="another", host="node9")
    done = threading.Event()

    def touch() -> None:
        age = 10_000.0
        while not done.wait(0.05):
            age -= 1
            os.utime(lock, (time.time() - age,) * 2)  # a clock that is hours behind

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        with pytest.raises(UserError, match=r"in use by process .* on node9"), hold(lock, "x"):
            pass
    finally:
        done.set()
        thread.join()


def test_a_later_start_of_the_same_job_follows_at_once(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "STALE_S", 3600)
    left_by(lock, machine="another", job="17, restart 0")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with hold(lock, "x"):
        pass


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff", b'{"host": "a"'])
def test_a_damaged_lock_is_void_without_a_sign_of_life(content: bytes, lock: Path) -> None:
    lock.write_bytes(content)
    with hold(lock, "x"):
        assert Holder.of(lock) is not None


def test_a_lock_created_meanwhile_is_not_removed(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes find the same dead lock: the slower one must not remove the lock of the faster one."""
    left_by(lock, pid=dead_process())
    of: Callable[[Path], Holder | None] = Holder.of
    new = replace(Holder.me(), token="faster")

    def slow(path: Path) -> Holder | None:
        found = of(path)
        if found and found.token == "other":
            path.write_text(json.dumps(asdict(new)))
        return found

    monkeypatch.setattr(Holder, "of", staticmethod(slow))
    locks._put_aside(lock)
    assert of(lock) == new


def test_many_at_once_leave_one(lock: Path) -> None:
    inside, refused = [], []
    start = threading.Barrier(8)

    def work(number: int) -> None:
        start.wait()
        try:
            with hold(lock, "x"):
                inside.append(number)
                time.sleep(1)
        except UserError:
            refused.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(inside) == 1 and len(refused) == 7


def test_the_lock_in_a_copy_of_a_folder_is_void(lock: Path) -> None:
    """A run may be copied while it trains, and the copy trained on."""
    with hold(lock, "the run"):
        copy = lock.parent / "copy"
        copy.mkdir()
        shutil.copy(lock, copy)
        with hold(copy / lock.name, "the copy"):
            pass


def test_a_file_system_without_hard_links(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    with hold(lock, "x"), pytest.raises(UserError, match="x is in use"), hold(lock, "x"):
        pass
    assert not list(lock.parent.iterdir())
