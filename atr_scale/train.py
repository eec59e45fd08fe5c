"""The module that launchers start: `atr-scale train` with a log that says which rank speaks and when.

accelerate launch -m atr_scale.train CONFIG.yaml train.lr=1e-4
torchrun --nproc-per-node 2 -m atr_scale.train CONFIG.yaml
python -m atr_scale.train CONFIG.yaml
"""

from __future__ import annotations

import logging
import os
import sys

from atr_scale import cli


def train_rank() -> None:
    """Train as one rank of those that a launcher has started; arguments and exit codes are those of `atr-scale train`.

    0: done, or saved and stopped on a signal; 2: the user's mistake; 1: a failure of ours.
    """
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    logging.basicConfig(  # the first call counts, so that of the console script changes nothing
        level=logging.INFO if rank == "0" else logging.WARNING,
        format=f"%(asctime)s %(levelname)s rank {rank} %(name)s: %(message)s",
        datefmt="%H:%M:%S",
    )
    cli.main(["train", *sys.argv[1:]])


if __name__ == "__main__":
    train_rank()
