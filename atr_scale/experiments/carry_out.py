"""Carries out a sweep, here or on a cluster, and tells how its runs stand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from atr_scale.experiments import slurm
from atr_scale.experiments.local import run_local
from atr_scale.experiments.sweep import Sweep


def locally(sweep: Sweep, at_once: int) -> bool:
    """Train and evaluate the runs of a sweep on this machine. Returns whether a run has failed or was stopped."""
    sweep.save()
    failed, stopped = run_local(sweep, at_once)
    for line in failed:
        print(f"failed: {line}")
    if stopped:
        print(f"stopped: {len(stopped)} of {len(sweep.runs)} runs are not finished; the same command goes on")
    finished = sum(run.finished() for run in sweep.runs)
    print(f"{sweep.folder}: {finished} of {len(sweep.runs)} runs finished; atr-scale compare {sweep.folder}")
    return bool(failed or stopped)


def by_slurm(sweep: Sweep, script: Path, at_once: int | None, options: Sequence[str]) -> bool:
    """Print how the runs of a sweep stand, and submit those that are neither finished nor in the queue.

    Returns whether a run has failed since it was submitted. The other arguments are those of `slurm.submit`.
    """
    found = slurm.states(sweep)
    for one in found:
        print(f"{one.state:<14} {one.run.name}" + (f": {one.detail}" if one.detail else ""))
    again = [one.run for one in found if one.state in (slurm.NEW, slurm.FAILED)]
    if again:
        job = slurm.submit(sweep, again, script=script, at_once=at_once, options=slurm.sbatch_options(options))
        print(f"submitted: job {job} with {len(again)} runs; the same command tells how they stand")
    elif all(one.state == slurm.FINISHED for one in found):
        print(f"{sweep.folder}: all {len(found)} runs finished; atr-scale compare {sweep.folder}")
    return any(one.state == slurm.FAILED for one in found)
