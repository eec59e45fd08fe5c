"""The loss scale of fp16, which adapts on the device: no step waits to learn whether it overflowed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

INITIAL, GROWTH_STEPS = 2.0**16, 1000


class LossScale:
    """A factor of the loss that keeps gradients inside the range of fp16; 1 and constant if `adapts` is False.

    An overflow halves it, down to 1; GROWTH_STEPS good steps in a row double it (Micikevicius et al. 2018, arXiv
    1710.03740).
    """

    def __init__(self, adapts: bool, device: torch.device) -> None:
        self.adapts = adapts
        self.value = torch.full((), INITIAL if adapts else 1.0, device=device)
        self._good_steps = torch.zeros((), dtype=torch.int32, device=device)

    def factor(self, other: float) -> float | Tensor:
        """`other` times the scale."""
        return self.value * other if self.adapts else other

    def update(self, found_inf: Tensor) -> Tensor:
        """Adapt to a step. found_inf: 1 if it was not finite, else 0. Returns 1 for an overflow: a smaller scale helps.

        A step that is not finite at scale 1 is no overflow.
        """
        if not self.adapts:
            return torch.zeros_like(found_inf)
        overflow = found_inf * (self.value > 1)
        torch._amp_update_scale_(self.value, self._good_steps, found_inf, 2.0, 0.5, GROWTH_STEPS)
        self.value.clamp_(min=1.0)
        return overflow

    def state(self) -> dict[str, Any]:
        """For a checkpoint; waits for the device."""
        return {"scale": float(self.value), "good_steps": int(self._good_steps)}

    def load(self, state: Mapping[str, Any]) -> None:
        self.value.fill_(state["scale"])
        self._good_steps.fill_(state["good_steps"])
