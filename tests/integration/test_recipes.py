"""Recipes as whole runs in small, one after the other: what a stage writes is what the next one reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from atr_scale.cli import app
from atr_scale.config import load_config
from atr_scale.distributed.world import World
from atr_scale.training.loop import Training
from tests.commands import ROOT
from tests.recipes import small_world
from tests.tiny import read_training
from tools.ranks import run_ranks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

# Of what costs time here, and of the log.
OVERRIDES = ["data.workers=0", "train.precision=fp32", "train.evaluate_every=15", "train.log_every=1"]


def train(folder: Path, recipe: str) -> list[dict[str, float]]:
    """The log of a run of `recipe`, one line for each optimizer step."""
    with small_world(folder):
        config = load_config(ROOT / "configs/papers" / recipe, OVERRIDES)
        Training(config, World.current(), torch.device("cpu")).run()
        return read_training(Path(config.run.dir))


def test_both_stages_of_estimated_correspondences(tmp_path: Path) -> None:
    """MN's stages with the schedule of the quoted code: warm-up over an epoch of captions, then a cosine, then flat."""
    with small_world(tmp_path):
        for folder in ("runs/stage1_mn", "correspondences"):
            shutil.rmtree(folder)
    (first,) = run_ranks(train, 1, tmp_path, "estimated_correspondences/stage1_mn.yaml")
    steps = 27  # 20 epochs of 84 captions in batches of 64
    assert len(first) == steps and first[-1]["step"] == steps and "loss/nt_xent" in first[0]
    rates = [line["lr/heads"] for line in first]
    assert rates[0] == 2e-5 and rates[17] > 1.01e-7, "15 epochs are 19 whole steps"
    assert rates[18:] == pytest.approx([1e-7] * 9)
    with small_world(tmp_path):
        tables = ["--shards", "shards/clotho/train", "--out", "correspondences/clotho"]
        app(["estimate", "runs/stage1_mn", "runs/stage1_passt", "runs/stage1_atst", *tables], standalone_mode=False)
    (second,) = run_ranks(train, 1, tmp_path, "estimated_correspondences/stage2_mn.yaml")
    assert len(second) == 19 and "loss/distillation" in second[0] and "loss/nt_xent" not in second[0]
    taken = json.loads((tmp_path / "runs/stage2_mn/initial_weights.json").read_text())["taken"]
    assert {"audio_encoder", "text_encoder", "audio_projection", "text_projection"} <= taken.keys()
