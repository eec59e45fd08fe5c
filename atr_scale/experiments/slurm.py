"""Runs of a sweep as an array job of SLURM, on the job scripts in slurm/."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from atr_scale.errors import UserError, one_line
from atr_scale.experiments.sweep import Sweep, SweepRun, last_error

FINISHED, FAILED, NEW = "finished", "failed", "not submitted"


@dataclass(frozen=True)
class State:
    """Where a run stands: FINISHED, FAILED, NEW, or its state in SLURM's queue. detail: the error and its log."""

    run: SweepRun
    state: str
    detail: str = ""


def states(sweep: Sweep) -> list[State]:
    """The state of every run of the sweep. Raises UserError if SLURM does not answer."""
    queued = _queue() if sweep.table["jobs"] else {}
    return [_state(sweep, run, queued) for run in sweep.runs]


def submit(
    sweep: Sweep, runs: Sequence[SweepRun], *, script: Path, at_once: int | None, options: Sequence[str] = ()
) -> str:
    """Submit one array job with a task for each run, and return its number.

    script: a job script that calls `train` of slurm/prologue.sh. at_once: most tasks that run at a time. options:
    further options of sbatch.
    """
    if not script.is_file():
        raise UserError(
            f"no job script {script}: call this from the folder that holds slurm/ (`atr-scale init DIR` makes one), "
            "or give --script"
        )
    numbers = ",".join(str(run.number) for run in runs)
    limit = "" if at_once is None else f"%{at_once}"
    sweep.save()  # a task may start before this call returns
    log = sweep.logs.resolve() / "slurm-%A_%a.log"
    command = ["sbatch", "--parsable", *_site_options(script.parent), f"--array={numbers}{limit}", f"--output={log}"]
    job = _call([*command, *options, str(script)], SWEEP=str(sweep.folder.resolve())).partition(";")[0]
    sweep.table["jobs"].append({"job": job, "runs": [run.number for run in runs]})
    sweep.save()
    return job


def sbatch_options(texts: Sequence[str]) -> list[str]:
    """The words of the values of --sbatch."""
    return [word for text in texts for word in shlex.split(text)]


def _site_options(folder: Path) -> list[str]:
    """Options of sbatch that the site file in the folder of the job scripts asks for."""
    site = folder / "site.sh"
    if not site.is_file():
        return []
    return _call(["bash", "-c", 'source "$0" && printf "%s\\n" "${options[@]}"', str(site)]).splitlines()


def _state(sweep: Sweep, run: SweepRun, queued: dict[tuple[str, int], str]) -> State:
    if run.finished():
        return State(run, FINISHED)
    jobs = [entry["job"] for entry in sweep.table["jobs"] if run.number in entry["runs"]]
    if not jobs:
        return State(run, NEW)
    if in_queue := queued.get((jobs[-1], run.number)):
        done, steps = run.progress()
        return State(run, in_queue.lower(), f"step {done} of {steps}" if steps else "")
    log = sweep.logs / f"slurm-{jobs[-1]}_{run.number}.log"
    return State(run, FAILED, f"{last_error(log)} ({log})")


def _queue() -> dict[tuple[str, int], str]:
    """State of every array task in the queue, by the array's job number and the task's number."""
    lines = _call(["squeue", "--noheader", "--array", "--me", "--format=%F %K %T"]).splitlines()
    words = [line.split() for line in lines]
    return {(job, int(task)): state for job, task, state in words if task.isdigit()}


def _call(command: Sequence[str], **variables: str) -> str:
    try:
        done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=120)
    except FileNotFoundError:
        raise UserError(f"no {command[0]} on this machine: call this on a login node of the cluster") from None
    if done.returncode:
        raise UserError(f"{command[0]} refuses: {one_line(done.stderr)}")
    return done.stdout.strip()
