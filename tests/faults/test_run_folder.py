"""A run folder that vanishes, or that becomes read-only, while a run trains in it."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.runs import TinyRuns, steps_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SLOW_STEPS = """
import time
from atr_scale.training.engine import Engine
update = Engine.update
def slowly(self, *args, **more):
    time.sleep(0.3)
    return update(self, *args, **more)
Engine.update = slowly
"""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system that can be made read-only."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def the_line(said: str) -> str:
    """The line that says why the run ended, which comes once."""
    found = [line.partition("error: ")[2] for line in said.splitlines() if "error: " in line]
    assert len(found) == 1, said[-4000:]
    return found[0]


@pytest.mark.fault("the run folder vanishes in mid-run", expected="one line, exit code 1, and nothing else is lost")
def test_a_folder_that_vanishes(runs: TinyRuns, outcome: Callable[[str], None]) -> None:
    process = runs.start(hooks=SLOW_STEPS, steps=100, checkpoint_every=3, log_every=1)
    runs.until_step(4)
    moved = runs.place / "moved"
    runs.folder().rename(moved)
    began = time.monotonic()
    assert runs.ended(process, 60) == 1
    seconds = time.monotonic() - began
    assert the_line(runs.said()).startswith(f"{runs.folder()} cannot be written to (it is gone): mend that, and ")
    assert "Traceback" not in runs.said()
    assert not runs.folder().exists()
    moved.rename(runs.folder())
    assert runs.ended(runs.start(steps=8, checkpoint_every=3, log_every=1)) == 0
    assert steps_of(runs.folder()) == list(range(1, 9))
    outcome(f"one line after {seconds:.0f} s; brought back, the run went on from its last checkpoint")


@pytest.mark.fault(
    "the run folder becomes read-only in mid-run",
    expected="one line, exit code 1 of all ranks, and nothing else is lost",
)
def test_a_folder_that_becomes_read_only(disk: Path, runs: TinyRuns, outcome: Callable[[str], None]) -> None:
    schedule: dict[str, Any] = {"steps": 100, "checkpoint_every": 3, "log_every": 1}
    place = (f"run.dir={disk / 'run'}",)
    process = runs.start(ranks=2, hooks=SLOW_STEPS, overrides=place, **schedule)
    runs.until(lambda: steps_of(disk / "run")[-1:] >= [4], "step 4")
    runs.until(lambda: remounted(disk, "ro"), "no file is open for writing")
    began = time.monotonic()
    assert runs.ended(process, 60) == 1
    seconds = time.monotonic() - began
    assert the_line(runs.said()).startswith(
        f"{disk / 'run'} cannot be written to (Read-only file system): mend that, and "
    )
    assert "[rank" not in runs.said(), "a traceback of a rank"
    assert remounted(disk, "rw")
    assert runs.ended(runs.start(ranks=2, overrides=place, **(schedule | {"steps": 8}))) == 0
    assert steps_of(disk / "run") == list(range(1, 9))
    outcome(f"one line after {seconds:.0f} s; writable again, the run went on from its last checkpoint")


def remounted(disk: Path, how: str) -> bool:
    """Whether the system did it: it refuses while a file is open for writing."""
    command = ["mount", "-o", f"remount,{how}", str(disk)]
    return subprocess.run(command, capture_output=True).returncode == 0
