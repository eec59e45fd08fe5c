"""Runs of a sweep on this machine: one process each, some at a time."""

from __future__ import annotations

import fcntl
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import BinaryIO

import torch
from tqdm import tqdm

from atr_scale.distributed.lifeline import STOP_SIGNALS
from atr_scale.errors import UserError
from atr_scale.experiments.sweep import Sweep, SweepRun, last_error
from atr_scale.run_files import PREEMPTED

logger = logging.getLogger(__name__)

PAUSE = 0.2  # seconds between looks at the processes


@dataclass
class Job:
    """A run in progress: training, then evaluation."""

    run: SweepRun
    slot: int
    log: Path
    commands: list[list[str]]
    lock: int  # file descriptor of the lock on the sweep folder, which it inherits
    output: BinaryIO = field(init=False)
    process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.output = self.log.open("ab")
        self.next()

    def next(self) -> None:
        """Start the next command, in a session of its own: a Ctrl-C reaches it only through `run_local`."""
        command = self.commands.pop(0)
        self.output.write(f"\n$ {shlex.join(command)}\n".encode())
        self.output.flush()
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self.output, stderr=subprocess.STDOUT, start_new_session=True,
            env=os.environ | _gpu(self.slot), pass_fds=(self.lock,),
        )  # fmt: skip


@dataclass
class Stop:
    """Whether a signal has asked to stop. The first one lets the runs save, the second one ends them at once."""

    received: int = 0


def run_local(sweep: Sweep, at_once: int) -> tuple[list[str], list[SweepRun]]:
    """Carry out the runs that are not finished. Returns a line for each failure, and the runs that were stopped.

    On a signal the runs in progress save and stop, and no further ones start. Raises UserError if another process
    carries out the same sweep, or has been killed and left runs in progress.
    """
    with _alone(sweep.folder) as lock:
        return _run_all(sweep, at_once, lock)


def _run_all(sweep: Sweep, at_once: int, lock: int) -> tuple[list[str], list[SweepRun]]:
    waiting = [run for run in sweep.runs if not run.finished()]
    if len(waiting) < len(sweep.runs):
        logger.info("%d of %d runs are finished already", len(sweep.runs) - len(waiting), len(sweep.runs))
    active: list[Job] = []
    failed: list[str] = []
    told = 0
    with _signals() as stop, _Progress(len(waiting)) as progress:
        while active or (waiting and not stop.received):
            while waiting and len(active) < at_once and not stop.received:
                slot = min(set(range(at_once)) - {job.slot for job in active})
                run = waiting.pop(0)
                active.append(Job(run, slot, sweep.logs / f"{run.name}.log", commands_of(sweep, run), lock))
                progress.start(active[-1])
            if stop.received > told:
                told = stop.received
                _tell(active, told)
            for job in [job for job in active if job.process.poll() is not None]:
                if not _goes_on(job, failed, bool(stop.received)):
                    active.remove(job)
                    progress.end(job.run)
            progress.show([job.run for job in active])
            time.sleep(PAUSE)
    return failed, [run for run in sweep.runs if not run.finished()] if stop.received else []


def commands_of(sweep: Sweep, run: SweepRun) -> list[list[str]]:
    """Training and, if there is a test set, evaluation."""
    commands = [[sys.executable, "-m", "atr_scale.train", sweep.config, *run.overrides]]
    if run.evaluation():
        commands.append([sys.executable, "-m", "atr_scale.cli", "evaluate", *run.evaluation()])
    return commands


def _goes_on(job: Job, failed: list[str], stopping: bool) -> bool:
    """Start the job's next command if its last one has succeeded; else note a failure, and close its log."""
    code = job.process.returncode
    saved = (job.run.dir / PREEMPTED).exists()
    if code == 0 and job.commands and not stopping and not saved:
        job.next()
        return True
    job.output.close()
    if code and not stopping:
        failed.append(f"{job.run.name}: exit code {code}: {last_error(job.log)} ({job.log})")
    elif saved and not stopping:
        failed.append(f"{job.run.name}: a signal has stopped it, and it has saved ({job.log})")
    return False


def _tell(active: Sequence[Job], received: int) -> None:
    """Ask the jobs to save and stop; end them if they have been asked before."""
    for job in active:
        if received == 1:
            job.process.terminate()
        else:
            os.killpg(job.process.pid, signal.SIGKILL)
    if active:
        how = "save; again to end them at once" if received == 1 else "are ended at once"
        logger.warning("told to stop: %d runs %s", len(active), how)


@contextmanager
def _alone(folder: Path) -> Iterator[int]:
    """Hold a lock on the sweep folder, and yield its descriptor. The lock ends with the last process that has it."""
    with (folder / "lock").open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder} is carried out by another process, or runs that a killed one has left are still in "
                "progress: wait for their end, or end them"
            ) from None
        except OSError as error:  # some network file systems have no locks
            logger.warning("%s has no locks (%s): start this sweep only once at a time", folder, error)
        yield file.fileno()


@contextmanager
def _signals() -> Iterator[Stop]:
    stop = Stop()

    def receive(number: int, frame: FrameType | None) -> None:
        stop.received += 1

    signals = (signal.SIGINT, signal.SIGHUP, *STOP_SIGNALS)
    heard = [number for number in signals if signal.getsignal(number) is not signal.SIG_IGN]  # nohup
    before = {number: signal.signal(number, receive) for number in heard}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Progress:
    """A bar over the runs, with the part of those in progress; without a terminal, lines as one starts and ends."""

    FORM = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total} runs [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"

    def __init__(self, total: int) -> None:
        self.total, self.ended, self.began = total, 0, time.monotonic()
        self.bar = tqdm(total=total, desc="sweep", unit="run", bar_format=self.FORM, smoothing=0, disable=None)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def start(self, job: Job) -> None:
        if self.bar.disable:
            logger.info("%s: started, log in %s", job.run.name, job.log)

    def end(self, run: SweepRun) -> None:
        self.ended += 1
        if self.bar.disable:
            left = (time.monotonic() - self.began) / self.ended * (self.total - self.ended)
            logger.info("%s: %d of %d runs, ETA %s", run.name, self.ended, self.total, tqdm.format_interval(left))

    def show(self, active: Sequence[SweepRun]) -> None:
        if self.bar.disable:
            return
        steps = {run.name: run.progress() for run in active}
        self.bar.n = self.ended + sum(done / total for done, total in steps.values() if total)
        self.bar.set_postfix_str(", ".join(f"{name} {done}/{total}" for name, (done, total) in steps.items()), False)
        self.bar.refresh()


def _gpu(slot: int) -> dict[str, str]:
    """The GPU of a slot, if there are several."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
    return {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if len(gpus) > 1 else {}
