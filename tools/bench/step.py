"""The cost of an optimizer step beside the model: this engine under DeepSpeed against a bare loop of torch with the
same model. Also time and memory of the options of audio encoders.

    python -m tools.bench.step [--json FILE]

The bare loop: forward, backward, clip_grad_norm_, AdamW(fused=True), zero_grad; no ranks, no skipping of non-finite
steps, no checkpoints. `compile` needs a C++ compiler.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_

from atr_scale.config import RunConfig
from atr_scale.distributed.world import World
from atr_scale.encoders import build_audio_encoder
from atr_scale.model import Retriever
from atr_scale.training.param_groups import optimizer_groups
from tools.bench import steps
from tools.bench.measure import Function, peak_mib, seconds
from tools.bench.table import Row, run
from tools.parity import with_train
from tools.ranks import run_ranks

AUDIO, SIZE, SECONDS = "small_cnn", 32, 10.0
STAGES = (0, 1)
CLIPS = 2  # of an encoder alone
OPTIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "mn04": ({"activation_checkpointing": True},),
    "htsat": ({"attention": "sdpa"}, {"activation_checkpointing": True}),
    "passt_s16": ({"compile": True}, {"attention": "sdpa"}, {"activation_checkpointing": True}),
}


def bare_loop(config: RunConfig, fused: bool) -> tuple[Retriever, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Retriever(config.model, config.objective).to(steps.device()).train()
    groups = list(optimizer_groups(model, config.train))
    return model, torch.optim.AdamW(groups, lr=steps.RATE, fused=fused, foreach=not fused)


def times(config: RunConfig) -> list[float]:
    """Seconds of an optimizer step: bare, then ours at each stage; of AdamW alone: fused, then by `foreach`."""
    model, optimizer = bare_loop(config, fused=True)
    batch = steps.noise(SIZE, SECONDS, model.sample_rate, World.current())

    def bare() -> None:
        model(batch.to(steps.device()))["loss"].backward()
        clip_grad_norm_(model.parameters(), config.train.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()

    engines = [steps.start(with_train(config, zero_stage=stage)) for stage in STAGES]
    timed: list[Callable[[], object]] = [partial(steps.update, engine, batch) for engine in engines]
    found = seconds(bare, *timed, repeats=9)
    alone = []
    for fused in (True, False):
        model, optimizer = bare_loop(config, fused)
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 1e-3)
        alone.append(optimizer.step)
    return found + seconds(*alone, repeats=20)


def rows() -> Iterable[Row]:
    with tempfile.TemporaryDirectory() as folder:
        config = steps.configuration(Path(folder), AUDIO, global_batch_size=SIZE)
        ((bare, *ours, fused, foreach),) = run_ranks(times, 1, config)
    for stage, time in zip(STAGES, ours, strict=True):
        yield Row(f"update, {SIZE} clips of {SECONDS:g} s, ZeRO {stage}", time, bare, "bare torch loop", "s", 1.02)
    yield Row("AdamW alone", fused, foreach, "foreach", "s")
    for name, choices in OPTIONS.items():
        for options in choices:
            # The default of attention depends on the device.
            plain = encoding(name, **({"attention": "eager"} if "attention" in options else {}))
            chosen = encoding(name, **options)
            label = ", ".join((name, *(key if value is True else str(value) for key, value in options.items())))
            time, time_without = seconds(chosen, plain, repeats=3)
            yield Row(f"{label}: time", time, time_without, "without", "s")
            yield Row(f"{label}: memory", peak_mib(chosen), peak_mib(plain), "without", "MiB")


def encoding(name: str, **options: Any) -> Function:
    """Forward and backward of an audio encoder in training."""
    encoder = build_audio_encoder(name, **options).to(steps.device()).train()
    waveform = 0.1 * torch.randn(CLIPS, round(SECONDS * encoder.sample_rate), device=steps.device())
    parameters = [parameter for parameter in encoder.parameters() if parameter.requires_grad]

    def forward_and_backward() -> None:
        found = encoder(waveform)
        total = found.tokens.square().mean() + found.pooled.square().mean()
        torch.autograd.grad(total, parameters, allow_unused=True)

    return forward_and_backward


if __name__ == "__main__":
    run(__doc__, rows)
