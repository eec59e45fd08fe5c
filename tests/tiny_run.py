"""A whole run small enough for tests: its inputs and its configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from atr_scale.config import RunConfig, load_config
from atr_scale.config_model import ScorerSection
from atr_scale.model import Retriever
from tests.tiny import TinyInputs, make_tiny_inputs, write_tiny_config

OVERRIDES = (
    "data.crop_seconds=0.5",
    "data.crop_quantum=0.25",
    "model.projection.dim=16",
    "model.scorer.name=meanmax",
    "evaluation.batch_size=4",
)


def tiny_config(folder: Path, run: Path, **train: Any) -> RunConfig:
    """A run on 40 clips, validated on 11; inputs are made under `folder` once. `train` sets keys of its section."""
    if not (folder / "train").exists():
        make_tiny_inputs(folder / "train", 40)
        make_tiny_inputs(folder / "validation", 11)
    inputs = TinyInputs(folder / "train" / "shards", folder / "train" / "text_encoder")
    train = {"steps": 6, "global_batch_size": 12, "warmup_steps": 2, "evaluate_every": 100, **train}
    path = write_tiny_config(folder / "tiny.yaml", inputs, run, **train)
    return load_config(path, [*OVERRIDES, f"data.validation={folder / 'validation' / 'shards'}"])


def save_run(config: RunConfig, run: Path, seed: int, scorer: str = "meanmax") -> Path:
    """A run folder with one checkpoint, the best one, of a model that was never trained."""
    config = config.model_copy(deep=True)
    config.model.scorer = ScorerSection(name=scorer)
    folder = run / "checkpoints" / "step-3"
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model = Retriever(config.model, config.objective)
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "text_encoder").mkdir(exist_ok=True)
    model.text_encoder.save_files(folder / "text_encoder")
    (folder / "config.resolved.yaml").write_text(config.to_yaml())
    if not (run / "best").exists():
        (run / "best").symlink_to(Path("checkpoints") / folder.name)
    return run
