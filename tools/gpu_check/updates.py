"""Whole updates by phase, their waits for the device, and what the planner predicts for them.

The text encoder has the size of BERT base and the weights are random. The optimizer's phase is what a whole update takes
beyond the others: reduction, norm, clipping, step.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from atr_scale.config import RunConfig
from atr_scale.distributed.start import distributed
from atr_scale.distributed.world import World
from atr_scale.model import Encoded
from atr_scale.training.engine import Engine
from tools.bench import steps
from tools.bench.measure import peak_mib
from tools.gpu_check.measure import counted, launches, median_ms, waits_for_device
from tools.gpu_check.rows import Case, Row
from tools.gpu_check.runner import Setting

SECONDS, RATE = 10.0, 1e-4
MOST_WAITS = 3  # of this project in an update


class _Run(NamedTuple):
    """A model and its local batch."""

    audio: str
    scorer: str
    batch: int
    dim: int
    layers: int


RUNS = (_Run("mn40", "pooled", 64, 768, 12), _Run("htsat", "tap", 64, 768, 12))
QUICK = (_Run("small_cnn", "pooled", 4, 32, 1),)


def cases(setting: Setting) -> Iterator[Case]:
    with distributed(), tempfile.TemporaryDirectory() as folder:
        for run in QUICK if setting.quick else RUNS:
            update = _Update(setting, run, Path(folder) / run.audio)
            name = f"{run.audio}, {run.scorer}"
            yield f"{name}: update", update.whole
            yield f"{name}: waits for the device", update.waits
            for phase in update.phases:
                yield f"{name}: {phase}", partial(update.phase, phase)


class _Update:
    """An engine with a batch; its phases are measured one after the other."""

    def __init__(self, setting: Setting, run: _Run, folder: Path) -> None:
        self.setting, self.run = setting, run
        self.config: RunConfig = steps.configuration(
            folder, run.audio, run.dim, run.layers, run.scorer,
            global_batch_size=run.batch, precision="bf16", zero_stage=1,
        )  # fmt: skip
        self.engine: Engine = steps.start(self.config)
        self.batch = steps.noise(run.batch, 1.0 if setting.quick else SECONDS, self.engine.model.sample_rate, World())
        self.phases = ("text forward", "audio forward", "scores and loss", "backward", "optimizer")
        self.times: dict[str, float] = {}

    def _step(self) -> None:
        steps.update(self.engine, self.batch)

    def whole(self) -> Row:
        self._step()
        ms = median_ms(self._step, lambda _: (), 5)
        self.times["update"] = ms
        return Row(ms=ms, launches=launches(self._step), peak_mib=peak_mib(self._step),
                   note=f"{1000 * self.run.batch / ms:.0f} pairs a second")  # fmt: skip

    def waits(self) -> Row:
        """Of this project; those of DeepSpeed are in the note."""
        with waits_for_device() as places:
            self._step()
        own = [place for place in places if not place.startswith("deepspeed")]
        return Row(syncs=len(own), passed=len(own) <= MOST_WAITS, note=counted(places))

    def phase(self, name: str) -> Row:
        if not self.times.keys() >= {"text forward"}:
            self._measure()
        return Row(ms=self.times[name])

    def _measure(self) -> None:
        """All phases of one update, on the model alone."""
        model, batch = self.engine.model, self.batch.to(self.engine.device)

        def text() -> object:
            return model.encode_text(batch.input_ids, batch.attention_mask)

        def audio() -> object:
            return model.encode_audio(batch.waveform, batch.lengths)

        def loss() -> Tensor:
            total: Tensor = model(batch, encoded=encoded)["loss"]
            return total

        encoded: Encoded = model.encode(batch)
        for name, function in (("text forward", text), ("audio forward", audio), ("scores and loss", loss)):
            self.times[name] = median_ms(function, lambda _: (), 3)
        learned = [p for p in model.parameters() if p.requires_grad]

        def whole_loss(_: int) -> tuple[Tensor]:
            return (model(batch)["loss"],)

        def backward(total: Tensor) -> None:
            torch.autograd.grad(total, learned, allow_unused=True)

        self.times["backward"] = median_ms(backward, whole_loss, 3)
        self.times["optimizer"] = max(0.0, 2 * self.times["update"] - sum(self.times.values()))
