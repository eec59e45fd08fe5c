"""What the array task of a sweep runs, for slurm/prologue.sh: arguments of a verb, one a line.

python -m atr_scale.experiments.task train SWEEP_FOLDER NUMBER
python -m atr_scale.experiments.task evaluate SWEEP_FOLDER NUMBER
"""

from __future__ import annotations

import sys
from pathlib import Path

from atr_scale.errors import UserError, exit_with_mistake
from atr_scale.experiments.sweep import run_arguments


def main() -> None:
    verb, folder, number = sys.argv[1:]
    try:
        words = run_arguments(Path(folder), int(number), evaluation=verb == "evaluate")
    except UserError as error:
        exit_with_mistake(error)
    print("\n".join(words))


if __name__ == "__main__":
    main()
