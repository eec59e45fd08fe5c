"""ESC-50 as jobs on a SLURM cluster in a box: undisturbed runs, and one that is preempted twice and then loses a node.

    python -m tools.esc50_job --esc50 ESC-50 --mn04 mn04_as_mAP_432.pt --sentences all-MiniLM-L6-v2

Works as a user does who follows the head of configs/esc50.yaml, in a folder made by `atr-scale init`. Undisturbed runs
have one rank; the disturbed one starts with two, and with the seed of the first of the others. The same call goes on
after an interruption: runs that are evaluated already are kept. Writes docs/esc50_job.md. --epochs makes it shorter.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from atr_scale.cli.init import init_command
from atr_scale.data.shard_builder import build_shards
from atr_scale.errors import Failure, UserError, exit_with_line
from atr_scale.evaluation.results import read_results
from atr_scale.status import AttemptFacts, is_run, read_status
from tests.tiny import read_training
from tools.cluster import Cluster, no_cluster, running_cluster
from tools.esc50_corpus import write_corpus

CONFIG = "configs/esc50.yaml"
METRICS = {
    "zero_shot/accuracy": "accuracy by class captions",
    "zero_shot/mAP": "class mAP",
    "class/mAP": "mAP of clips",
}
PAGE = """# ESC-50 as a job that is preempted twice and loses a node

`python -m tools.esc50_job` has written this page; its head says how. Real recordings and original weights, on a SLURM
cluster in a box of two nodes: `sbatch slurm/train.sh configs/esc50.yaml{overrides}`, then
`sbatch slurm/evaluate.sh RUN --split test`. The undisturbed jobs have one rank. The disturbed one starts with two
nodes, a rank on each, and saves every 25 steps. At a quarter of its steps it is told that it will be preempted (USR1);
at half of them it is preempted at once (`scontrol requeue`); at three quarters a node loses its power for good, and the
job, which was submitted with `--nodes=1-2`, goes on with the other one.

{runs}

Minutes are those from the first start to the end, on a machine with other work.

{spreads}

Last column: difference to the undisturbed run of the same seed. Its loss differs from that run's by {apart} at step
{first}, and by at most {most} at any logged step (relative).

## The starts of the disturbed job

{starts}
"""
LIMIT = 3600.0  # seconds for each stage of a job


@dataclass(frozen=True)
class Trained:
    """A run that has been evaluated. metrics: by the keys of METRICS. losses: of the logged steps."""

    name: str
    metrics: dict[str, float]
    attempts: list[AttemptFacts]
    losses: dict[int, float]

    @property
    def minutes(self) -> float:
        """From the first start of the job to its end, the waiting in between included."""
        return ((self.attempts[-1].ended or 0.0) - self.attempts[0].started) / 60


def prepare(folder: Path, esc50: Path, mn04: Path, sentences: Path) -> None:
    """What a user makes before the first job: scripts and configurations, shards, weights, the sentence encoder."""
    init_command(str(folder))
    corpus = folder / "data/esc50"
    write_corpus(esc50, corpus, test_fold=5, validation_fold=None)
    for split in ("train", "test"):
        build_shards("folder", corpus, folder / "shards/esc50" / split, split=split, encoding="pcm16", workers=1)
    for path, target in (
        (folder / "checkpoints/mn04_as_mAP_432.pt", mn04),
        (folder / "sentence-transformers/all-MiniLM-L6-v2", sentences),
    ):
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            path.symlink_to(target.resolve(strict=True))


def evaluated(run: Path, name: str) -> Trained | None:
    """A run by its folder; None if it has no scores yet."""
    entries = (read_results(run) or {"results": []})["results"]
    found = {key: entry["value"] for part in entries for key, entry in part["metrics"].items() if key in METRICS}
    if set(found) != set(METRICS):
        return None
    losses = {int(line["step"]): line["loss"] for line in read_training(run)}
    return Trained(name, found, read_status(run).attempts, losses)


def submit(cluster: Cluster, nodes: str, run: str, overrides: Iterable[str], **variables: str) -> tuple[str, str]:
    """A training, with a rank on each node, and its evaluation; the numbers of the two jobs."""
    shutil.rmtree(cluster.root / run, ignore_errors=True)  # of an earlier call that was interrupted
    train = cluster.sbatch("train", CONFIG, f"run.dir={run}", *overrides, nodes=nodes, **variables)
    words = (run, "--split", "test")
    return train, cluster.sbatch("evaluate", *words, after=train, nodes="1")


def complete(cluster: Cluster, jobs: Sequence[str]) -> None:
    """Wait for the end of jobs. Raises Failure if one has not succeeded."""
    for number in jobs:
        if cluster.finish(number, LIMIT)["JobState"] != "COMPLETED":
            raise Failure(f"job {number}: {cluster.log(number)[-4000:]}")


def disturb(cluster: Cluster, job: str, run: Path) -> None:
    """A preemption with a warning, one without, and a lost node."""

    def reached(share: float) -> bool:
        status = read_status(run) if is_run(run) else None
        return status is not None and status.steps is not None and status.step >= share * status.steps

    cluster.wait(job, lambda: reached(0.25), LIMIT)
    cluster.call("scancel", "--signal=USR1", "--batch", job)
    cluster.wait(job, lambda: reached(0.5), LIMIT)
    cluster.call("scontrol", "requeue", job)
    cluster.wait(job, lambda: reached(0.75), LIMIT)
    cluster.lab("kill", cluster.nodes(job)[-1])


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = (head, ["---"] * len(head), *rows)
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def page(undisturbed: Sequence[Trained], disturbed: Trained, overrides: Sequence[str]) -> str:
    """The document. The first of the undisturbed runs, two or more, has the seed of the disturbed one."""
    same = undisturbed[0]
    runs = []
    for run in (*undisturbed, disturbed):
        ranks = ", ".join(str(attempt.world_size) for attempt in run.attempts)
        scores = [f"{run.metrics[key]:.4f}" for key in METRICS]
        runs.append([run.name, ranks, f"{run.minutes:.0f}", f"{run.losses[max(run.losses)]:.4f}", *scores])
    spreads = []
    for key, title in METRICS.items():
        values, own = [run.metrics[key] for run in undisturbed], disturbed.metrics[key]
        mean, deviation = statistics.mean(values), statistics.stdev(values)
        spread = f"{min(values):.4f} to {max(values):.4f}"
        within = "yes" if abs(own - mean) <= 2 * deviation else f"no, {own - mean:+.4f} to the mean"
        row = [title, f"{mean:.4f} ± {deviation:.4f}", spread, f"{own:.4f}", within, f"{own - same.metrics[key]:+.4f}"]
        spreads.append(row)
    starts = []
    for one in disturbed.attempts:
        end = (one.reason or "its node was lost").partition(":")[0]  # the rest of an error of the network is long
        steps = f"{one.first_step} to {one.last_step}"
        starts.append([one.attempt, one.world_size, steps, end, one.repeated_steps, f"{one.lost_s:.0f}"])
    apart = {step: abs(loss / same.losses[step] - 1) for step, loss in disturbed.losses.items() if step in same.losses}
    return PAGE.format(
        overrides="".join(f" {word}" for word in overrides),
        runs=table(["run", "ranks of each start", "minutes", "last loss", *METRICS.values()], runs),
        spreads=table(
            [
                "",
                "undisturbed: mean ± deviation",
                "lowest to highest",
                "disturbed",
                "within two deviations",
                "to its own seed",
            ],
            spreads,
        ),
        starts=table(["start", "ranks", "steps", "how it ended", "steps repeated", "seconds lost"], starts),
        first=min(apart),
        apart=f"{apart[min(apart)]:.1e}",
        most=f"{max(apart.values()):.1e}",
    )


def work(given: argparse.Namespace) -> None:
    """All runs that are missing, and the page. Raises UserError, Failure."""
    if reason := no_cluster():
        raise UserError(reason)
    out: Path = given.out.resolve()
    prepare(out, given.esc50, given.mn04, given.sentences)
    overrides = [f"train.epochs={given.epochs}"] if given.epochs else []
    names = {f"runs/seed-{seed}": seed for seed in range(given.seeds)}
    disturbed = out / "runs/disturbed"
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as lab,
        running_cluster(Path(lab) / "lab", 2, out) as cluster,
    ):
        jobs: list[str] = []
        for name, seed in names.items():
            if evaluated(out / name, name) is None:
                jobs += submit(cluster, "1", name, [*overrides, f"run.seed={seed}"], SBATCH_EXCLUSIVE="exclusive")
        complete(cluster, jobs)
        if evaluated(disturbed, "") is None:
            while cluster.idle() < 2:  # a moment after the end of a job
                time.sleep(1)
            more = [*overrides, "run.seed=0", "train.checkpoint_every=25"]
            train, evaluation = submit(cluster, "1-2", "runs/disturbed", more)
            disturb(cluster, train, disturbed)
            complete(cluster, [train, evaluation])
    runs = [evaluated(out / name, f"seed {seed}, undisturbed") for name, seed in names.items()]
    last = evaluated(disturbed, "seed 0, disturbed")
    assert last and all(runs), "all are evaluated"
    given.page.write_text(page([run for run in runs if run], last, overrides), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--esc50", type=Path, required=True, help="folder of ESC-50")
    parser.add_argument("--mn04", type=Path, required=True, help="weights of mn04 from EfficientAT")
    parser.add_argument("--sentences", type=Path, required=True, help="folder of the sentence encoder")
    parser.add_argument("--out", type=Path, default=Path("runs/esc50_job"), help="folder for all runs")
    parser.add_argument("--seeds", type=int, default=3, help="undisturbed runs")
    parser.add_argument("--epochs", type=int, help="instead of those of the configuration")
    parser.add_argument("--page", type=Path, default=Path("docs/esc50_job.md"), help="page to write")
    try:
        work(parser.parse_args())
    except (UserError, Failure) as error:
        exit_with_line(error)


if __name__ == "__main__":
    main()
