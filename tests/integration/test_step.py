"""Loss terms that change over a run are told the step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from atr_scale.batch import Batch
from atr_scale.config import RunConfig
from atr_scale.distributed.world import World
from atr_scale.model import Retriever, StepContext
from atr_scale.training.loop import Training
from tests.tiny_run import tiny_config
from tools.ranks import run_ranks


def steps_seen(config: RunConfig) -> list[int]:
    """The step in the context of each forward of a training."""
    seen: list[int] = []
    forward: Any = Retriever.forward

    def spy(self: Retriever, batch: Batch, context: StepContext) -> Any:
        seen.append(context.step)
        return forward(self, batch, context)

    Retriever.forward = spy  # type: ignore[method-assign, assignment]
    Training(config, World.current(), torch.device("cpu")).run()
    return seen


def test_the_model_knows_the_step(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, tmp_path / "run", steps=3, accum_steps=2, zero_stage=0)
    config.data.validation = None
    # A process of its own: DeepSpeed starts only once in each.
    assert run_ranks(steps_seen, 1, config) == [[0, 0, 1, 1, 2, 2]]
