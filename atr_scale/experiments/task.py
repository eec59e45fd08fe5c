"""What the array task of a sweep runs, for slurm/prologue.sh: words, one a line.

python -m atr_scale.experiments.task dir SWEEP_FOLDER NUMBER         the run folder
python -m atr_scale.experiments.task train SWEEP_FOLDER NUMBER       arguments of `atr-scale train`
python -m atr_scale.experiments.task evaluate SWEEP_FOLDER NUMBER    arguments of `atr-scale evaluate`, maybe none

It reads sweep.json alone: to import the rest takes seconds, several times in each task.
"""

from __future__ import annotations

import sys
from pathlib import Path

from atr_scale.errors import UserError, exit_with_line
from atr_scale.experiments.sweep_file import read_sweep


def task_words(verb: str, folder: Path, number: int) -> list[str]:
    """The words of a run of a sweep folder. Raises UserError if the folder has no such run."""
    table = read_sweep(folder)
    runs = table.get("runs", [])
    if not 0 <= number < len(runs):
        raise UserError(f"{folder} has no run {number}: it holds {len(runs)} runs")
    run = runs[number]
    words = {"dir": [run["dir"]], "train": [table["config"], *run["overrides"]], "evaluate": run["evaluation"]}
    return list(words[verb])


def main() -> None:
    verb, folder, number = sys.argv[1:]
    try:
        words = task_words(verb, Path(folder), int(number))
    except UserError as error:
        exit_with_line(error)
    print("\n".join(words))


if __name__ == "__main__":
    main()
