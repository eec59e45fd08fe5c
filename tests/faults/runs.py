"""Tiny trainings as real processes, started, watched and ended by tests of faults."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from tests.tiny_run import tiny_config

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


class TinyRuns:
    """Trainings of one test, in folders of their own under `place`. What they have logged is in PLACE/log."""

    def __init__(self, place: Path, inputs: Path) -> None:
        """inputs: the folder of the shards and the text encoder; tests that only read them may share it."""
        self.place, self.inputs, self.log = place, inputs, place / "log"
        self._started: list[subprocess.Popen[bytes]] = []

    def start(
        self,
        run: str = "run",
        *,
        ranks: int = 1,
        torchrun: list[str] | None = None,
        launcher: Sequence[str] = (),
        cloud: Sequence[str] = (),
        overrides: tuple[str, ...] = (),
        environment: Mapping[str, str] | None = None,
        hooks: str = "",
        **train: Any,
    ) -> subprocess.Popen[bytes]:
        """Start to train in the folder `run`; with several ranks, or options for it, under torchrun.

        launcher: the words of another launcher, with its number of ranks.
        cloud: the words of one that starts `atr_scale.train` itself, without hooks.
        hooks: Python code that every rank runs before it trains. train: keys of that section.
        """
        path = self.place / f"{run}.yaml"
        path.write_text(tiny_config(self.inputs, self.place / run, **train).to_yaml())
        script = self.place / f"{run}.py"
        script.write_text(
            f"{hooks}\nif __name__ == '__main__':\n    from atr_scale.train import train_rank\n    train_rank()\n"
        )
        command = [sys.executable, str(script), str(path), *overrides]
        if ranks > 1 or torchrun is not None:
            options = ["--nproc-per-node", str(ranks), "--master-port", str(free_port()), *(torchrun or [])]
            launcher = [sys.executable, "-m", "torch.distributed.run", *options]
        if launcher:
            command = [*launcher, *command[1:]]
        if cloud:
            command = [*cloud, *command[2:]]
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(Path(__file__).parents[2]), **(environment or {})},
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def folder(self, run: str = "run") -> Path:
        return self.place / run

    def said(self) -> str:
        """The log of all processes so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def until(self, holds: Callable[[], Any], what: str, seconds: float = 120) -> Any:
        """Wait for a true value of `holds` and return it. An AssertionError shows the end of the log."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if found := holds():
                return found
            time.sleep(0.1)
        raise AssertionError(f"not within {seconds} s: {what}\n{self.said()[-4000:]}")

    def until_said(self, text: str, seconds: float = 120) -> None:
        self.until(lambda: text in self.said(), f"the log has {text!r}", seconds)

    def until_step(self, step: int, run: str = "run", seconds: float = 120) -> None:
        """Wait until the run has logged this step."""
        self.until(lambda: steps_of(self.folder(run))[-1:] >= [step], f"{run} is at step {step}", seconds)

    def until_it_trains_on(self, run: str = "run", seconds: float = 120) -> None:
        """Wait until the run logs another step."""
        metrics = self.folder(run) / "metrics.jsonl"
        before = metrics.stat().st_mtime_ns
        self.until(lambda: metrics.stat().st_mtime_ns > before, f"{run} trains on", seconds)

    def ended(self, process: subprocess.Popen[bytes], seconds: float = 120) -> int:
        """Wait for the end of a process, and return its exit code."""
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still runs after {seconds} s\n{self.said()[-4000:]}") from None

    def ends_with(self, code: int, process: subprocess.Popen[bytes], seconds: float = 120) -> None:
        """Wait for the end of a process, which must have this exit code."""
        found = self.ended(process, seconds)
        assert found == code, f"exit code {found}\n{self.said()[-6000:]}"

    def kill_all(self) -> None:
        for process in self._started:
            for child in family(process.pid):
                child.kill()
            process.kill()
            process.wait()


@contextmanager
def tiny_runs(place: Path, inputs: Path) -> Iterator[TinyRuns]:
    """None of the processes is left behind."""
    runs = TinyRuns(place, inputs)
    try:
        yield runs
    finally:
        runs.kill_all()


def steps_of(run: Path) -> list[int]:
    """The steps that a run has logged, in order."""
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("}") and '"kind": "train"' in line]


def family(process: int) -> list[psutil.Process]:
    """All processes that descend from a process and live."""
    try:
        return [child for child in psutil.Process(process).children(recursive=True) if child.is_running()]
    except psutil.NoSuchProcess:
        return []


def ranks_of(launcher: int) -> list[psutil.Process]:
    """The ranks that torchrun has started, in order of their rank."""
    children = psutil.Process(launcher).children()
    return sorted((c for c in children if "RANK" in c.environ()), key=lambda child: int(child.environ()["RANK"]))


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that run; a zombie does not."""
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
