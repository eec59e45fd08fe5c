"""What a job needs of a configuration before its ranks start, for slurm/prologue.sh and launch/cloud.sh.

python -m atr_scale.job_inputs dir CONFIG [key.sub=value ...]             prints the run folder
python -m atr_scale.job_inputs stage FOLDER CONFIG [key.sub=value ...]    copies data.train to FOLDER, on this node, and
                                                                          prints the overrides that read the copies

Exit code 2, with one line, if the configuration is wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from atr_scale.config import RunConfig, load_config
from atr_scale.data.staging import stage_shards
from atr_scale.errors import Failure, UserError, exit_with_line


def staged(config: RunConfig, folder: Path) -> Iterator[str]:
    """Overrides with which the training shards are read from copies below `folder`."""
    for number, source in enumerate(config.data.train):
        yield f"data.train[{number}].shards={stage_shards(source.shards, folder)}"


def _main() -> None:
    verb, *given = sys.argv[1:]
    folder = Path(given.pop(0)) if verb == "stage" else None
    try:
        config = load_config(given[0], given[1:])
        for line in [config.run.folder] if folder is None else staged(config, folder):
            print(line, flush=True)
    except (UserError, Failure) as error:
        exit_with_line(error)


if __name__ == "__main__":
    _main()
