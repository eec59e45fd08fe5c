"""Gradients travel beside the backward pass, as much as the plan says: two ranks over a slow network."""

from __future__ import annotations

from pathlib import Path

import pytest

from atr_scale.planner.gpus import Rates
from tools.bench import overlap, steps
from tools.shaped_link import why_not

pytestmark = pytest.mark.slow
RATE = 1.2e9  # FLOP/s: a step of 1.6 s that takes 0.2 s of the processor


def test_a_step_over_a_slow_network_takes_the_planned_time(tmp_path: Path) -> None:
    """Real updates of the engine, whose operations take as long as those of the planned machine."""
    if reason := why_not():
        pytest.skip(reason)
    config = steps.configuration(tmp_path, "small_cnn", dim=256, layers=4, global_batch_size=4)
    case = overlap.Case(config, 20.0, 0.12, 2**20, Rates(RATE, RATE, RATE, 1e12, 0.0), turns=2)
    found = overlap.measure(case)
    planned = overlap.plan(case, found)
    work = planned.step - planned.network.exposed
    assert found.at_end == pytest.approx(work + found.reduction, rel=0.15), "nothing is hidden at the end"
    assert found.beside == pytest.approx(planned.step, rel=0.15)
    assert found.hidden == pytest.approx(planned.network.hidden / planned.network.busy, abs=0.15)
    assert found.hidden > 0.6
