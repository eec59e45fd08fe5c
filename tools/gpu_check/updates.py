"""Whole updates by phase beside what the planner predicts for them, and their waits for the device.

The text encoder has the size of BERT base and the weights are random. The planner has this run's ceilings. The
optimizer's phase is what a whole update takes beyond the others: reduction, norm, clipping, step.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from atr_scale.batch import Batch, TokenSequence
from atr_scale.config import RunConfig
from atr_scale.distributed.start import distributed
from atr_scale.distributed.world import World
from atr_scale.model import Encoded, Retriever
from atr_scale.planner.estimate import estimate_step
from atr_scale.planner.gpus import GPUS
from atr_scale.planner.planner import measure_costs
from atr_scale.planner.timeline import Cluster
from tools.bench import steps
from tools.bench.measure import peak_mib
from tools.gpu_check.measure import counted, launches, median_ms, waits_for_device
from tools.gpu_check.rows import Case, Row
from tools.gpu_check.runner import Setting

MOST_WAITS = 3  # of this project in an update
PLANNED = "the planner's prediction"


class _Run(NamedTuple):
    """A model, its local batch, and the length of its clips in seconds."""

    audio: str
    scorer: str
    batch: int
    dim: int
    layers: int
    seconds: float

    def config(self, folder: Path) -> RunConfig:
        return steps.configuration(
            folder / self.audio, self.audio, self.dim, self.layers, self.scorer,
            global_batch_size=self.batch, precision="bf16", zero_stage=1,
        )  # fmt: skip


RUNS = (_Run("mn40", "pooled", 64, 768, 12, 10.0), _Run("htsat", "tap", 64, 768, 12, 10.0))
QUICK = (_Run("small_cnn", "pooled", 4, 32, 1, 1.0),)
Planned = dict[str, float]  # phase -> ms


def cases(setting: Setting) -> Iterator[Case]:
    runs, planned = QUICK if setting.quick else RUNS, dict[str, Planned]()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        configs = [run.config(folder) for run in runs]
        for run, config in zip(runs, configs, strict=True):  # the planner has a process group of its own
            yield f"{run.audio}: {PLANNED}", partial(plan, setting, run, config, planned)
        with distributed():
            for run, config in zip(runs, configs, strict=True):
                update = _Update(run, config, planned.get(run.audio, {}))
                yield f"{run.audio}: update", update.whole
                yield f"{run.audio}: waits for the device", update.waits
                for phase in (*update.phases, "optimizer"):
                    yield f"{run.audio}: {phase}", partial(update.phase, phase)


def plan(setting: Setting, run: _Run, config: RunConfig, planned: dict[str, Planned]) -> Row:
    gpu = GPUS["H100"].with_ceilings((row.as_json() for row in setting.ceilings.values()), setting.device)
    costs, _ = measure_costs(config, run.seconds, steps.NUM_WORDS)
    found = estimate_step(costs, Cluster(gpu, 1, 1, 0.0, 1), run.batch)
    planned[run.audio] = {"update": 1000 * found.step, **{name: 1000 * s for name, s in found.phases.items()}}
    bounds = ", ".join(f"{name} {1000 * s:.3g} ms" for name, s in found.seconds.items())
    return Row(ms=1000 * found.step, note=bounds)


class _Update:
    """An engine with a batch, and the phases of its update."""

    def __init__(self, run: _Run, config: RunConfig, planned: Planned) -> None:
        self.run, self.planned = run, planned
        self.engine = steps.start(config)
        self.model: Retriever = self.engine.model
        self.batch = steps.noise(run.batch, run.seconds, self.model.sample_rate, World())
        self.times: Planned = {}
        self.phases: dict[str, Callable[[Batch], float]] = {
            "text forward": lambda batch: _ms(lambda: self._text(batch)),
            "audio forward": lambda batch: _ms(lambda: self._audio(batch)),
            "scores and loss": self._loss_ms,
            "text backward": lambda batch: self._backward_ms(self._text, batch),
            "audio backward": lambda batch: self._backward_ms(self._audio, batch),
        }

    def _step(self) -> None:
        steps.update(self.engine, self.batch)

    def whole(self) -> Row:
        self._step()
        self.times["update"] = ms = _ms(self._step)
        pairs = f"{1000 * self.run.batch / ms:.0f} pairs a second"
        memory = peak_mib(self._step)
        return self._row("update", launches=launches(self._step), peak_mib=memory, note=pairs)

    def waits(self) -> Row:
        """Of this project; those of DeepSpeed are in the note."""
        with waits_for_device() as places:
            self._step()
        own = [place for place in places if not place.startswith("deepspeed")]
        return Row(syncs=len(own), passed=len(own) <= MOST_WAITS, note=counted(places))

    def phase(self, name: str) -> Row:
        if name == "optimizer":
            self.times[name] = self.times["update"] - sum(self.times[phase] for phase in self.phases)
        else:
            self.times[name] = self.phases[name](self.batch.to(self.engine.device))
        return self._row(name)

    def _row(self, name: str, **measured: object) -> Row:
        reference = {PLANNED: self.planned[name]} if name in self.planned else {}
        return Row(ms=self.times[name], reference=reference, **measured)  # type: ignore[arg-type]

    def _text(self, batch: Batch) -> TokenSequence:
        return self.model.encode_text(batch.input_ids, batch.attention_mask)

    def _audio(self, batch: Batch) -> TokenSequence:
        return self.model.encode_audio(batch.waveform, batch.lengths)

    def _loss_ms(self, batch: Batch) -> float:
        """Forward and backward, from the encodings to their gradients."""

        def leaf(value: Tensor) -> Tensor:
            return value.detach().requires_grad_()

        encoded = Encoded(*(side.map(leaf, leaf) for side in self.model.encode(batch)))
        leaves = [x for side in encoded for x in (side.tokens, side.pooled)]

        def step() -> None:
            terms: dict[str, Tensor] = self.model(batch, encoded=encoded)
            torch.autograd.grad(terms["loss"], leaves, allow_unused=True)

        return _ms(step)

    def _backward_ms(self, encode: Callable[[Batch], TokenSequence], batch: Batch) -> float:
        learned = [p for p in self.model.parameters() if p.requires_grad]

        def backward(encoded: TokenSequence) -> None:
            outputs = [x for x in (encoded.tokens, encoded.pooled) if x.requires_grad]
            torch.autograd.grad(outputs, learned, [torch.ones_like(x) for x in outputs], allow_unused=True)

        backward(encode(batch))
        return median_ms(backward, lambda _: (encode(batch),), 3)


def _ms(step: Callable[[], object]) -> float:
    step()
    return median_ms(step, lambda _: (), 5)
