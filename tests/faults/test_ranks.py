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

import pytest

from atr_scale.run_files import ATTEMPTS, STATUS, rank_file, read_json_lines, read_json_object, stacks_file
from tests.tiny_run import tiny_config

HANG_S = 8.0  # train.hang_seconds of the runs; a loaded machine needs some for a step
END_S = HANG_S + 60.0
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
LONG = 10**6  # steps

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


class Run:
    """A training as real processes that write to one log."""

    def __init__(self, folder: Path, name: str, **train: Any) -> None:
        self.dir, self._log = folder / name, folder / f"{name}.log"
        settings = {"steps": LONG, "checkpoint_every": 5, "log_every": 5, "hang_seconds": HANG_S, **train}
        self.config = folder / f"{name}.yaml"
        self.config.write_text(tiny_config(folder, self.dir, **settings).to_yaml())
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, *launcher: str, **variables: str) -> subprocess.Popen[bytes]:
        command = [*(launcher or [sys.executable]), "-m", "atr_scale.train", str(self.config)]
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1", **variables}
            )
        self.processes.append(process)
        return process

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def rank(self, rank: int) -> dict[str, Any]:
        return read_json_object(rank_file(self.dir, rank)) or {}

    def until_step(self, step: int, ranks: int, attempt: int = 1) -> None:
        """Wait until all ranks are in that attempt and have said that they have made `step` steps."""

        def reached(said: dict[str, Any]) -> bool:
            return bool(said and said["attempt"] == attempt and said["step"] >= step and said["state"] == "training")

        until = time.monotonic() + 120
        while not all(reached(self.rank(rank)) for rank in range(ranks)):
            assert time.monotonic() < until, self.log[-3000:]
            time.sleep(0.1)

    def stacks(self, rank: int, attempt: int = 1) -> str:
        return stacks_file(self.dir, attempt, rank).read_text()


def meeting_place(size: int) -> dict[str, str]:
    """The variables of a launcher that all ranks share."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}


@contextmanager
def running(run: Run) -> Iterator[Run]:
    """Kills what is left of the run at the end."""
    try:
        yield run
    finally:
        left = [said["pid"] for path in (run.dir / STATUS).glob("rank-*.json") if (said := read_json_object(path))]
        for pid in (process.pid for process in run.processes if process.poll() is None):
            os.kill(pid, signal.SIGKILL)
        for pid in left:
            if Path(f"/proc/{pid}/cmdline").exists() and b"atr_scale" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)


@pytest.mark.fault(
    "a rank hangs (SIGSTOP of one of two ranks, torchrun)",
    expected="the others write their stacks, the rank is named, all end within the limit + 60 s; the restart goes on",
)
@pytest.mark.parametrize(("rank", "shutdown_s"), [(1, "30"), (0, "5")])
def test_a_stopped_rank_is_named_and_the_launcher_starts_all_again(
    rank: int, shutdown_s: str, folder: Path, outcome: Callable[[str], None]
) -> None:
    with running(Run(folder, f"stopped-{rank}", keep_checkpoints=2)) as run:
        launcher = run.start(*TORCHRUN, "--max-restarts", "1", TORCH_ELASTIC_SHUTDOWN_TIMEOUT=shutdown_s)
        run.until_step(5, ranks=2)
        stopped = run.rank(rank)["pid"]
        os.kill(stopped, signal.SIGSTOP)
        began = time.monotonic()
        while Path(f"/proc/{stopped}").exists():
            assert time.monotonic() < began + END_S, run.log[-3000:]
            time.sleep(0.1)
        seconds = time.monotonic() - began
        named = f"rank {rank} (pid {stopped} on {socket.gethostname()}, last seen at step"
        assert run.log.count(f"s: {named}") == 1, run.log[-3000:]
        assert "training/loop.py" in run.stacks(1 - rank)
        assert not stacks_file(run.dir, 1, rank).exists()
        run.until_step(6, ranks=2, attempt=2)
        launcher.terminate()
        launcher.wait(timeout=60)
        ends = [line for line in read_json_lines(run.dir / ATTEMPTS) if line["event"] == "end"]
        assert [line["rc"] for line in ends] == [1, 0]
        assert f"rank {rank} " in ends[0]["reason"] and "is stopped or gone" in ends[0]["reason"]
        outcome(f"rank {rank} named, all ranks gone after {seconds:.0f} s, started again")


@pytest.mark.fault(
    "the rank that serves the store hangs (SIGSTOP of rank 0 of two, no launcher)",
    expected="the other one writes its stacks and ends within the limit + 60 s, although the store never answers",
)
def test_a_stopped_rank_0_with_the_store_ends_the_others(folder: Path, outcome: Callable[[str], None]) -> None:
    meeting = meeting_place(2)
    with running(Run(folder, "store")) as run:
        main, other = (run.start(RANK=rank, LOCAL_RANK=rank, **meeting) for rank in "01")
        run.until_step(5, ranks=2)
        os.kill(main.pid, signal.SIGSTOP)
        began = time.monotonic()
        assert other.wait(timeout=END_S) == 1
        seconds = time.monotonic() - began
        assert f"s, and the store at 127.0.0.1:{meeting['MASTER_PORT']} does not answer" in run.log
        assert "training/loop.py" in run.stacks(1)
        assert run.rank(1)["state"] == "ended" and "does not answer" in run.rank(1)["reason"]
        outcome(f"rc 1 after {seconds:.0f} s, the store of rank 0 named")


@pytest.mark.fault(
    "a single process is blocked (a shard that never answers)",
    expected="it writes its stacks and ends with exit code 1 within the limit + 60 s",
)
def test_a_single_process_that_is_blocked_ends(folder: Path, tmp_path: Path, outcome: Callable[[str], None]) -> None:
    shutil.copytree(folder / "train", tmp_path / "train")
    shutil.copytree(folder / "validation", tmp_path / "validation")
    with running(Run(tmp_path, "blocked")) as run:
        process = run.start()
        run.until_step(5, ranks=1)
        for shard in (tmp_path / "train" / "shards").glob("*.tar"):
            waits = shard.with_suffix(".waits")
            os.mkfifo(waits)  # opening it waits for a writer, as a server that hangs makes one wait
            os.replace(waits, shard)
        began = time.monotonic()
        assert process.wait(timeout=END_S) == 1, run.log[-3000:]
        seconds = time.monotonic() - began
        assert re.search(r"^error: no progress for \d+ s: reading a batch after step \d+; stacks", run.log, re.M)
        assert "in _take" in run.stacks(0)
        assert "reading a batch" in run.rank(0)["reason"]
        assert "Traceback" not in run.log
        outcome(f"rc 1 after {seconds:.0f} s, blocked in reading a batch")


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
    stacks = [stacks_file(tmp_path, 1, rank).read_text() for rank in range(3)]
    assert ["in barrier" in text for text in stacks] == [True, True, False]
    outcome("rank 2 named once, three files of stacks, all rc 1")
