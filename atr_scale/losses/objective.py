"""The objective: the weighted sum of loss terms."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from atr_scale.errors import UserError
from atr_scale.losses.inputs import LossInputs
from atr_scale.losses.terms import DEFAULT_BUDGET, LOSS_TERMS, Budget, LossTerm, TermSection


class Objective(nn.Module):
    """Terms with a positive weight by name, and their weighted sum. inputs: names of what they need, all together."""

    def __init__(self, terms: Mapping[str, LossTerm], budget: Budget = DEFAULT_BUDGET) -> None:
        super().__init__()
        self.terms, self.budget = nn.ModuleDict(terms), budget
        self.weights = {name: term.section.weight for name, term in terms.items()}
        self.inputs = frozenset(name for term in terms.values() for name in term.inputs)

    def forward(self, inputs: LossInputs) -> dict[str, Tensor]:
        """The terms by name, unweighted, and "loss", their weighted sum; each a scalar."""
        values = {name: term(inputs, self.budget) for name, term in self.terms.items()}
        loss = torch.stack([self.weights[name] * value for name, value in values.items()]).sum()
        return {**values, "loss": loss}


def build_objective(terms: Mapping[str, TermSection], budget: Budget = DEFAULT_BUDGET) -> Objective:
    """The objective of these sections, each under its term's name; weight 0 leaves one out.

    Raises UserError for an unknown name, and if no weight is positive.
    """
    for name in terms:
        if name not in LOSS_TERMS:
            raise UserError(f"unknown loss term {name!r}: known are {', '.join(LOSS_TERMS)}")
    chosen = {name: LOSS_TERMS[name](section) for name, section in terms.items() if section.weight > 0}
    for name, term in chosen.items():
        for own, parameter in term.named_parameters():
            if parameter.ndim == 0:
                raise UserError(f"the loss term {name} has the scalar parameter {own}: give it the shape [1]")
    if not chosen:
        raise UserError("no loss term has a positive weight: give one, for example nt_xent.weight=1")
    return Objective(chosen, budget)
