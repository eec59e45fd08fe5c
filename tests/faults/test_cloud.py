"""launch/cloud.sh on two machines, which are this one twice: what ends all machines, and what starts them again."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from atr_scale.run_files import ATTEMPTS, read_json_lines
from tests.commands import ROOT
from tests.faults.runs import TinyRuns, family, free_port, tiny_runs
from tests.tiny import read_training

STEPS = 150
pytestmark = pytest.mark.slow


class Machines:
    """The same command on two machines."""

    def __init__(self, runs: TinyRuns, *, machines: str = "2", **train: Any) -> None:
        self.runs, self._machines, self._train = runs, machines, train
        # As in a folder that `atr-scale init` has made, the environment is the active one.
        self._script = runs.place / "launch/cloud.sh"
        self._script.parent.mkdir()
        for name in ("cloud.sh", "environment.sh"):
            shutil.copy(ROOT / "launch" / name, self._script.parent)
        self._environment = {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "MASTER_PORT": str(free_port()), "PROCESSES": "1", "MAX_RESTARTS": "2",
        }  # fmt: skip

    def start(self, *overrides: str) -> subprocess.Popen[bytes]:
        """Start the command on one machine."""
        return self.runs.start(
            cloud=[str(self._script), self._machines, "127.0.0.1"], overrides=overrides,
            environment=self._environment, **self._train,
        )  # fmt: skip

    def ranks(self, machine: subprocess.Popen[bytes]) -> list[psutil.Process]:
        return [child for child in family(machine.pid) if "atr_scale.train" in child.cmdline()]

    def attempts(self) -> int:
        return sum(line["event"] == "start" for line in read_json_lines(self.runs.folder() / ATTEMPTS))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """A folder with inputs, and the losses of two ranks."""
    place = tmp_path_factory.mktemp("alone")
    with tiny_runs(place, place) as runs:
        runs.ends_with(0, runs.start(ranks=2, steps=STEPS, log_every=1))
    return place, [line["loss"] for line in read_training(place / "run")]


@pytest.fixture
def runs(tmp_path: Path, undisturbed: tuple[Path, list[float]]) -> Iterator[TinyRuns]:
    with tiny_runs(tmp_path, undisturbed[0]) as runs:
        yield runs


@pytest.mark.fault(
    "a mistake of the user under launch/cloud.sh",
    expected="one line and exit code 2 on each machine, and no other start",
)
def test_a_mistake_is_told_once_and_not_tried_again(runs: TinyRuns, outcome: Callable[[str], None]) -> None:
    machines = Machines(runs)
    both = [machines.start("data.train[0].shards=nowhere") for _ in range(2)]
    for machine in both:
        runs.ends_with(2, machine)
    said = runs.said()
    assert "Traceback" not in said and said.count("error: ") == said.count("no shards in nowhere") == 2, said
    assert said.count("refused, see the error above") == 2 and machines.attempts() == 1, said
    outcome("rc 2 on both machines, one line on each, one start")


@pytest.mark.fault(
    "TERM to one machine of launch/cloud.sh",
    expected="all ranks save; exit code 0 on each machine, no traceback; the same command goes on",
)
def test_told_to_stop(runs: TinyRuns, undisturbed: tuple[Path, list[float]], outcome: Callable[[str], None]) -> None:
    machines = Machines(runs, steps=STEPS, log_every=1)
    both = [machines.start() for _ in range(2)]
    runs.until_step(5)
    both[1].terminate()
    for machine in both:
        runs.ends_with(0, machine)
    said = runs.said()
    assert "Traceback" not in said and "rror" not in said, said
    assert said.count("told to stop: saved at step") == 1 and said.count("goes on from its last checkpoint") == 2, said
    stopped = len(read_training(runs.folder()))
    for machine in [machines.start() for _ in range(2)]:
        runs.ends_with(0, machine)
    losses = [line["loss"] for line in read_training(runs.folder())]
    assert stopped < STEPS and losses == undisturbed[1]
    assert runs.said().count("done: training in") == 2
    outcome("rc 0 on both machines, two lines, losses of all steps as undisturbed")


@pytest.mark.fault(
    "TERM to one machine of launch/cloud.sh with 1:2 machines",
    expected="all ranks save; that machine ends with exit code 0, and the other one goes on; losses as undisturbed",
)
def test_one_of_a_range_is_told_to_stop(
    runs: TinyRuns, undisturbed: tuple[Path, list[float]], outcome: Callable[[str], None]
) -> None:
    machines = Machines(runs, machines="1:2", steps=STEPS, log_every=1)
    told, left = [machines.start() for _ in range(2)]
    runs.until_step(5)
    told.terminate()
    runs.ends_with(0, told)
    runs.ends_with(0, left, 120)
    said = runs.said()
    assert "Traceback" not in said and "rror" not in said, said
    assert said.count("goes on from its last checkpoint") == said.count("going on without it") == 1, said
    lines = [line for line in read_json_lines(runs.folder() / ATTEMPTS) if line["event"] != "end"]
    saved = lines[-1]["step"]
    assert [line["world_size"] for line in lines[::2]] == [2, 1] and 5 <= saved < STEPS
    losses = [line["loss"] for line in read_training(runs.folder())]
    assert losses[:saved] == undisturbed[1][:saved] and losses == pytest.approx(undisturbed[1], rel=1e-2)
    assert not (runs.folder() / "preempted").exists()
    outcome(f"two ranks saved step {saved}, one went on; losses as undisturbed")


@pytest.mark.fault(
    "kill -9 of a rank, then of a whole machine for good, under launch/cloud.sh with 1:2 machines",
    expected="all ranks start again, then those of the machine that is left; losses as undisturbed",
)
def test_a_rank_and_a_machine_are_lost(
    runs: TinyRuns, undisturbed: tuple[Path, list[float]], outcome: Callable[[str], None]
) -> None:
    machines = Machines(runs, machines="1:2", steps=STEPS, log_every=1, checkpoint_every=5, hang_seconds=10)
    lost, left = [machines.start() for _ in range(2)]
    runs.until_step(6)
    machines.ranks(left)[0].kill()
    runs.until(lambda: machines.attempts() == 2, "all ranks start again")
    runs.until_step(12)
    for process in [*family(lost.pid), psutil.Process(lost.pid)]:
        process.kill()
    runs.ends_with(0, left, 240)
    starts = [line["world_size"] for line in read_json_lines(runs.folder() / ATTEMPTS) if line["event"] == "start"]
    lines = {line["step"]: line["loss"] for line in read_training(runs.folder())}
    losses = list(lines.values())
    assert "was ended by SIGKILL" in runs.said() and starts == [2, 2, 1], runs.said()
    assert losses[:10] == undisturbed[1][:10] and losses == pytest.approx(undisturbed[1], rel=1e-2)
    outcome("starts again on both machines, then on one; losses as undisturbed")
