"""The entry that launchers start:

accelerate launch -m atr_scale.train CONFIG.yaml train.lr=1e-4
torchrun --nproc-per-node 2 -m atr_scale.train CONFIG.yaml
python -m atr_scale.train CONFIG.yaml
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from atr_scale.config import RunConfig, load_config
from atr_scale.errors import UserError


def run(arguments: Sequence[str]) -> None:
    """Parse `arguments` and train; raises UserError for the user's mistakes."""
    parser = argparse.ArgumentParser(
        prog="atr-scale train",
        description="Train a retriever; a run folder that holds a checkpoint is continued.",
        epilog="example: accelerate launch -m atr_scale.train configs/quickstart/pretrain.yaml train.lr=1e-4",
    )
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="values in place of the file's")
    parser.add_argument(
        "--dry-run", action="store_true", help="print model size, memory, steps and shards; train nothing"
    )
    parser.add_argument("--world-size", type=int, default=1, help="ranks to plan for with --dry-run (default 1)")
    given = parser.parse_args(arguments)
    if given.world_size < 1:
        raise UserError(f"--world-size {given.world_size}: give at least 1")
    config = load_config(given.config, given.overrides)
    if given.dry_run:
        _dry_run(config, given.world_size)
        return
    from atr_scale.training.loop import train

    train(config)


def _dry_run(config: RunConfig, world_size: int) -> None:
    from atr_scale.planner.dry_run import plan

    print(plan(config, world_size))


def main() -> None:
    """Exit codes: 0 done (or saved and stopped on a signal), 2 the user's mistake, 1 a failure of ours."""
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    logging.basicConfig(
        level=logging.INFO if rank == "0" else logging.WARNING,
        format=f"%(asctime)s %(levelname)s rank {rank} %(name)s: %(message)s",
        datefmt="%H:%M:%S",
    )
    try:
        run(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
