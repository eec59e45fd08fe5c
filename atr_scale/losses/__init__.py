"""Losses: formulas on whole matrices (`dense`), the same without them for large batches (`tiled`), and terms."""

from atr_scale.losses.inputs import LossInputs
from atr_scale.losses.objective import Objective, build_objective
from atr_scale.losses.terms import LOSS_TERMS, Budget, LossTerm, TermSection, check_loss_terms

__all__ = [
    "LOSS_TERMS",
    "Budget",
    "LossInputs",
    "LossTerm",
    "Objective",
    "TermSection",
    "build_objective",
    "check_loss_terms",
]
