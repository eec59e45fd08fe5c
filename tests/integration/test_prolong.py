"""A run that starts from another one, and goes on to a larger length than it was started with, under ZeRO 3."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from atr_scale.config import RunConfig, parse_config
from atr_scale.distributed.world import World
from atr_scale.errors import UserError
from atr_scale.training.loop import Training
from tests.tiny import read_training
from tests.tiny_run import tiny_config
from tools.ranks import run_ranks

pytestmark = pytest.mark.slow
CONSTANT = {"lr_floor": 1.0, "warmup_steps": 0}


def configured(folder: Path, run: str, initial: str | None = None, scorer: str = "tap", **train: Any) -> RunConfig:
    values = tiny_config(folder, folder / run, zero_stage=3, **CONSTANT).model_dump(mode="json")
    values["data"]["validation"] = None
    values["model"]["scorer"] = {"name": scorer}
    values["objective"] = {"temperature": {"initial": 0.05 if initial else 0.2, "learnable": False}}
    values["train"] |= {"initial_checkpoint": initial and str(folder / initial), **train}
    return parse_config(values, "here")


def train_each(configs: list[RunConfig]) -> list[str]:
    """What each training said: its log, or its refusal."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("atr_scale").addHandler(handler)
    logging.getLogger("atr_scale").setLevel(logging.INFO)
    for config in configs:
        try:
            Training(config, World.current(), torch.device("cpu")).run()
        except UserError as error:
            said.append(f"error: {error}")
    return said


def test_a_run_is_made_longer(tmp_path: Path) -> None:
    configs = [
        configured(tmp_path, "first", scorer="pooled", steps=2),
        configured(tmp_path, "straight", "first", steps=6),
        *(configured(tmp_path, "longer", "first", steps=steps) for steps in (3, 6, 5)),
        configured(tmp_path, "longer", "first", steps=8, lr=1.0),
        configured(tmp_path, "longer", "first", steps=None, epochs=1),
        *(configured(tmp_path, "cosine", scorer="pooled", steps=steps, lr_floor=0.0) for steps in (2, 4)),
    ]
    said, _ = run_ranks(train_each, 2, configs)

    straight, longer = (read_training(tmp_path / run) for run in ("straight", "longer"))
    assert [line["step"] for line in longer] == [1, 2, 3, 4, 5, 6]
    for name in ("loss", "grad_norm", "lr/heads", "temperature"):
        assert [line[name] for line in longer] == [line[name] for line in straight], name
    assert all(line["temperature"] == pytest.approx(0.05) for line in longer)
    assert all(line["temperature"] == pytest.approx(0.2) for line in read_training(tmp_path / "first"))

    taken = json.loads((tmp_path / "longer" / "initial_weights.json").read_text())
    assert list(taken["taken"]) == ["audio_encoder", "text_encoder", "audio_projection", "text_projection"]
    assert list(taken["new"]) == ["scorer", "temperature"] and taken["left_out"] == ["temperature"]
    assert sum(line.startswith("initial weights from ") for line in said) == 2, "not when a run goes on"

    told, of_cosine = (line for line in said if "steps instead of" in line)
    assert "longer: 6 steps instead of 3; from step 3 on the schedule is the new one" in told
    assert told.endswith("the learning rate of heads is 0.001, and 0.001 in the old one")
    assert of_cosine.endswith("the learning rate of heads is 0.00025, and 0 in the old one")
    rates = [line["lr/heads"] for line in read_training(tmp_path / "cosine")]
    assert rates == pytest.approx([1e-3, 0, 2.5e-4, 0]), "two steps of the old schedule, two of the new one"
    refused = [line.partition("longer ")[2] for line in said if line.startswith("error: ")]
    assert refused[0].startswith("has made 6 optimizer steps, more than train.steps = 5: ask for at least as many")
    assert refused[1].startswith("was trained with another configuration (train.lr was 0.001, now 1.0): restore")
    assert refused[2].startswith("has made 6 optimizer steps, more than train.epochs = 1.0, which is 4 steps")
