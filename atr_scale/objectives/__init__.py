"""Objectives: a logits rule and targets on a score block, giving named loss terms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from atr_scale.errors import UserError
from atr_scale.objectives import tiled
from atr_scale.parallel.blocks import ScoreBlock

Objective = Callable[[ScoreBlock, Tensor, tiled.Ids], dict[str, Tensor]]


def _nt_xent() -> Objective:
    return lambda block, temperature, positives: {"nt_xent": tiled.nt_xent(block, temperature, positives)}


def _pmr(omega: float, detach_prior: bool) -> Objective:
    return lambda block, temperature, positives: {"pmr": tiled.pmr(block, temperature, omega, positives, detach_prior)}


OBJECTIVES: dict[str, Callable[..., Objective]] = {"nt_xent": _nt_xent, "pmr": _pmr}


def build_objective(name: str, **options: Any) -> Objective:
    """The objective `name`: (score block, temperature (1,), (text ids, audio ids)) -> loss terms, each a scalar.

    The loss is the sum of the terms. Options: pmr takes omega and detach_prior.
    """
    if name not in OBJECTIVES:
        raise UserError(f"unknown objective {name!r}: known are {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name](**options)
