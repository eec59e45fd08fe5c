"""What one update asks of a GPU, counted without one: kernel launches, bytes, FLOPs, waits of the host, collectives.

    python -m tools.gpu_counts [CONFIG ...] [--ranks W] [--global-batch B] [--json F]
    python -m tools.gpu_counts --cases small|real [--json F]
    python -m tools.gpu_counts --write-budgets

The update runs as one of W ranks on CUDA tensors without values. Without CONFIG: all shipped configurations. A launch
is an operation that is not a view; the bytes are those that these operations read and write. --cases counts the cases
that have budgets. --write-budgets makes what they count now their budgets, and the table in docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tools.gpu_counts import budgets, guard

if TYPE_CHECKING:
    from tools.gpu_counts.cases import Case

ROOT = Path(__file__).parents[2]


def main() -> NoReturn:
    given = parse(sys.argv[1:])
    try:
        load()
        found = run(given)
    except guard.Unavailable as reason:
        print(f"skipped: {reason}")
        found = {"skipped": str(reason)}
    if given.json:
        given.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    guard.leave()


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m tools.gpu_counts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configs", nargs="*", metavar="CONFIG", help="default: all shipped configurations")
    parser.add_argument("--ranks", type=positive, default=8, metavar="W", help="number of GPUs (default: 8)")
    parser.add_argument(
        "--global-batch", type=positive, metavar="B", help="pairs of a loss; default: the configuration's"
    )
    parser.add_argument("--cases", choices=("small", "real"), help="count cases that have budgets instead")
    parser.add_argument("--write-budgets", action="store_true", help="make the counts of all cases their budgets")
    parser.add_argument("--json", type=Path, metavar="F", help="write the counts to F")
    given = parser.parse_args(arguments)
    if given.configs and (given.cases or given.write_budgets):
        parser.error("--cases and --write-budgets count cases, no CONFIG: give one or the other")
    if given.json and not given.json.parent.is_dir():
        parser.error(f"no folder {given.json.parent} for --json: make it first")
    return given


def positive(text: str) -> int:
    """An argument that is a number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of at least 1")
    return int(text)


def load() -> None:
    """Prepare this process for CUDA tensors without values. Raises guard.Unavailable."""
    # DeepSpeed reads these when it is imported and when it starts.
    os.environ.update(DS_ACCELERATOR="cuda", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    guard.load()
    from tools.gpu_counts import fake_cuda

    fake_cuda.check()


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Count and print what is asked for. Returns {"configs": counts by path} or {"cases": counts by name}."""
    from atr_scale.errors import UserError
    from tools.gpu_counts.cases import real_cases, small_cases
    from tools.gpu_counts.report import as_json, table

    def counted(cases: dict[str, Case], unless_missing: bool = False) -> budgets.Results:
        """unless_missing: leave out a case whose text encoder is not on this machine."""
        found = {}
        for name, case in cases.items():
            try:
                found[name] = as_json(case.count())
            except UserError as error:
                if not unless_missing:
                    raise
                print(f"{name}\n  left out: {error}\n", flush=True)
                continue
            print(table(name, found[name]), end="\n\n", flush=True)
        return found

    try:
        if given.write_budgets:
            found = counted(small_cases() | real_cases())
            budgets.write(found)
            budgets.write_table(found, budgets.read(budgets.BEFORE))
            return {"cases": found}
        if given.cases:
            return {"cases": counted(small_cases() if given.cases == "small" else real_cases())}
        return {"configs": counted(_recipes(given), unless_missing=not given.configs)}
    except UserError as error:
        sys.exit(f"error: {error}")


def _recipes(given: argparse.Namespace) -> dict[str, Case]:
    """A whole update of each configuration. All are read before the first is counted."""
    from tools.gpu_counts.cases import recipe

    shipped = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "configs").rglob("*.yaml"))]
    return {path: recipe(Path(path), given.ranks, given.global_batch) for path in given.configs or shipped}


if __name__ == "__main__":
    main()
