"""What a job needs of a configuration before its ranks start, for slurm/prologue.sh and launch/cloud.sh.

python -m atr_scale.job_inputs dir CONFIG [key.sub=value ...]             prints the run folder
python -m atr_scale.job_inputs stage FOLDER CONFIG [key.sub=value ...]    copies data.train to FOLDER, on this node, and
                                                                          prints the overrides that read the copies
python -m atr_scale.job_inputs nodes N RANKS CONFIG [key.sub=value ...]   prints on how many of N nodes, of RANKS each,
                                                                          the batch divides; N if on none

Exit code 2, with one line, if the configuration is wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from atr_scale.config import RunConfig, load_config
from atr_scale.data.staging import stage_shards
from atr_scale.errors import Failure, UserError, exit_with_line

WORDS = {"dir": 0, "stage": 1, "nodes": 2}  # of each verb, before the configuration


def staged(config: RunConfig, folder: Path) -> Iterator[str]:
    """Overrides with which the training shards are read from copies below `folder`."""
    for number, source in enumerate(config.data.train):
        yield f"data.train[{number}].shards={stage_shards(source.shards, folder)}"


def nodes_that_fit(batch: int, nodes: int, ranks: int) -> int:
    """The largest number of nodes among whose ranks a batch divides; `nodes` if there is none.

    nodes: how many there are. ranks: on each.
    """
    return next((number for number in range(nodes, 0, -1) if batch % (number * ranks) == 0), nodes)


def _main() -> None:
    verb, *given = sys.argv[1:]
    words, given = given[: WORDS[verb]], given[WORDS[verb] :]
    try:
        config = load_config(given[0], given[1:])
        lines: Iterable[object] = [config.run.folder]
        if verb == "stage":
            lines = staged(config, Path(words[0]))
        elif verb == "nodes":
            lines = [nodes_that_fit(config.train.global_batch_size, int(words[0]), int(words[1]))]
        for line in lines:
            print(line, flush=True)
    except (UserError, Failure) as error:
        exit_with_line(error)


if __name__ == "__main__":
    _main()
