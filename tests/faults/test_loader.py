"""Worker processes of a loader that are killed or stopped end their rank with one line that says which and where."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from atr_scale.batch import Batch
from atr_scale.data.stream import TrainingStream, read_batches
from atr_scale.errors import Failure
from tests.coded import open_stream, write_shards
from tests.tiny_run import tiny_config

pytestmark = pytest.mark.timeout(120)
Outcome = Callable[[str], None]


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> TrainingStream:
    multiprocessing.set_forkserver_preload(["atr_scale.data.stream", "tests.coded"])
    return open_stream(write_shards(tmp_path_factory.mktemp("coded"), range(20), shard_size=6))


def started(stream: TrainingStream, workers: int = 2, silence_s: float = 45) -> tuple[Iterator[Batch], list[int]]:
    """Batches of a long run, of which one from each worker was read, and the pids of the workers."""
    batches = read_batches(stream.between(0, 100_000), workers, silence_s=silence_s)
    for _ in range(workers):
        next(batches)
    pids = [stream.board.row(worker).pid for worker in range(workers)]
    assert all(pids)  # os.kill(0, ...) would end this process too
    return batches, pids


def end_of(batches: Iterator[Batch]) -> tuple[str, float]:
    """The line with which reading fails, and the seconds until then."""
    began = time.monotonic()
    with pytest.raises(Failure) as failure:
        for _ in batches:
            pass
    assert "\n" not in str(failure.value)
    return str(failure.value), time.monotonic() - began


def gone(pids: list[int]) -> bool:
    """Whether the processes end soon."""
    deadline = time.monotonic() + 20
    while any(psutil.pid_exists(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not any(psutil.pid_exists(pid) for pid in pids)


@pytest.mark.fault(
    "a loader worker is killed (SIGKILL)", expected="the rank ends within 60 s, exit code 1, naming worker and shard"
)
@pytest.mark.slow
def test_a_killed_worker(stream: TrainingStream, outcome: Outcome) -> None:
    batches, pids = started(stream)
    os.kill(pids[1], signal.SIGKILL)
    line, seconds = end_of(batches)
    shards = stream.sources[0].location
    assert line.startswith(f"loader worker 1 (pid {pids[1]}), reading {shards}/shard-00000"), line
    assert ".tar, was killed (SIGKILL): if that was the system for lack of memory (see dmesg), lower data." in line
    assert seconds < 60 and gone(pids)
    outcome(f"{seconds:.0f} s: loader worker 1 (pid), reading .../shard-N.tar, was killed (SIGKILL)")


@pytest.mark.slow
@pytest.mark.fault("a loader worker of a training is killed", expected="the training ends within 60 s, exit code 1")
def test_a_killed_worker_of_a_training(tmp_path: Path, outcome: Outcome) -> None:
    tiny_config(tmp_path, tmp_path / "run", steps=1_000_000)
    command = [sys.executable, "-m", "atr_scale.train", str(tmp_path / "tiny.yaml"), "data.workers=1"]
    log = tmp_path / "log"
    with open(log, "w") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        try:
            metrics = tmp_path / "run" / "metrics.jsonl"
            while process.poll() is None and not (metrics.exists() and metrics.read_text()):
                time.sleep(0.1)
            children = psutil.Process(process.pid).children(recursive=True)
            worker = next(each for each in children if each.ppid() != process.pid)  # of the fork server
            worker.kill()
            began = time.monotonic()
            code = process.wait(90)
        finally:
            process.kill()
    text, seconds = log.read_text(), time.monotonic() - began
    last = text.splitlines()[-1]
    assert code == 1 and "Traceback" not in text and seconds < 60, text
    assert last.startswith(f"error: loader worker 0 (pid {worker.pid}), reading {tmp_path}/train/shards/shard-"), text
    outcome(f"rc 1 after {seconds:.0f} s, one line that names worker and shard")


@pytest.mark.fault(
    "a loader worker is stopped (SIGSTOP)", expected="the rank ends in time, exit code 1, naming worker and shard"
)
@pytest.mark.parametrize("stopped", [0, 1])
@pytest.mark.slow
def test_a_stopped_worker(stream: TrainingStream, stopped: int, outcome: Outcome) -> None:
    batches, pids = started(stream, silence_s=4)
    os.kill(pids[stopped], signal.SIGSTOP)
    line, seconds = end_of(batches)
    assert line.startswith(f"loader worker {stopped} (pid {pids[stopped]}), reading "), line
    assert ".tar, is stopped (SIGSTOP), nothing was read for 4 s" in line
    assert seconds < 60 and gone(pids)
    outcome(f"{seconds:.0f} s with a limit of 4 s: loader worker {stopped} (pid), reading .../shard-N.tar, is stopped")


@pytest.mark.fault("/dev/shm is full while training", expected="one line that says /dev/shm and data.workers")
def test_no_room_in_shared_memory(stream: TrainingStream, outcome: Outcome) -> None:
    """The system ends a process with SIGBUS if it writes to shared memory for which there is no room."""
    batches, pids = started(stream)
    os.kill(pids[0], signal.SIGBUS)
    line, seconds = end_of(batches)
    assert "found no room in /dev/shm (" in line and "lower data.workers or data.buffer_gb" in line
    outcome(f"{seconds:.0f} s: {line.split('), reading')[0].split('(pid')[0]}... found no room in /dev/shm")


@pytest.mark.slow
def test_a_slow_consumer_is_no_hang(stream: TrainingStream) -> None:
    """Workers whose parcels nobody takes are idle; only one whose parcel is awaited can be silent."""
    batches, _ = started(stream, silence_s=1)
    for _ in range(3):
        time.sleep(2)
        next(batches)
    batches.close()  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.fault("/dev/shm is too small for the loader", expected="one line that says data.workers, exit code 2")
def test_a_small_shared_memory(tmp_path: Path, outcome: Outcome) -> None:
    own_mounts = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=300k tmpfs /dev/shm && exec "$@"', "sh"]
    if subprocess.run([*own_mounts, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small /dev/shm")
    tiny_config(tmp_path, tmp_path / "run")
    command = [*own_mounts, sys.executable, "-m", "atr_scale.train", str(tmp_path / "tiny.yaml"), "data.workers=2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and last.startswith("error: reading ahead needs 0.3 MB of shared memory"), done.stderr
    assert "data.workers = 2" in last and "enlarge /dev/shm" in last
    outcome(f"rc 2: {last.removeprefix('error: ').split(',')[0]}")
