"""Two trainings in one process, as in a notebook."""

from __future__ import annotations

from pathlib import Path

import pytest

from atr_scale import checkpoint
from atr_scale.training.loop import train
from tests.tiny_run import tiny_config

pytestmark = pytest.mark.slow


def test_a_process_trains_twice(tmp_path: Path) -> None:
    """The second training starts anew and ends with the same weights."""
    weights = []
    for run in (tmp_path / "first", tmp_path / "second"):
        train(tiny_config(tmp_path / "inputs", run, steps=3))
        assert checkpoint.read_state(run / "latest")["step"] == 3
        weights.append(checkpoint.read_weights(run))
    assert all(weights[0][key].equal(weights[1][key]) for key in weights[0])
