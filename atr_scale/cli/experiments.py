"""Verbs about many runs: sweeps and comparisons."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from atr_scale.cli.common import TakesOverrides, app
from atr_scale.cli.runs import ConfigFile
from atr_scale.errors import UserError


@app.command("sweep", cls=TakesOverrides)
def sweep_command(
    config: ConfigFile,
    grid: Annotated[
        list[str] | None,
        typer.Argument(metavar="key=[v1,v2] key=value", help="Keys with the values to try, and overrides of all runs."),
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Number of seeds to train each configuration with.")] = None,
    local: Annotated[int, typer.Option(min=1, help="Number of runs at a time on this machine, a process each.")] = 1,
    slurm: Annotated[bool, typer.Option("--slurm", help="Submit an array job instead of training here.")] = False,
    script: Annotated[Path, typer.Option(help="Job script of --slurm.")] = Path("slurm/pretrain_wavcaps.sh"),
    at_once: Annotated[int | None, typer.Option(min=1, help="Most tasks of --slurm that run at a time.")] = None,
    sbatch: Annotated[list[str] | None, typer.Option(help="Further options of sbatch, in quotes; repeatable.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Sweep folder; by default sweep/ in the run.dir of the configuration.")
    ] = None,
    dry: Annotated[bool, typer.Option("--dry-run", help="Print the runs and their commands; start nothing.")] = False,
) -> None:
    """Train a grid of configurations.

    Each run is evaluated on data.test after training. The same command goes on with a sweep that was interrupted:
    finished runs are skipped, begun ones continue from their checkpoints. The exit code is 1 if a run has failed.

    \b
    Examples:
      atr-scale sweep configs/quickstart/pretrain.yaml train.lr=[1e-3,3e-4]
      atr-scale sweep configs/pretrain_wavcaps.yaml train.lr=[1e-5,5e-5] \\
          --seeds 3 --slurm --at-once 2 --sbatch "--nodes=1"
    """
    from atr_scale.experiments.sweep import plan_sweep

    sweep = plan_sweep(config, grid or (), seeds=seeds, out=out)
    if not slurm and (at_once is not None or sbatch):
        raise UserError("--at-once and --sbatch are options of --slurm: give --local N for the number of runs here")
    if dry:
        for run in sweep.runs:
            print("\n".join(sweep.table["runs"][run.number]["commands"]))
        return
    from atr_scale.experiments import carry_out

    failed = (
        carry_out.by_slurm(sweep, script, at_once, sbatch or ()) if slurm else carry_out.locally(sweep, at_once=local)
    )
    if failed:
        raise typer.Exit(1)


@app.command("compare")
def compare_command(
    runs: Annotated[list[Path], typer.Argument(help="Evaluated run folders, or sweep folders for all of their runs.")],
    split: Annotated[
        str | None, typer.Option(help="Split; by default test, or a validation set that all runs have.")
    ] = None,
    by: Annotated[
        str | None, typer.Option(help="Also by duration, caption_words or a field of the samples' JSON.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for compare.md, .csv, .tex and .png; by default none.")
    ] = None,
) -> None:
    """Compare evaluated runs: configuration and results.

    Runs that differ in their seed alone form an experiment, of which mean and standard deviation are shown. Differences
    to the first experiment have intervals of a paired bootstrap over clips.

    \b
    Examples:
      atr-scale compare runs/quickstart/sweep --out comparison
      atr-scale compare runs/one runs/other --by duration
    """
    from atr_scale.experiments.compare import compare_runs
    from atr_scale.experiments.tables import markdown, write_comparison

    comparison = compare_runs(runs, split, by)
    print(markdown(comparison))
    for path in write_comparison(comparison, out) if out else ():
        print(path)
