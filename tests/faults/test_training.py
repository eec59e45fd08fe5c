"""Steps that are not finite, few shards for many readers, and another number of ranks: nothing is lost or repeated."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from atr_scale.data.shard_builder import build_shards
from tests.faults.audit import HOOKS, Row, read_audit
from tests.faults.runs import TinyRuns, steps_of, tiny_runs
from tests.tiny import RATE, read_training
from tests.tiny_run import tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
Outcome = Callable[[str], None]
CLIPS, STEPS, BATCH = 40, 10, 12  # three epochs
WHOLE: dict[str, Any] = {
    "steps": STEPS,
    "global_batch_size": BATCH,
    "log_every": 1,
    "zero_stage": 0,
    "schedule": "constant",
}

# Rank 1 gets clips that are not finite at the steps of POISON.
POISON = """
import os
from dataclasses import replace
from atr_scale.training.engine import Engine
update = Engine.update
def poisoned(self, batches, rates, seeds, context, **more):
    if os.environ["RANK"] == "1" and str(context.step + 1) in os.environ["POISON"].split():
        batches = [replace(batch, waveform=batch.waveform * float("nan")) for batch in batches]
    return update(self, batches, rates, seeds, context, **more)
Engine.update = poisoned
"""


@pytest.mark.fault(
    "one rank's batch gives a NaN, once and then three times in a row",
    expected="all ranks skip those updates together and count them, the samples are named; three in a row end the run",
)
def test_nan_on_one_rank(runs: TinyRuns, outcome: Outcome) -> None:
    process = runs.start(ranks=2, steps=10, log_every=1, checkpoint_every=2, zero_stage=2, hooks=POISON,
                         environment={"POISON": "3 6 7 8"})  # fmt: skip
    assert runs.ended(process) == 1
    run = runs.folder()
    named = sorted(path.name for path in run.glob("nonfinite-step-*"))
    assert named == [f"nonfinite-step-{step}-rank-{rank}.json" for step in (3, 6, 7, 8) for rank in (0, 1)]
    assert len(json.loads((run / named[0]).read_text())) == 6
    lines = {int(line["step"]): line for line in read_training(run)}
    assert [lines[step]["skipped_steps"] for step in (2, 3, 4, 5, 6, 7)] == [0, 1, 1, 1, 2, 3]
    assert [step for step, line in lines.items() if line["loss"] is None] == [3, 6, 7]
    assert "3 non-finite steps in a row up to step 8: lower train.lr, or look at the samples" in runs.said()
    assert (run / "latest").resolve().name == "step-6"
    outcome("step 3 was skipped by both ranks, and training went on; after steps 6 to 8 rc 1; the samples were named")


@pytest.fixture(scope="module")
def three_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The inputs of the tiny run with 40 clips in three shards."""
    folder = tmp_path_factory.mktemp("three")
    tiny_config(folder, folder)
    build_shards("folder", folder / "train" / "corpus", folder / "three", shard_size=15, sample_rate=RATE, workers=1)
    assert len(list((folder / "three").glob("*.tar"))) == 3
    return folder


def start(runs: TinyRuns, audit: Path, ranks: int, *overrides: str, **train: Any) -> int:
    shards = f"data.train[0].shards={runs.inputs / 'three'}"
    return runs.ended(
        runs.start(
            ranks=ranks, overrides=(shards, *overrides), hooks=HOOKS, environment={"AUDIT": str(audit)}, **WHOLE | train
        )
    )


class Given(NamedTuple):
    """The rows that all ranks of a run were given, and its losses."""

    rows: list[Row]
    losses: list[float]


@pytest.fixture(scope="module")
def two_ranks(three_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Given:
    """What two ranks with two loader workers each are given of three shards, in a run that nothing disturbs."""
    place = tmp_path_factory.mktemp("two_ranks")
    with tiny_runs(place, three_shards) as runs:
        assert start(runs, place / "audit", 2, "data.workers=2", evaluate_every=5) == 0, runs.said()
        kinds = Counter(json.loads(x)["kind"] for x in (runs.folder() / "metrics.jsonl").read_text().splitlines())
        assert kinds["evaluation"] == 2 and kinds["train"] == STEPS
        rows = read_audit(place / "audit", three_shards / "train" / "text_encoder")
        return Given(rows, [line["loss"] for line in read_training(runs.folder())])


@pytest.mark.fault(
    "three shards of uneven length for two ranks with two loader workers each",
    expected="both ranks train all steps, with as many samples each; evaluations end; never a hang",
)
def test_few_shards(two_ranks: Given, outcome: Outcome) -> None:
    counts = Counter((row.step, row.rank) for row in two_ranks.rows)
    assert counts == {(step, rank): BATCH // 2 for step in range(1, STEPS + 1) for rank in (0, 1)}
    outcome(f"{STEPS} steps of {BATCH // 2} samples on each rank, and two evaluations")


@pytest.mark.fault(
    "a clip could reach two ranks, or none", expected="the ranks' samples are disjoint in each epoch, their union whole"
)
def test_every_clip_once_in_an_epoch(two_ranks: Given, outcome: Outcome) -> None:
    by_step = sorted(two_ranks.rows, key=lambda row: (row.step, row.rank))
    assert all(row.tone == row.caption for row in by_step)
    for epoch in range(STEPS * BATCH // CLIPS):
        visits = Counter(row.key for row in by_step[epoch * CLIPS : (epoch + 1) * CLIPS])
        assert len(visits) == CLIPS and set(visits.values()) == {1}
    outcome(f"{STEPS * BATCH // CLIPS} epochs of {CLIPS} clips: each clip once in each, on one rank")


@pytest.mark.fault(
    "another number of ranks and another ZeRO stage at each resume: 1 (stage 1), 2 (stage 3), 1 (stage 0)",
    expected="step, weights and moments are kept; every step has the samples and the loss of an undisturbed run",
)
def test_another_number_of_ranks(three_shards: Path, two_ranks: Given, tmp_path: Path, outcome: Outcome) -> None:
    with tiny_runs(tmp_path, three_shards) as runs:
        for ranks, stage, steps in ((1, 1, 3), (2, 3, 6), (1, 0, STEPS)):
            assert start(runs, tmp_path / f"audit-{steps}", ranks, steps=steps, zero_stage=stage) == 0, runs.said()
        assert steps_of(runs.folder()) == list(range(1, STEPS + 1))
        losses = [line["loss"] for line in read_training(runs.folder())]
    text = three_shards / "train" / "text_encoder"
    rows = [row for steps in (3, 6, STEPS) for row in read_audit(tmp_path / f"audit-{steps}", text)]
    assert keys_by_step(rows) == keys_by_step(two_ranks.rows)
    assert losses == pytest.approx(two_ranks.losses, rel=1e-3)
    apart = max(abs(a / b - 1) for a, b in zip(losses, two_ranks.losses, strict=True))
    outcome(f"all {STEPS} steps had the samples of a run on two ranks, and its losses but for {apart:.0e} of them")


def keys_by_step(rows: list[Row]) -> dict[int, list[str]]:
    """The keys of each global batch: those of rank 0 come first."""
    return {step: [row.key for row in rows if row.step == step] for step in range(1, STEPS + 1)}
