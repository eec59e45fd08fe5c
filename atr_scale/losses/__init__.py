"""Objectives: logits rules and targets on a score block, giving named loss terms and their weighted sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from atr_scale.errors import UserError
from atr_scale.losses import tiled
from atr_scale.losses.targets import Ids
from atr_scale.score_block import ScoreBlock


@dataclass(frozen=True)
class ObjectiveInputs:
    """What a loss is computed from. Shapes: B texts of the global batch, b audios of this rank, k id columns.

    block:         scores [B, b] of all texts against this rank's audios.
    temperature:   (1,).
    ids:           (of the texts [B, k], of the audios [b, k]) int64; a pair is positive where any column agrees.
    text_block, audio_block: cosines [B, b] inside a modality, all samples against this rank's.
    teacher_block: scores [B, b] of the teachers. These three are called only where a term needs them, on all ranks.
    step:          updates made so far.
    """

    block: ScoreBlock
    temperature: Tensor
    ids: Ids
    text_block: Callable[[], ScoreBlock]
    audio_block: Callable[[], ScoreBlock]
    teacher_block: Callable[[], ScoreBlock]
    step: int = 0


Term = Callable[[ObjectiveInputs], Tensor]
Objective = Callable[[ObjectiveInputs], dict[str, Tensor]]


def _nt_xent() -> Term:
    return lambda x: tiled.nt_xent(x.block, x.temperature, x.ids)


def _pmr(omega: float, detach_prior: bool = False, scale_by_batch: bool = False) -> Term:
    return lambda x: tiled.pmr(x.block, x.temperature, omega, x.ids, detach_prior, scale_by_batch)


def _cmsc(
    beta: float,
    beta_warmup_steps: int = 0,
    target_temperature: float | None = None,
    mode: Literal["each", "add"] = "each",
) -> Term:
    def term(x: ObjectiveInputs) -> Tensor:
        share = beta * min(1.0, x.step / beta_warmup_steps) if beta_warmup_steps else beta
        targets = x.temperature if target_temperature is None else target_temperature
        return tiled.cmsc(x.block, x.text_block(), x.audio_block(), x.temperature, share, targets, x.ids, mode)

    return term


def _intra_modal() -> Term:
    def term(x: ObjectiveInputs) -> Tensor:
        both = (tiled.intra_modal(block(), x.temperature, x.ids) for block in (x.text_block, x.audio_block))
        return torch.stack(list(both)).mean()

    return term


def _distillation(temperature: float | None = None) -> Term:
    return lambda x: tiled.distillation(
        x.block, x.teacher_block(), x.temperature if temperature is None else temperature
    )


TERMS: dict[str, Callable[..., Term]] = {
    "nt_xent": _nt_xent,
    "pmr": _pmr,
    "cmsc": _cmsc,
    "intra_modal": _intra_modal,
    "distillation": _distillation,
}


def build_objective(**terms: Mapping[str, Any]) -> Objective:
    """The weighted sum of loss terms, each given by its name: {"weight": w, **options}; weight 0 leaves it out.

    The objective maps `ObjectiveInputs` to the terms by name, unweighted, and their weighted sum "loss", each a scalar.
    """
    unknown = [name for name in terms if name not in TERMS]
    if unknown:
        raise UserError(f"unknown loss term {unknown[0]!r}: known are {', '.join(TERMS)}")
    chosen = {name: dict(options) for name, options in terms.items() if options["weight"] > 0}
    if not chosen:
        raise UserError("no loss term has a positive weight: give one, for example nt_xent.weight=1")
    weights = {name: options.pop("weight") for name, options in chosen.items()}
    functions = {name: TERMS[name](**options) for name, options in chosen.items()}

    def objective(inputs: ObjectiveInputs) -> dict[str, Tensor]:
        values = {name: function(inputs) for name, function in functions.items()}
        loss = torch.stack([weights[name] * value for name, value in values.items()]).sum()
        return {**values, "loss": loss}

    return objective
