"""A rehearsal of what goes wrong on a cluster: is anything lost, and what does it cost?

    python -m tools.rehearse --seed 1 --faults 40            report in runs/rehearsal
    python -m tools.rehearse --seed 1 --faults 40 --write    the report is docs/rehearsal.md

A tiny but real training runs on a SLURM cluster of four nodes on this machine, three for the job and a spare one; its
shards, some of them damaged, are on an S3 server. First it runs undisturbed. Then it runs again while ranks, nodes,
loader workers, the network, the server, the disk and the launcher are hit. It needs root, Debian's packages of SLURM
(tools/slurm_lab.sh names them) and rclone (.ci/rclone). About half a minute for each fault on two cores.

The exit code is 1 if something does not hold.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from atr_scale.errors import OneLineError, UserError, exit_with_line
from tests.tiny_run import tiny_config
from tools.rehearse.box import BUCKET, HANG_S, RANKS, Box, no_box, open_box
from tools.rehearse.checks import Check, Finished, compare, costs
from tools.rehearse.report import machine, write_report
from tools.rehearse.schedule import KINDS, Fault, schedule
from tools.rehearse.watch import Watch

ROOT = Path(__file__).parents[2]
STEPS_A_FAULT = 6
STEP_S = 0.2  # by which a step of the disturbed run is longer, so that faults do not all come at once
CHECKPOINT_EVERY = 10
PLACES = "s3", "folder"  # of the run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the schedule of faults, and of the damage to shards")
    parser.add_argument("--faults", type=int, default=8, metavar="N", help="how many faults")
    parser.add_argument(
        "--run-on",
        choices=PLACES,
        default=PLACES[0],
        help="where the run folder is: a disk of all nodes, or the server",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/rehearsal"), help="folder of the report")
    parser.add_argument("--write", action="store_true", help="write the report to docs/rehearsal.md as well")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends the cluster too
    try:
        if given.faults < 1:
            raise UserError(f"--faults {given.faults}: give at least 1")
        if reason := no_box():
            raise UserError(f"no rehearsal on this machine: {reason}")
        pages = [given.out / "report.md", *([ROOT / "docs" / "rehearsal.md"] if given.write else [])]
        checks = rehearse(given.seed, given.faults, pages, given.run_on)
    except OneLineError as error:
        exit_with_line(error)
    for check in checks:
        print(f"{'ok' if check.holds else 'NO'}  {check.what}: {check.found}")
    print(f"report: {pages[-1]}")
    sys.exit(0 if all(check.holds for check in checks) else 1)


def rehearse(
    seed: int, faults: int, pages: Sequence[Path], run_on: str, kinds: Sequence[str] = tuple(KINDS)
) -> list[Check]:
    """Run undisturbed, then with faults of these kinds, and write the report to all `pages`. What was checked."""
    steps = STEPS_A_FAULT * faults
    folder = Path(tempfile.mkdtemp(prefix="rehearsal-"))
    try:
        with open_box(folder, random.Random(seed)) as box:
            runs = Runs(box, steps, run_on)
            reference = runs.finish("undisturbed")
            found = runs.finish("disturbed", schedule(seed, faults, steps, kinds), STEP_S)
            checks = compare(found, reference, box.bucket / "train" / "text_encoder", steps, faults)
    except BaseException:
        print(f"what there is: {folder}", file=sys.stderr)
        raise
    command = f"python -m tools.rehearse --seed {seed} --faults {faults} --run-on {run_on}"
    said = (
        f"`{command}` wrote this page.\n"
        f"A tiny training of {steps} steps ran with a rank on each of {RANKS} nodes of a SLURM cluster on one machine\n"
        f"({machine()}), which had a spare node. Its shards are on an S3 server, two of them damaged. It was hit by\n"
        "faults at random steps, and is compared with a run of the same shards that was left alone."
    )
    for page in pages:
        page.parent.mkdir(parents=True, exist_ok=True)
        write_report(page, found.record, checks, costs(found.record), said)
    if all(check.holds for check in checks):
        shutil.rmtree(folder)
    else:
        print(f"what there is: {folder}", file=sys.stderr)
    return checks


class Runs:
    """Trainings of `steps` steps in a box, whose run folders are on `run_on`."""

    def __init__(self, box: Box, steps: int, run_on: str) -> None:
        self.box, self.steps, self.on_s3 = box, steps, run_on == "s3"

    def finish(self, name: str, faults: Sequence[Fault] = (), step_seconds: float = 0.0) -> Finished:
        """Submit a training, hit it with the faults, and wait for its end."""
        box, audit = self.box, self.box.folder / f"{name}.audit"
        box.submit(self._write_config(name), audit, step_seconds)
        record = Watch(box, lambda: self._folder(name), audit, self.steps, faults, name).until_over()
        return Finished(box.bucket / "runs" / name if self.on_s3 else box.disk / name, audit, record)

    def _folder(self, name: str) -> Path:
        """Where the first rank writes: on the disk that all nodes share, or that of its node."""
        if not self.on_s3:
            return self.box.disk / name
        signs = self.box.disk.glob(f"*/runs/*/{name}/status/rank-0.json")
        return max(signs, key=lambda sign: sign.stat().st_mtime, default=self.box.disk / "0/0").parents[1]

    def _write_config(self, name: str) -> Path:
        """The configuration of a run that reads from the bucket and keeps all its checkpoints."""
        train: dict[str, Any] = {"steps": self.steps, "checkpoint_every": CHECKPOINT_EVERY, "evaluate_every": 50}
        train |= {"keep_checkpoints": 10_000, "hang_seconds": HANG_S, "lr": 2e-4}
        config = tiny_config(self.box.bucket, self.box.disk / name, **train)
        config.plugins = ["tools.rehearse.recorder"]
        config.data.train[0].shards = f"s3://{BUCKET}/train/shards"
        config.data.workers = 1
        if self.on_s3:
            config.run.dir = f"s3://{BUCKET}/runs/{name}"
        path = self.box.folder / f"{name}.yaml"
        path.write_text(config.to_yaml(), encoding="utf-8")
        return path


if __name__ == "__main__":
    main()
