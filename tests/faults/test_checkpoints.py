"""Faults of checkpoints, and of what a run reads, between two starts of real runs."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from atr_scale.run_checkpoints import newest_first, verify
from atr_scale.run_files import CHANGED_DATA, METRICS, read_json_lines
from atr_scale.status import read_status
from tests.faults.runs import TinyRuns, steps_of
from tests.tiny import make_tiny_inputs

pytestmark = pytest.mark.slow


@pytest.mark.fault(
    "other clips lie at the path of the training shards when a run is resumed",
    expected="refused with exit code 2 and the key; run.allow_changed_data=true goes on and records it",
)
def test_other_data_at_the_same_path(runs: TinyRuns, tmp_path: Path, outcome: Callable[[str], None]) -> None:
    runs.inputs = tmp_path
    assert runs.ended(runs.start(steps=2, log_every=1)) == 0
    shards = tmp_path / "train" / "shards"
    shutil.rmtree(shards)
    make_tiny_inputs(tmp_path / "others", 25).shards.rename(shards)

    assert runs.ended(runs.start(steps=3, log_every=1)) == 2
    assert (
        f"error: not what {runs.folder()} was trained on up to step 2: data.train[0].shards ({shards})" in runs.said()
    )
    assert steps_of(runs.folder()) == [1, 2] and "Traceback" not in runs.said()

    overrides = ("run.allow_changed_data=true",)
    assert runs.ended(runs.start(steps=3, log_every=1, overrides=overrides)) == 0
    (line,) = read_json_lines(runs.folder() / CHANGED_DATA)
    assert (line["step"], [*line["changed"]]) == (2, ["data.train[0].shards"])
    outcome("refused by name, rc 2; gone on with when it was allowed")


SLOW = """
import time
from atr_scale.training.engine import Engine
update = Engine.update
def slowly(self, *args, **more):
    time.sleep(0.3)
    return update(self, *args, **more)
Engine.update = slowly
"""
UNSEEN = """
import shutil
from collections import namedtuple
shutil.disk_usage = lambda path: namedtuple("Usage", "total used free")(1 << 40, 0, 1 << 40)
"""


@pytest.fixture
def small_disk(runs: TinyRuns) -> Iterator[Path]:
    """A file system of 80 MB, whose root is the run folder."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    folder = runs.folder()
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no mount: {mounted.stderr.decode()}")
    try:
        yield folder
    finally:
        runs.kill_all()
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path, left: int) -> Path:
    filler = disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(disk).free - left))
    return filler


def saves(run: Path) -> list[Any]:
    return [line["failed"] for line in read_json_lines(run / METRICS) if line["kind"] == "saving"]


@pytest.mark.fault(
    "the disk is full when two ranks are to save",
    expected="training goes on, a line names the disk and what is missing, the next save with space works",
)
def test_a_full_disk(runs: TinyRuns, small_disk: Path, outcome: Callable[[str], None]) -> None:
    runs.start(ranks=2, steps=10_000, checkpoint_every=2, log_every=1, zero_stage=1, hooks=SLOW)
    runs.until(lambda: (small_disk / "latest").exists(), "a checkpoint is saved")
    filler = fill(small_disk, left=300_000)
    runs.until_said("ERROR rank 0 atr_scale.training.saving: step ")
    disk = f"the disk {small_disk} of {socket.gethostname()} is full: "
    assert f"of {small_disk} cannot be saved: {disk}" in runs.said() and "are free, a checkpoint needs" in runs.said()
    kept = newest_first(small_disk)
    assert kept and verify(kept[0]) == []
    runs.until(lambda: len(saves(small_disk)) > 1, "the next save tries again")
    filler.unlink()
    runs.until(lambda: newest_first(small_disk)[0] != kept[0], "a later checkpoint is saved")
    runs.until(lambda: saves(small_disk)[-1] == 0, "the metric says that it works again")
    assert saves(small_disk)[:2] == [1, 2] and "Traceback" not in runs.said()
    outcome(f"went on over {len(saves(small_disk)) - 1} saves without space, then saved again")


@pytest.mark.fault(
    "the disk becomes full while two ranks write (a quota, which no check sees), up to the last step",
    expected="the part is removed, training goes on; at the end exit code 1 with the line, the last checkpoint intact",
)
def test_a_disk_that_becomes_full(runs: TinyRuns, small_disk: Path, outcome: Callable[[str], None]) -> None:
    launcher = runs.start(
        ranks=2, steps=8, checkpoint_every=2, log_every=1, zero_stage=1, hooks=SLOW + UNSEEN,
        overrides=("train.evaluate_every=4",),
    )  # fmt: skip
    runs.until(lambda: (small_disk / "latest").exists(), "a checkpoint is saved")
    fill(small_disk, left=300_000)
    assert runs.ended(launcher) == 1
    assert (
        f"step 8 of {small_disk} cannot be saved: the disk" in runs.said()
        and "nothing is saved since step-" in runs.said()
    )
    (kept,) = newest_first(small_disk)
    assert verify(kept) == [] and [path.name for path in kept.parent.iterdir()] == [kept.name]
    outcome(f"went on without a save, rc 1 at the end, {kept.name} intact")


NOT_ALLOWED = """
import errno, os
from atr_scale.checkpoint_writer import Writing
write = Writing._own_files
def fails_once(self):
    if self.world.rank == 1 and self.final.name == "step-16":
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self.final.parent))
    return write(self)
Writing._own_files = fails_once
"""


@pytest.mark.fault(
    "one of two ranks may not write its part of a checkpoint",
    expected="said within seconds by the log, the metrics and `status`; training goes on, and the next save works",
)
def test_a_part_that_cannot_be_written(runs: TinyRuns, outcome: Callable[[str], None]) -> None:
    launcher = runs.start(ranks=2, steps=40, checkpoint_every=16, log_every=1, zero_stage=1, hooks=SLOW + NOT_ALLOWED)
    run = runs.folder()
    runs.until_said(f"ERROR rank 0 atr_scale.training.saving: step 16 of {run} cannot be saved: [Errno 13] Permission")
    runs.until(lambda: read_status(run).failed_saves == 1, "the status tells of it")
    runs.until(lambda: saves(run) == [1], "the metrics tell of it")
    runs.ends_with(0, launcher)
    assert saves(run) == [1, 0] and read_status(run).failed_saves == 0 and "Traceback" not in runs.said()
    lines = [line for line in read_json_lines(run / METRICS) if line["kind"] in ("saving", "train")]
    said = next(number for number, line in enumerate(lines) if line["kind"] == "saving")
    assert lines[said - 1]["step"] < 31, "before the next save asks for the result"
    assert [path.name for path in newest_first(run)] == ["step-40", "step-32"]
    outcome(f"said {lines[said - 1]['step'] - 16} steps of 0.3 s later; the saves of steps 32 and 40 are there")


@pytest.mark.fault("the disk is full when a run starts", expected="one line, exit code 1: a restart may succeed")
def test_a_start_on_a_full_disk(runs: TinyRuns, small_disk: Path, outcome: Callable[[str], None]) -> None:
    fill(small_disk, left=0)
    assert runs.ended(runs.start(steps=1)) == 1
    assert f"error: the disk {small_disk} is full: make space there for {small_disk}" in runs.said()
    assert "Traceback" not in runs.said()
    outcome("rc 1, the disk named")
