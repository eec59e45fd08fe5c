"""Whole updates under DeepSpeed at one ZeRO stage: the loss, an update with NaN that changes nothing, save and load."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atr_scale import checkpoint
from atr_scale.batch import Batch
from atr_scale.config import RunConfig
from atr_scale.distributed.start import distributed
from atr_scale.distributed.world import World
from atr_scale.training.engine import Engine
from atr_scale.training.parts import new_model
from atr_scale.training.step_result import StepResult
from tools.bench import steps
from tools.gpu_check.rows import Case, Row, compared
from tools.gpu_check.runner import Setting

BATCH, SECONDS = 16, 1.0
PRECISIONS = {"bf16": 2e-2, "fp16": 5e-3}  # bounds of the loss against fp32 on the CPU
SAME = 1e-5  # bound of weights after a resumed update: sums on a GPU may be in any order
MOST_OVERFLOWS = 10


def cases(setting: Setting, stage: int) -> Iterator[Case]:
    with distributed(), tempfile.TemporaryDirectory() as folder:
        for precision in PRECISIONS:
            for chunks in (1, 4):
                name = f"ZeRO {stage}, {precision}, {'GradCache' if chunks > 1 else 'one pass'}"
                place = Path(folder) / f"{precision}-{chunks}"
                yield name, partial(updates, place, precision, stage, chunks)


def updates(folder: Path, precision: str, stage: int, chunks: int) -> Row:
    config = steps.configuration(
        folder, "small_cnn", dim=32, global_batch_size=BATCH, micro_batch_size=BATCH // chunks,
        precision=precision, zero_stage=stage,
    )  # fmt: skip
    engine = steps.start(config)
    batch = steps.noise(BATCH, SECONDS, engine.model.sample_rate, World())
    loss, first = _loss_on_cpu(config, batch), _applied(engine, batch)
    started = engine.full_weights()
    waveform = batch.waveform.clone()
    waveform[0, 0] = torch.nan
    skipped = steps.update(engine, replace(batch, waveform=waveform))
    if skipped.applied or _distance(engine.full_weights(), started):
        raise AssertionError("an update with NaN has changed the weights")
    saved = checkpoint.save(folder / "run", engine, World.current(), config.to_yaml(), {"step": 1})
    _applied(engine, batch)
    after = engine.full_weights()
    if not _distance(after, started):
        raise AssertionError("an update has changed no weight")

    other = steps.start(config, saved)
    if _distance(other.full_weights(), started):
        raise AssertionError("what was loaded is not what was saved")
    _applied(other, batch)
    resumed = _distance(other.full_weights(), after)
    if resumed > SAME:
        raise AssertionError(f"the update after a load differs by {resumed:.1e} from the one without")
    error = abs(first.terms["loss"] / loss - 1)
    return compared(error, PRECISIONS[precision], note=f"after save and load {resumed:.1e}")


def _applied(engine: Engine, batch: Batch) -> StepResult:
    """An update that takes place; in fp16 the first ones may find the loss scale."""
    for _ in range(MOST_OVERFLOWS):
        result = steps.update(engine, batch)
        if result.applied:
            return result
    raise AssertionError(f"{MOST_OVERFLOWS} updates in a row were skipped")


def _loss_on_cpu(config: RunConfig, batch: Batch) -> float:
    """The loss of the same weights in fp32, without DeepSpeed."""
    narrow: dict[str, Any] = {"train": config.train.model_copy(update={"precision": "fp32"})}
    torch.manual_seed(0)
    model = new_model(config.model_copy(update=narrow), World())[0].train()
    terms: dict[str, Tensor] = model(batch)
    return terms["loss"].item()


def _distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of any weight, over the largest weight; zero only for equal weights."""
    largest = torch.stack([x.abs().max() for x in expected.values()]).max()
    return float(torch.stack([(found[name] - x).abs().max() for name, x in expected.items()]).max() / largest)
