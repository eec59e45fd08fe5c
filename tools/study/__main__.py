"""Run the study on the demo corpora and write its tables into RESULTS.md.

    atr-scale demo-data --out demo/corpora
    python -m tools.study --demo demo/corpora --out runs/study [--only a,b] [--seeds 3] [--minutes 60]
    python -m tools.study --demo demo/corpora --out runs/study --report

Every finished run is one line of OUT/runs.jsonl. A later call continues with the runs that are not there yet. The
options --esc50, --mn04 and --sentences add real recordings to experiments a and b.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from atr_scale.errors import UserError
from tools.study import report
from tools.study.jobs import run
from tools.study.recipes import EXPERIMENTS, STEPS
from tools.study.store import Settings

ENCODER_STEPS = 150


def _settings(given: argparse.Namespace) -> Settings:
    real = (given.esc50, given.mn04, given.sentences)
    if any(real) and not all(real):
        raise UserError("ESC-50 needs three options: give --esc50, --mn04 and --sentences together")
    seeds = tuple(range(given.seeds))
    return Settings(given.out, given.demo, seeds, given.steps, given.encoder_steps, esc50=real if all(real) else None)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--demo", type=Path, default=Path("demo/corpora"), help="folder of `atr-scale demo-data`")
    parser.add_argument("--only", help="experiments by letter, such as a,b (default: all)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps of a head")
    parser.add_argument("--encoder-steps", type=int, default=ENCODER_STEPS, help="optimizer steps of the encoders")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after this many minutes")
    parser.add_argument("--workers", type=int, default=min(2, len(os.sched_getaffinity(0))))
    parser.add_argument("--esc50", type=Path, help="folder of ESC-50; adds real recordings to a and b")
    parser.add_argument("--mn04", type=Path, help="weights of mn04 from EfficientAT, for --esc50")
    parser.add_argument("--sentences", type=Path, help="folder of a sentence encoder, for --esc50")
    parser.add_argument("--report", action="store_true", help="only write RESULTS.md from the finished runs")
    parser.add_argument("--results", type=Path, default=Path("RESULTS.md"))
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    os.environ["OMP_NUM_THREADS"] = "1"  # of the worker processes
    try:
        chosen = (given.only or ",".join(EXPERIMENTS)).split(",")
        unknown = [letter for letter in chosen if letter not in EXPERIMENTS]
        if unknown:
            raise UserError(f"no experiment {unknown[0]!r}: --only takes {', '.join(EXPERIMENTS)}")
        settings = _settings(given)
        succeeded = given.report or run(settings, chosen, given.workers, given.minutes)
        report.write_results(settings, given.results)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0 if succeeded else 1


if __name__ == "__main__":
    sys.exit(main())
