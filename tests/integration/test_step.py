"""Loss terms that change over a run are told the step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from atr_scale.model import Retriever
from atr_scale.training.loop import train
from tests.tiny_run import tiny_config


def test_the_model_knows_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(tmp_path, tmp_path / "run", steps=3, accum_steps=2, zero_stage=0)
    config.data.validation = None
    seen, forward = [], Retriever.forward

    def spy(self: Retriever, *args: Any) -> Any:
        seen.append(self.step)
        return forward(self, *args)

    monkeypatch.setattr(Retriever, "forward", spy)
    train(config)
    assert seen == [0, 0, 1, 1, 2, 2]
