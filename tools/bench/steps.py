"""Shared by the benchmarks of optimizer steps: configurations without a corpus, engines and batches of noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from atr_scale.batch import Batch
from atr_scale.checkpoint import read_state
from atr_scale.config import RunConfig, parse_config
from atr_scale.demo.text_encoder import build_demo_text_encoder
from atr_scale.distributed.world import World
from atr_scale.training.engine import Engine
from atr_scale.training.parts import new_model
from atr_scale.training.schedule import seeds
from atr_scale.training.step_result import StepResult

RATE = 1e-4
NUM_WORDS = 12


def configuration(
    folder: Path, audio: str, dim: int = 256, layers: int = 2, scorer: str = "pooled", **train: Any
) -> RunConfig:
    """`train` sets keys of its section; `dim` and `layers` are the text encoder's, which is built in `folder`."""
    build_demo_text_encoder(["a sound of noise", "another sound"], folder / "text", dim=dim, layers=layers)
    values = {
        "run": {"dir": str(folder / "run")},
        "data": {"train": [{"shards": "none"}]},
        "model": {
            "audio": {"name": audio},
            "text": {"name": str(folder / "text"), "pooling": "mean", "dropout": 0.0},
            "scorer": {"name": scorer},
        },
        "train": {"steps": 1, "precision": "fp32", "zero_stage": 0, "lr": RATE, **train},
    }
    return parse_config(values, "the benchmark")


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def start(config: RunConfig, resume_from: Path | None = None) -> Engine:
    torch.manual_seed(0)
    world = World.current()
    engine = Engine(new_model(config, world, resume_from)[0], config.train, world, device())
    if resume_from:
        engine.load(resume_from, read_state(resume_from))
    return engine


def noise(size: int, seconds: float, sample_rate: int, world: World) -> Batch:
    """This rank's rows of a global batch: clips of noise, the same for any number of ranks, with random words."""
    own = range(world.rank * size // world.size, (world.rank + 1) * size // world.size)
    samples = round(seconds * sample_rate)
    waveform = torch.empty(len(own), samples)
    words = torch.randint(5, 12, (size, NUM_WORDS), generator=torch.Generator().manual_seed(0))[own.start : own.stop]
    for row, number in enumerate(own):
        waveform[row].normal_(0, 0.1, generator=torch.Generator().manual_seed(number))
    ids = torch.arange(own.start, own.stop)
    return Batch(
        waveform, torch.full_like(ids, samples), words, torch.ones_like(words), ids, ids, torch.zeros_like(ids), ids
    )


def update(engine: Engine, batch: Batch) -> StepResult:
    return engine.update([batch], dict.fromkeys(("audio", "text", "heads"), RATE), seeds(0, 0, 1, engine.world.rank))
