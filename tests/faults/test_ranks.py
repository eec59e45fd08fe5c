"""Ranks that stop, and ranks that wait for something that never comes: the run ends and names them."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from atr_scale.run_files import ATTEMPTS, rank_file, read_json_lines, read_json_object, stacks_file
from tests.faults.runs import TinyRuns, family, free_port, tiny_runs
from tests.tiny_run import tiny_config

HANG_S = 8.0  # train.hang_seconds of the runs; a loaded machine needs some for a step
END_S = HANG_S + 60.0
LONG_RUN: dict[str, Any] = {"steps": 10**6, "checkpoint_every": 5, "log_every": 5, "hang_seconds": HANG_S}

# A rank that is blocked in what needs no other rank, while the rest waits for it.
BLOCKED = """
import sys, threading
from pathlib import Path
from atr_scale.distributed.start import distributed
from atr_scale.distributed.watchdog import Watchdog
from atr_scale.run_files import stacks_file
from atr_scale.training.heartbeat import Heartbeat
run = Path(sys.argv[1])
with distributed() as (world, _):
    heartbeat = Heartbeat(run, world, 1, hang_s=4.0)
    with heartbeat, Watchdog(world, heartbeat, stacks_file(run, 1, world.rank), lambda reason, first: None):
        for step in (1, 2):
            world.barrier()
            heartbeat.beat(step)
        with heartbeat.reading():
            if world.rank == 2:
                threading.Event().wait()
        world.barrier()
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    tiny_config(folder, folder)
    return folder


@contextmanager
def running(place: Path, inputs: Path) -> Iterator[TinyRuns]:
    """Trainings in a new folder of `place`; its inputs are in `inputs`."""
    place.mkdir()
    with tiny_runs(place, inputs) as runs:
        yield runs


def sign_of(runs: TinyRuns, rank: int) -> dict[str, Any]:
    """What that rank has written last about itself."""
    return read_json_object(rank_file(runs.folder(), rank)) or {}


def until_trained(runs: TinyRuns, ranks: int, attempt: int = 1) -> None:
    """Wait until all ranks train in that attempt and have made five steps or more."""

    def train(sign: dict[str, Any]) -> bool:
        return bool(sign and sign["attempt"] == attempt and sign["step"] >= 5 and sign["state"] == "training")

    runs.until(lambda: all(train(sign_of(runs, rank)) for rank in range(ranks)), f"{ranks} ranks train")


def stop(runs: TinyRuns, rank: int) -> int:
    """Stop the process of that rank and return its number."""
    pid = int(sign_of(runs, rank)["pid"])
    os.kill(pid, signal.SIGSTOP)
    return pid


def stacks(run: Path, rank: int) -> str:
    """What that rank has written about its threads in the first attempt."""
    return stacks_file(run, 1, rank).read_text()


def meeting_place(size: int) -> dict[str, str]:
    """The variables of a launcher that all ranks share."""
    return {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}


@pytest.mark.fault(
    "a rank hangs (SIGSTOP of rank 1 of two, torchrun)",
    expected="the other writes its stacks, the rank is named, all end within the limit + 60 s; the restart goes on",
)
def test_a_stopped_rank_is_named_and_the_launcher_starts_all_again(
    folder: Path, outcome: Callable[[str], None]
) -> None:
    with running(folder / "restarted", folder) as runs:
        launcher = runs.start(ranks=2, torchrun=["--max-restarts", "1"], **LONG_RUN)
        until_trained(runs, ranks=2)
        stopped = stop(runs, 1)
        began = time.monotonic()
        runs.until(lambda: not psutil.pid_exists(stopped), "the stopped rank is gone", END_S)
        seconds = time.monotonic() - began
        named = f"s: rank 1 (pid {stopped} on {socket.gethostname()}, last seen at step"
        assert runs.said().count(named) == 1, runs.said()
        assert "training/loop.py" in stacks(runs.folder(), 0)
        assert not stacks_file(runs.folder(), 1, rank=1).exists()
        until_trained(runs, ranks=2, attempt=2)
        launcher.terminate()
        runs.ended(launcher)
        ends = [line for line in read_json_lines(runs.folder() / ATTEMPTS) if line["event"] == "end"]
        assert [line["rc"] for line in ends] == [1, 0]
        assert "rank 1 " in ends[0]["reason"] and "is stopped or gone" in ends[0]["reason"]
        outcome(f"rank 1 named, all ranks gone after {seconds:.0f} s, started again and went on")


@pytest.mark.fault(
    "a rank hangs (SIGSTOP of rank 0 of two, torchrun without restarts)",
    expected="the other writes its stacks; torchrun ends within the limit + 60 s, and its report ends with the rank",
)
def test_a_stopped_rank_0_is_named_in_the_report_of_the_launcher(folder: Path, outcome: Callable[[str], None]) -> None:
    with running(folder / "reported", folder) as runs:
        launcher = runs.start(ranks=2, **LONG_RUN)
        until_trained(runs, ranks=2)
        stopped = stop(runs, 0)
        began = time.monotonic()
        assert runs.ended(launcher, END_S) == 1
        seconds = time.monotonic() - began
        report = runs.said()[runs.said().rindex("Root Cause") :]
        assert f"s: rank 0 (pid {stopped} on {socket.gethostname()}, last seen at step" in report
        assert "training/loop.py" in stacks(runs.folder(), 1)
        outcome(f"rc 1 after {seconds:.0f} s, rank 0 named in torchrun's report")


@pytest.mark.fault(
    "the rank that serves the store hangs (SIGSTOP of rank 0 of two, no launcher)",
    expected="the other one writes its stacks and ends within the limit + 60 s, although the store never answers",
)
def test_a_stopped_rank_0_with_the_store_ends_the_others(folder: Path, outcome: Callable[[str], None]) -> None:
    meeting = meeting_place(2)
    with running(folder / "store", folder) as runs:
        _, other = (runs.start(environment={"RANK": rank, "LOCAL_RANK": rank, **meeting}, **LONG_RUN) for rank in "01")
        until_trained(runs, ranks=2)
        stop(runs, 0)
        began = time.monotonic()
        assert runs.ended(other, END_S) == 1
        seconds = time.monotonic() - began
        assert f"s, and the store at 127.0.0.1:{meeting['MASTER_PORT']} does not answer" in runs.said()
        assert "training/loop.py" in stacks(runs.folder(), 1)
        sign = sign_of(runs, 1)
        assert sign["state"] == "ended" and "does not answer" in sign["reason"]
        outcome(f"rc 1 after {seconds:.0f} s, the store of rank 0 named")


@pytest.mark.fault(
    "a single process is blocked (a shard that never answers)",
    expected="it writes its stacks and ends with exit code 1 within the limit + 60 s",
)
def test_a_single_process_that_is_blocked_ends(folder: Path, tmp_path: Path, outcome: Callable[[str], None]) -> None:
    for name in ("train", "validation"):
        shutil.copytree(folder / name, tmp_path / "inputs" / name)
    with running(tmp_path / "blocked", tmp_path / "inputs") as runs:
        process = runs.start(**LONG_RUN)
        until_trained(runs, ranks=1)
        for shard in (tmp_path / "inputs" / "train" / "shards").glob("*.tar"):
            waits = shard.with_suffix(".waits")
            os.mkfifo(waits)  # opening it waits for a writer, as a server that hangs makes one wait
            os.replace(waits, shard)
        began = time.monotonic()
        assert runs.ended(process, END_S) == 1
        seconds = time.monotonic() - began
        assert re.search(r"^error: no progress for \d+ s: reading a batch after step \d+; stacks", runs.said(), re.M)
        assert "in _take" in stacks(runs.folder(), 0)
        assert "reading a batch" in sign_of(runs, 0)["reason"]
        assert "Traceback" not in runs.said()
        outcome(f"rc 1 after {seconds:.0f} s, blocked in reading a batch")


@pytest.mark.fault(
    "a loader worker hangs (SIGSTOP) in a training",
    expected="the worker and its shard are named, and the run ends with exit code 1 within the limit + 60 s",
)
def test_a_stopped_loader_worker_ends_the_run(folder: Path, outcome: Callable[[str], None]) -> None:
    with running(folder / "worker", folder) as runs:
        process = runs.start(overrides=("data.workers=1",), **{**LONG_RUN, "hang_seconds": 2 * HANG_S})
        until_trained(runs, ranks=1)
        (worker,) = (child for child in family(process.pid) if child.ppid() != process.pid)  # the fork server's
        worker.suspend()
        began = time.monotonic()
        assert runs.ended(process, 2 * HANG_S + 60) == 1
        seconds = time.monotonic() - began
        line = rf"^error: loader worker 0 \(pid {worker.pid}\), reading .*\.tar, is stopped"
        assert re.search(line, runs.said(), re.M), runs.said()
        assert not worker.is_running()
        outcome(f"rc 1 after {seconds:.0f} s, the worker and its shard named")


@pytest.mark.fault(
    "a rank is blocked while the others wait for it in a collective (three ranks)",
    expected="the blocked rank is named, once; every rank writes its stacks and ends with exit code 1",
)
def test_a_rank_that_does_not_come_is_named(tmp_path: Path, outcome: Callable[[str], None]) -> None:
    meeting = meeting_place(3)
    with (tmp_path / "log").open("wb") as log:
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", BLOCKED, str(tmp_path)], stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank), **meeting},
            )
            for rank in range(3)
        ]  # fmt: skip
    try:
        assert [process.wait(timeout=90) for process in ranks] == [1, 1, 1]
    finally:
        for process in ranks:
            process.kill()
    said = (tmp_path / "log").read_text()
    assert said.count("error: no progress") == 1, said
    named = (
        rf"rank 2 \(pid {ranks[2].pid} on .*, last seen at step 2, reading a batch\) hangs, and the other ranks wait"
    )
    assert re.search(named, said), said
    assert ["in barrier" in stacks(tmp_path, rank) for rank in range(3)] == [True, True, False]
    outcome("rank 2 named once, three files of stacks, all rc 1")
