"""The objective: the weighted sum of loss terms."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from atr_scale.errors import UserError
from atr_scale.losses.directions import listening
from atr_scale.losses.inputs import LossInputs
from atr_scale.losses.terms import DEFAULT_BUDGET, LOSS_TERMS, Budget, LossTerm, TermSection


class Objective(nn.Module):
    """The weighted sum of loss terms.

    terms: by name, each with a positive weight. inputs: names of all inputs that the terms take (`WholeInputs`).
    """

    def __init__(self, terms: Mapping[str, LossTerm], budget: Budget = DEFAULT_BUDGET) -> None:
        super().__init__()
        self.terms, self.budget = nn.ModuleDict(terms), budget
        self.weights = {name: term.section.weight for name, term in terms.items()}
        self.inputs = frozenset(name for term in terms.values() for name in term.inputs)

    def forward(self, inputs: LossInputs) -> dict[str, Tensor]:
        """Scalars by name: every term without its weight, its directions, and "loss", the weighted sum of the terms.

        A direction is called TERM/t2a or TERM/a2t, and has no gradient.
        """
        values: dict[str, Tensor] = {}
        directions: dict[str, Tensor] = {}
        for name, term in self.terms.items():
            with listening() as told:
                values[name] = term(inputs, self.budget)
            directions |= {f"{name}/{direction}": value for direction, value in told.items()}
        loss = torch.stack([self.weights[name] * value for name, value in values.items()]).sum()
        return {**values, **directions, "loss": loss}


def build_objective(terms: Mapping[str, TermSection], budget: Budget = DEFAULT_BUDGET) -> Objective:
    """The objective from sections by the names of their terms; a term with weight 0 is left out.

    Raises UserError for an unknown name, for a scalar parameter in a term, and if no weight is positive.
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
