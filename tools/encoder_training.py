"""Train a full-size audio encoder for a few optimizer steps with DeepSpeed, save it and restore it.

    python -m tools.encoder_training NAME [--checkpoint FILE] [--steps 3] [--ranks 2] [--zero-stage 3] [--batch-size 4]

Clips are two seconds of noise, the text encoder is tiny, and everything runs on the CPU in fp32. Prints the losses, the
seconds per optimizer step, the peak memory of each rank, and the difference between the embeddings of the trained and
of the restored model. Exits with 1 if they differ.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from atr_scale import checkpoint
from atr_scale.batch import Batch
from atr_scale.checkpoint import load_retriever
from atr_scale.config import RunConfig, parse_config
from atr_scale.demo.text_encoder import build_demo_text_encoder
from atr_scale.distributed.world import World
from atr_scale.encoders import AUDIO_ENCODERS
from atr_scale.memory import peak_memory
from atr_scale.model import Retriever, count_parameters
from atr_scale.training.engine import Engine
from atr_scale.training.parts import new_model
from atr_scale.training.schedule import seeds
from tools.ranks import run_ranks

SECONDS = 2.0
RATE = 1e-4
TOLERANCE = 1e-5  # relative to the largest value of an embedding


def configuration(folder: Path, given: argparse.Namespace) -> RunConfig:
    """A run of `steps` optimizer steps. Its batches are synthetic, so it names shards that do not exist."""
    build_demo_text_encoder(["a sound of noise", "another sound"], folder / "text", dim=64, heads=2)
    values = {
        "run": {"dir": str(folder / "run")},
        "data": {"train": [{"shards": "none"}], "crop_seconds": SECONDS},
        "model": {
            "audio": {"name": given.name, "checkpoint": given.checkpoint},
            "text": {"name": str(folder / "text"), "pooling": "mean"},
        },
        "train": {
            "steps": given.steps,
            "global_batch_size": given.batch_size,
            "precision": "fp32",
            "zero_stage": given.zero_stage,
            "lr": RATE,
        },
    }
    return parse_config(values, "the command line")


def synthetic(config: RunConfig, step: int, sample_rate: int, world: World) -> Batch:
    """The local batch of this rank from a global batch of noise with random tokens."""
    size, samples = config.train.global_batch_size, round(SECONDS * sample_rate)
    generator = torch.Generator().manual_seed(step)
    waveform = 0.1 * torch.randn(size, samples, generator=generator)
    tokens = torch.randint(5, 20, (size, 8), generator=generator)
    ids = torch.arange(size) + step * size
    rows = slice(world.rank * size // world.size, (world.rank + 1) * size // world.size)
    lengths = torch.full((size,), samples)
    return Batch(
        waveform[rows],
        lengths[rows],
        tokens[rows],
        torch.ones_like(tokens[rows]),
        ids[rows],
        ids[rows],
        ids[rows],
        ids[rows],
    )


def trained(config: RunConfig) -> dict[str, Any]:
    """Train on this rank. Returns losses and seconds of the steps, peak memory, and the difference after restoring."""
    world = World.current()
    torch.manual_seed(config.run.seed)
    model, _ = new_model(config, world)
    parameters = count_parameters(model.audio_encoder.parameters())
    engine = Engine(model, config.train, world, torch.device("cpu"))
    losses, seconds = [], []
    assert config.train.steps is not None
    for step in range(config.train.steps):
        batch = synthetic(config, step, model.sample_rate, world)
        start = time.perf_counter()
        result = engine.update([batch], dict.fromkeys(("audio", "text", "heads"), RATE), seeds(0, step, 1, world.rank))
        seconds.append(time.perf_counter() - start)
        losses.append(result.terms["loss"])
        assert result.applied, f"step {step} was not finite on ranks {result.bad_ranks}"
    peak = peak_memory(torch.device("cpu"))
    folder = checkpoint.save(Path(config.run.dir), engine, world, config.to_yaml(), {"step": config.train.steps})
    expected = embedded(engine.model, batch)
    difference = 0.0
    if world.is_main:
        restored, _, _ = load_retriever(folder)
        difference = float((embedded(restored, batch) - expected).abs().max() / expected.abs().max())
    return {
        "parameters": parameters,
        "losses": losses,
        "seconds": seconds,
        "peak_bytes": peak,
        "checkpoint_bytes": sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()),
        "difference": difference,
    }


@torch.no_grad()
def embedded(model: Retriever, batch: Batch) -> torch.Tensor:
    """Pooled embeddings [b, D] of the clips."""
    return model.eval().encode_audio(batch.waveform, batch.lengths).pooled


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a full-size audio encoder for a few optimizer steps.")
    parser.add_argument("name", choices=list(AUDIO_ENCODERS), metavar="NAME")
    parser.add_argument("--checkpoint", help="file of the original project; default: random weights")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--zero-stage", type=int, default=3, choices=range(4))
    parser.add_argument("--batch-size", type=int, default=4, help="pairs over all ranks")
    parser.add_argument("--json", type=Path, help="file for the same numbers")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ranks = run_ranks(trained, given.ranks, configuration(Path(folder), given))
    first = ranks[0]
    found = {
        "encoder": given.name,
        "ranks": given.ranks,
        "zero_stage": given.zero_stage,
        "batch_size": given.batch_size,
        "clip_seconds": SECONDS,
        "parameters": first["parameters"],
        "losses": first["losses"],
        "seconds": first["seconds"],
        "peak_bytes": [rank["peak_bytes"] for rank in ranks],
        "checkpoint_bytes": first["checkpoint_bytes"],
        "difference": first["difference"],
    }
    later = first["seconds"][1:] or first["seconds"]
    peaks = ", ".join(f"{rank['peak_bytes'] / 2**30:.2f}" for rank in ranks)
    print(f"{given.name}: {first['parameters'] / 1e6:.1f} M parameters, {given.ranks} ranks, ZeRO {given.zero_stage}")
    print(f"losses        {', '.join(f'{loss:.4f}' for loss in first['losses'])}")
    print(f"step          {sum(later) / len(later):.2f} s, the first {first['seconds'][0]:.2f} s")
    print(f"peak memory   {peaks} GiB per rank")
    print(f"checkpoint    {first['checkpoint_bytes'] / 2**30:.2f} GiB, embeddings {first['difference']:.1e} apart")
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if first["difference"] > TOLERANCE:
        sys.exit(f"{given.name}: the restored model's embeddings differ from those of the trained one")


if __name__ == "__main__":
    main()
