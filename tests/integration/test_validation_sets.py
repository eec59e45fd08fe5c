"""Several validation sets in one run: each is evaluated under its name, one metric makes the best checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from atr_scale import run_checkpoints
from atr_scale.training import loop
from tests.tiny import make_tiny_inputs, write_tiny_config
from tests.tiny_run import tiny_config

pytestmark = pytest.mark.slow


def train(config: Path, *overrides: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "atr_scale.train", str(config), *overrides], capture_output=True, text=True, timeout=300
    )
    return f"{done.returncode} {done.stderr}"


def test_sets_are_logged_by_name_and_the_selected_metric_is_the_best(tmp_path: Path) -> None:
    inputs = make_tiny_inputs(tmp_path / "made")
    other = make_tiny_inputs(tmp_path / "other", 7)
    run = tmp_path / "run"
    settings = {"evaluate_every": 1, "checkpoint_every": 1, "keep_checkpoints": 9, "lr": 0.02}
    config = write_tiny_config(tmp_path / "run.yaml", inputs, run, **settings)
    sets = [f"data.validation.first={inputs.shards}", f"data.validation.second={other.shards}"]
    assert train(config, *sets, "evaluation.select=second/t2a/median_rank").startswith("0 ")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if line["kind"] == "evaluation"]
    assert [(line["step"], line["split"]) for line in found] == [
        (step, name) for step in (1, 2, 3, 4) for name in ("first", "second")
    ]
    ranks = {line["step"]: line["t2a/median_rank"] for line in found if line["split"] == "second"}
    best = min(ranks, key=lambda step: (ranks[step], step))  # fewer is better, the earlier of equal ones
    assert (run / "best").resolve().name == f"step-{best}"
    state = json.loads((run / "latest" / "state.json").read_text())
    assert state["best"] == -ranks[best] and state["best_metric"] == "second/t2a/median_rank"

    refused = train(config, *sets, "evaluation.select=third/t2a/R@1")
    assert refused.startswith("2 ") and "the sets are first, second" in refused and "Traceback" not in refused


def test_a_resume_on_another_validation_set_begins_anew_with_the_best(tmp_path: Path) -> None:
    """The scores of the set before do not count, although they are higher."""
    run = tmp_path / "run"
    config = tiny_config(tmp_path, run, steps=2, evaluate_every=1, checkpoint_every=1, keep_checkpoints=9)
    loop.train(config)
    before = run_checkpoints.read_score(run / "best")
    assert before is not None and before.data
    for step in (1, 2):
        run_checkpoints.write_score(run / "checkpoints" / f"step-{step}", before._replace(value=2.0))
    other = config.model_copy(deep=True)
    other.train.steps, other.data.validation = 3, {"train": str(tmp_path / "train" / "shards")}
    loop.train(other)
    assert (run / "best").resolve().name in ("step-2", "step-3"), "step 2 is evaluated again on the new set"
    best = run_checkpoints.read_score(run / "best")
    assert best is not None and best.value < 2 and best.data != before.data
