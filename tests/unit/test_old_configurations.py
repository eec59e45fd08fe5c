"""Runs that earlier versions have started go on: what they saved says the same as their configuration says today."""

from __future__ import annotations

from pathlib import Path

import pytest

from atr_scale.config import load_config
from atr_scale.training.checks import differences

FIXTURES = Path(__file__).parents[1] / "fixtures"
SAVED = [
    (FIXTURES / "run_0_1" / "config.yaml", FIXTURES / "run_0_1" / "run" / "config.resolved.yaml"),
    *((path.with_name(path.name.replace(".resolved", "")), path)
      for path in sorted((FIXTURES / "configs_0_2").glob("*.resolved.yaml"))),
]  # fmt: skip


@pytest.mark.parametrize(("given", "saved"), SAVED, ids=lambda path: path.name)
def test_the_saved_configuration_is_that_of_the_same_run(given: Path, saved: Path) -> None:
    """Keys that came later have defaults that change nothing, and defaults of old keys have stayed."""
    started, now = (load_config(path).model_dump(mode="json") for path in (saved, given))
    assert differences(started, now) == []
    changed = load_config(given, ["train.eps=1e-3"]).model_dump(mode="json")
    assert [line.split()[0] for line in differences(started, changed)] == ["train.eps"]


def test_there_are_some() -> None:
    assert len(SAVED) == 4
