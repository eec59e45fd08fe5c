"""A sweep: its runs, their folders and states. `local` and `slurm` carry it out.

    FOLDER/sweep.json        grid, runs, commands, SLURM jobs
    FOLDER/logs/             a log for each run
    FOLDER/lr=1e-4,seed=0/   a run folder, named by what differs

Runs keep their numbers when values are added to a sweep, because array tasks that wait in a queue know only a number.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atr_scale.config import RunConfig, load_config
from atr_scale.errors import UserError, one_line
from atr_scale.evaluation.results import config_digest, read_results
from atr_scale.experiments.grid import SEED, Axis, combinations, parse_arguments, run_names
from atr_scale.experiments.sweep_file import SWEEP, read_sweep
from atr_scale.files import atomic_write
from atr_scale.remote.places import address_of
from atr_scale.run_files import last_logged_step

TEST = "test"
PLAIN = re.compile(r"[\w./=,+-]+")
# Not what srun and the step's daemon tell of a failure: an exit code, and that the other ranks were ended.
NO_CAUSE = r"srun: |slurmstepd\S*: error: \*\*\* STEP "
ERROR = re.compile(rf"^(?!{NO_CAUSE}).*(?:\berror: |\b\w*(?:Error|Exception)\b)", re.IGNORECASE)
TAIL = 1 << 16  # bytes of a log that are searched for an error


@dataclass(frozen=True)
class SweepRun:
    """A run of a sweep: its number and name in it, its overrides, and its configuration."""

    number: int
    name: str
    overrides: tuple[str, ...]
    config: RunConfig

    @property
    def dir(self) -> Path:
        return Path(self.config.run.dir)

    def evaluation(self) -> list[str]:
        """Arguments of `atr-scale evaluate` after training; empty without data.test."""
        if self.config.data.test is None:
            return []
        plugins = [word for module in self.config.plugins for word in ("--plugins", module)]
        return [self.config.run.dir, "--split", TEST, *plugins]

    def finished(self) -> bool:
        """Whether it is trained to its end with this configuration and evaluated on data.test, if there is one."""
        table = read_results(self.dir)
        values = self.config.model_dump(mode="json")
        if table is None or (table["config_digest"], table["seed"]) != (config_digest(values), self.config.run.seed):
            return False
        training = table.get("training", {})
        if not training or training["step"] != training["steps"]:
            return False
        steps = {entry["split"]: entry["step"] for entry in table["results"] if entry["checkpoint"] == "best"}
        best = {steps[name] for name in self.config.data.validation_sets if name in steps}
        tested = {entry["step"] for entry in table["results"] if entry["split"].partition("/")[0] == TEST}
        return self.config.data.test is None or bool(tested & best if best else tested)

    def progress(self) -> tuple[int, int]:
        """(optimizer steps done, of how many); (0, 0) before it has begun."""
        table = read_results(self.dir)
        if table is None or "training" not in table:
            return 0, 0
        done, steps = table["training"]["step"], table["training"]["steps"]
        return max(done, last_logged_step(self.dir)) if done < steps else done, steps


@dataclass
class Sweep:
    """The runs of one call, and the sweep folder, which may hold further runs of earlier calls."""

    folder: Path
    config: str
    runs: list[SweepRun]
    table: dict[str, Any]  # content of sweep.json

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    def save(self) -> None:
        """Write sweep.json."""
        self.logs.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.folder / SWEEP) as temporary:
            temporary.write_text(json.dumps(self.table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def plan_sweep(config: str, arguments: Sequence[str], *, seeds: int | None = None, out: Path | None = None) -> Sweep:
    """The sweep of a configuration file over a grid; nothing is started or written.

    arguments: as `parse_arguments` describes. seeds: number of seeds of every run, from the configuration's on. out:
    sweep folder; default: the folder `sweep` in the run.dir of the configuration. Raises UserError, with a line for
    each run whose configuration is wrong, and if the folder holds another sweep.
    """
    axes, shared = parse_arguments(arguments)
    checked = _check(config, shared, axes)
    first = next(iter(checked.values()))
    if seeds is not None:
        if any(axis.key == SEED for axis in axes):
            raise UserError(f"--seeds and {SEED}=[...] both name seeds: give one of them")
        axes = [*axes, Axis(SEED, tuple(str(first.run.seed + number) for number in range(seeds)))]
    if address_of(out or first.run.dir):
        raise UserError("the folder of a sweep is on a disk: give --out a local folder")
    folder = out or Path(first.run.dir) / "sweep"
    table = _table(folder, config, shared, axes)
    numbers = {run["name"]: number for number, run in enumerate(table["runs"])}
    runs = []
    for name, values in zip(run_names(axes), combinations(axes), strict=True):
        place = str(folder / name)
        own = checked[name if seeds is None else name.rpartition(",")[0] or "run"].model_copy(deep=True)
        own.run.dir, own.run.seed = place, int(values.get(SEED, own.run.seed))
        overrides = (*shared, *_overrides(values), f"run.dir={_quoted(place)}")
        run = SweepRun(numbers.setdefault(name, len(numbers)), name, overrides, own)
        runs.append(run)
        table["runs"][run.number : run.number + 1] = [_described(config, run)]
    return Sweep(folder, config, runs, table)


def _check(config: str, shared: list[str], axes: list[Axis]) -> dict[str, RunConfig]:
    """The configuration of every run by its name. UserError with a line for each wrong one, one if all are alike."""
    checked, wrong = [], []
    for name, values in zip(run_names(axes), combinations(axes), strict=True):
        try:
            checked.append((name, load_config(config, [*shared, *_overrides(values)])))
        except UserError as error:
            wrong.append(f"{name}: {one_line(error)}")
    by_digest: dict[str, str] = {}
    for name, own in checked:
        digest = config_digest(own.model_dump(mode="json")) + str(own.run.seed)
        if digest in by_digest:
            wrong.append(f"{name}: the same configuration as {by_digest[digest]}, give each value once")
        by_digest.setdefault(digest, name)
    if not wrong:
        return dict(checked)
    number = len(combinations(axes))
    if len(wrong) == number and len({line.partition(": ")[2] for line in wrong}) == 1:
        raise UserError(wrong[0].partition(": ")[2])
    raise UserError(f"{len(wrong)} of {number} configurations are wrong:\n" + "\n".join(wrong))


def _table(folder: Path, config: str, shared: list[str], axes: list[Axis]) -> dict[str, Any]:
    """The content of sweep.json, with the runs and jobs of earlier calls. UserError if it holds another sweep."""
    old = read_sweep(folder)
    table: dict[str, Any] = {
        "schema": 1,
        "config": config,
        "shared": shared,
        "grid": {axis.key: list(axis.values) for axis in axes},
        "runs": list(old.get("runs", [])),
        "jobs": list(old.get("jobs", [])),
    }
    same = [old.get(key) == table[key] for key in ("config", "shared")] + [
        list(old.get("grid", ())) == list(table["grid"])
    ]
    if old and not all(same):
        earlier = " ".join([old["config"], *old["shared"], *(f"{key}=[...]" for key in old["grid"])])
        raise UserError(f"{folder} holds the sweep of {earlier}: give --out DIR for another one")
    return table


def last_error(log: Path) -> str:
    """The last line of a log that tells an error, else its last line."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    except OSError:
        return "no log"
    return one_line(next((line for line in reversed(lines) if ERROR.search(line)), lines[-1] if lines else "empty log"))


def _overrides(values: dict[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in values.items()]


def _quoted(text: str) -> str:
    return text if PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)


def _described(config: str, run: SweepRun) -> dict[str, Any]:
    """A run in sweep.json."""
    evaluation = run.evaluation()
    commands = [["train", config, *run.overrides], *([["evaluate", *evaluation]] if evaluation else [])]
    return {
        "name": run.name,
        "dir": run.config.run.dir,
        "overrides": list(run.overrides),
        "evaluation": evaluation,
        "commands": [shlex.join(["atr-scale", *command]) for command in commands],
    }
