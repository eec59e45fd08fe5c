"""A whole run small enough for tests: its inputs and its configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from atr_scale.config import RunConfig, parse_config
from tests.tiny import make_tiny_inputs


def tiny_config(folder: Path, run: Path, **train: Any) -> RunConfig:
    """A run on 40 clips, validated on 11; inputs are made under `folder` once. `train` overrides its section."""
    if not (folder / "train").exists():
        make_tiny_inputs(folder / "train", 40)
        make_tiny_inputs(folder / "validation", 11)
    return parse_config(
        {
            "run": {"dir": str(run)},
            "data": {
                "train": [{"shards": str(folder / "train" / "shards")}],
                "validation": str(folder / "validation" / "shards"),
                "crop_seconds": 0.5,
                "crop_quantum": 0.25,
                "workers": 0,
            },
            "model": {
                "audio": {"name": "small_cnn"},
                "text": {"name": str(folder / "train" / "text_encoder"), "pooling": "mean"},
                "projection": {"dim": 16},
                "scorer": {"name": "meanmax"},
            },
            "train": {
                "steps": 6,
                "global_batch_size": 12,
                "precision": "fp32",
                "lr": 1e-3,
                "warmup_steps": 2,
                "log_every": 1,
                "evaluate_every": 100,
                **train,
            },
            "evaluation": {"batch_size": 4},
        },
        "the tests",
    )
