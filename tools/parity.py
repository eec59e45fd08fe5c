"""Compare the same optimizer steps on one and two processes and at every ZeRO stage.

    python -m tools.parity CONFIG.yaml [key.sub=value ...] [--updates 10]

The reference is one process without ZeRO. Prints the largest relative differences of the losses, of the gradient norms
and of the full gradients of the first step. Dropout is switched off, because each rank draws its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

from atr_scale.batch import Batch
from atr_scale.checkpoint import read_state
from atr_scale.config import RunConfig, load_config
from atr_scale.data.shard_reader import open_shards
from atr_scale.data.stream import read_batches
from atr_scale.data.tokenizer import caption_tokenizer
from atr_scale.distributed.world import World
from atr_scale.model import StepContext
from atr_scale.training.engine import Engine
from atr_scale.training.param_groups import freeze
from atr_scale.training.parts import new_model, read_teacher, training_stream
from atr_scale.training.schedule import seeds
from tools.ranks import run_ranks


def start(config: RunConfig, resume_from: Path | None = None) -> tuple[Engine, Iterator[Batch]]:
    """A new engine on this rank, or one that goes on from a checkpoint, with all batches of the run."""
    world = World.current()
    torch.manual_seed(config.run.seed)
    model, _ = new_model(config, world, resume_from)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    freeze(model, config.train)
    engine = Engine(model, config.train, world, torch.device("cpu"))
    if resume_from:
        engine.load(resume_from, read_state(resume_from))
    stream = training_stream(
        config, caption_tokenizer(model.text_encoder.tokenizer, config.data.captions), model.sample_rate, world
    )
    return engine, read_batches(stream.between(0, 1 << 30), 0)


def curve(config: RunConfig, updates: int) -> dict[str, Any]:
    """Losses and gradient norms of some steps, full gradients of the first, parameters after the last."""
    engine, batches = start(config)
    teacher = read_teacher(config, [open_shards(source.shards) for source in config.data.train])
    found: dict[str, Any] = {"loss": [], "norm": []}

    step = engine.deepspeed.step  # it is called when gradients are complete and not yet clipped

    def keep_gradients_and_step() -> None:
        if "gradients" not in found:
            found["gradients"] = {n: safe_get_full_grad(p).numpy().copy() for n, p in trainable(engine)}
        step()

    engine.deepspeed.step = keep_gradients_and_step
    train = config.train
    rates = {
        "audio": train.lr if train.lr_audio is None else train.lr_audio,
        "text": train.lr if train.lr_text is None else train.lr_text,
        "heads": train.lr if train.lr_heads is None else train.lr_heads,
    }
    for number in range(updates):
        taken = [next(batches) for _ in range(train.accum_steps)]
        drawn = seeds(config.run.seed, number, len(taken), engine.world.rank)
        result = engine.update(taken, rates, drawn, StepContext(number, teacher=teacher.labels if teacher else None))
        assert result.applied
        found["loss"].append(result.terms["loss"])
        found["norm"].append(result.gradient_norm)
    found["parameters"] = parameters(engine)
    return found


def curves(configs: list[RunConfig], updates: int) -> list[dict[str, Any]]:
    """`curve` of each configuration, so that the ranks start only once."""
    return [curve(config, updates) for config in configs]


def trainable(engine: Engine) -> list[tuple[str, torch.nn.Parameter]]:
    return [(n, p) for n, p in engine.model.named_parameters() if p.requires_grad]


def parameters(engine: Engine) -> dict[str, np.ndarray]:
    """The full parameters: those of the module without ZeRO, else from the shards of the optimizer."""
    found = {n: safe_get_full_fp32_param(p) for n, p in trainable(engine)}
    return {n: (p if found[n] is None else found[n]).detach().numpy().copy() for n, p in trainable(engine)}


def with_train(config: RunConfig, **train: Any) -> RunConfig:
    """`config` with other values in its section `train`."""
    return config.model_copy(update={"train": config.train.model_copy(update=train)})


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare one and two processes at every ZeRO stage.")
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--updates", type=int, default=10, help="number of optimizer steps")
    given = parser.parse_args()
    config = load_config(given.config, given.overrides)
    ((reference,),) = run_ranks(curves, 1, [with_train(config, zero_stage=0)], given.updates)
    scale = max(np.abs(g).max() for g in reference["gradients"].values())
    print(f"one process: losses {', '.join(f'{x:.6f}' for x in reference['loss'])}")
    print("| processes | ZeRO | losses | gradient norms | gradients, relative to the largest |\n|-|-|-|-|-|")
    for size, stages in ((1, (1, 2, 3)), (2, (0, 1, 2, 3))):
        found = run_ranks(curves, size, [with_train(config, zero_stage=stage) for stage in stages], given.updates)[0]
        for stage, one in zip(stages, found, strict=True):
            worst = max(np.abs(g - reference["gradients"][n]).max() for n, g in one["gradients"].items()) / scale
            print(
                f"| {size} | {stage} | {_relative(one['loss'], reference['loss']):.1e} "
                f"| {_relative(one['norm'], reference['norm']):.1e} | {worst:.1e} |",
                flush=True,
            )


def _relative(found: list[float], expected: list[float]) -> float:
    return float(np.max(np.abs(np.array(found) / np.array(expected) - 1)))


if __name__ == "__main__":
    main()
