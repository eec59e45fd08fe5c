"""Faults of checkpoints, and of what a run reads, between two starts of real runs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from atr_scale.run_files import CHANGED_DATA, read_json_lines
from tests.faults.runs import TinyRuns, steps_of
from tests.tiny import make_tiny_inputs

pytestmark = pytest.mark.slow


@pytest.mark.fault(
    "other clips lie at the path of the training shards when a run is resumed",
    expected="refused with exit code 2 and the key; run.allow_changed_data=true goes on and records it",
)
def test_other_data_at_the_same_path(runs: TinyRuns, tmp_path: Path, outcome: Callable[[str], None]) -> None:
    runs.inputs = tmp_path
    assert runs.ended(runs.start(steps=2, log_every=1)) == 0
    shards = tmp_path / "train" / "shards"
    shutil.rmtree(shards)
    make_tiny_inputs(tmp_path / "others", 25).shards.rename(shards)

    assert runs.ended(runs.start(steps=3, log_every=1)) == 2
    assert (
        f"error: not what {runs.folder()} was trained on up to step 2: data.train[0].shards ({shards})" in runs.said()
    )
    assert steps_of(runs.folder()) == [1, 2] and "Traceback" not in runs.said()

    overrides = ("run.allow_changed_data=true",)
    assert runs.ended(runs.start(steps=3, log_every=1, overrides=overrides)) == 0
    (line,) = read_json_lines(runs.folder() / CHANGED_DATA)
    assert (line["step"], [*line["changed"]]) == (2, ["data.train[0].shards"])
    outcome("refused by name, rc 2; gone on with when it was allowed")
