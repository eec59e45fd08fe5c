"""What one update asks of a GPU, counted without one: kernel launches, bytes, FLOPs, waits of the host, collectives.

    python -m tools.gpu_counts [CONFIG ...] [--ranks W] [--global-batch B] [--json F]

The update runs as one of W ranks on CUDA tensors without values. Without CONFIG: all shipped configurations. A launch is
an operation that is not a view; the bytes are those that these operations read and write.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from tools.gpu_counts import guard

ROOT = Path(__file__).parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", metavar="CONFIG", help="default: all shipped configurations")
    parser.add_argument("--ranks", type=int, default=8, help="number of GPUs (default: 8)")
    parser.add_argument("--global-batch", type=int, help="pairs of one loss (default: train.global_batch_size)")
    parser.add_argument("--json", type=Path, metavar="F", help="write the counts to F")
    given = parser.parse_args()
    # DeepSpeed reads these when it is imported and when it starts.
    os.environ.update(DS_ACCELERATOR="cuda", RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(given.ranks))
    try:
        guard.load()
    except guard.Unavailable as reason:
        print(f"skipped: {reason}")
        if given.json:
            given.json.write_text(json.dumps({"skipped": str(reason)}))
        return
    from atr_scale.errors import UserError

    try:
        found = _count(given.configs or _shipped(), given.ranks, given.global_batch)
    except UserError as error:
        sys.exit(f"error: {error}")
    if given.json:
        given.json.write_text(json.dumps({"configs": found}, indent=1))


def _shipped() -> list[str]:
    return [str(path.relative_to(ROOT)) for path in sorted((ROOT / "configs").rglob("*.yaml"))]


def _count(paths: list[str], ranks: int, global_batch: int | None) -> dict[str, Any]:
    from atr_scale.config import load_config
    from tools.gpu_counts.report import as_json, table
    from tools.gpu_counts.update import Workload, count_update

    configs = {path: load_config(Path(path)) for path in paths}
    found = {}
    for path, config in configs.items():
        found[path] = as_json(count_update(config, Workload.of(config, ranks, global_batch)))
        print(table(path, found[path]), end="\n\n", flush=True)
    return found


if __name__ == "__main__":
    main()
