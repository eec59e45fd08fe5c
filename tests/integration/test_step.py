"""What a run does at each step: the step that loss terms are told, the learning rate, the epoch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
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

    def spy(self: Retriever, batch: Batch, context: StepContext, **rest: Any) -> Any:
        seen.append(context.step)
        return forward(self, batch, context, **rest)

    Retriever.forward = spy  # type: ignore[method-assign, assignment]
    Training(config, World.current(), torch.device("cpu")).run()
    return seen


def test_the_model_knows_the_step(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, tmp_path / "run", steps=3, accum_steps=2, zero_stage=0)
    config.data.validation = None
    # A process of its own: DeepSpeed starts only once in each.
    assert run_ranks(steps_seen, 1, config) == [[0, 0, 1, 1, 2, 2]]


def trained(config: RunConfig, stop_at: int) -> list[dict[str, Any]]:
    """The lines of a training that stops at a step: it is told so before the one in front of it, and reads it then."""
    training = Training(config, World.current(), torch.device("cpu"))
    update = training.engine.update

    def told(*given: Any, **named: Any) -> Any:
        return update(*given, **{**named, "stop": training.progress.step == stop_at - 2})

    training.engine.update = told  # type: ignore[method-assign]
    training.run()
    return [json.loads(line) for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_in_epochs_of_captions_is_resumed_in_its_cool_down(tmp_path: Path) -> None:
    """Each of the 40 clips has two captions: an epoch is 80 / 12 steps, the warm-up 2, the cool-down 3."""
    schedule = {"warmup_steps": None, "warmup_epochs": 0.31, "schedule": "constant", "cooldown_epochs": 0.5}
    epochs = {"steps": None, "epochs": 1, "epoch_of": "captions", "evaluate_every": None}
    config = tiny_config(tmp_path, tmp_path / "whole", zero_stage=0, lr_floor=0.1, **epochs, **schedule)
    path = tmp_path / "train" / "shards" / "manifest.json"
    manifest = json.loads(path.read_text())
    for shard in manifest["shards"]:
        shard["captions"] = [2 for _ in shard["captions"]]
    path.write_text(json.dumps(manifest))

    (whole,) = run_ranks(trained, 1, config, 100)
    lines = [line for line in whole if line["kind"] == "train"]
    rates = [line["lr/audio"] / config.train.lr for line in lines]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 1.0, 0.7, 0.4, 0.1])
    assert [line["epoch"] for line in lines] == pytest.approx([12 * step / 80 for step in range(1, 8)])
    assert [line["step"] for line in whole if line["kind"] == "evaluation"] == [7]  # after an epoch of captions

    config.run.dir = str(tmp_path / "resumed")
    run_ranks(trained, 1, config, 5)
    (resumed,) = run_ranks(trained, 1, config, 100)
    exact = ("step", "loss", "grad_norm", "lr/audio", "lr/heads", "epoch", "t2a/mAP@10")
    assert [[x.get(k) for k in exact] for x in resumed] == [[x.get(k) for k in exact] for x in whole]
