"""The module that launchers start: `atr-scale train`, with a log that names the rank and the time.

accelerate launch -m atr_scale.train CONFIG.yaml train.lr=1e-4
torchrun --nproc-per-node 2 -m atr_scale.train CONFIG.yaml
python -m atr_scale.train CONFIG.yaml
"""

from __future__ import annotations

import logging
import os
import sys

from atr_scale import cli
from atr_scale.console import ConsoleHandler


def train_rank() -> None:
    """Train as one of the ranks that a launcher has started. Arguments and exit codes are those of `atr-scale train`.

    0: done, or saved and stopped on a signal; 2: the user's mistake; 1: a failure, after which a job may start again.
    """
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    # On a terminal, the progress bar of rank 0 may stand on the line that another rank writes to.
    clear = "\r\033[K" if rank != "0" and sys.stderr.isatty() else ""
    logging.basicConfig(  # the first call counts, so that of `cli.main` changes nothing
        level=logging.INFO if rank == "0" else logging.WARNING,
        format=f"{clear}%(asctime)s %(levelname)s rank {rank} %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        handlers=[ConsoleHandler()],
    )
    cli.main(["train", *sys.argv[1:]])


if __name__ == "__main__":
    train_rank()
