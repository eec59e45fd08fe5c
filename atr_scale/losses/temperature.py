"""The temperature of the logits."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from atr_scale.score_block import at_least_fp32


class _ClampInward(torch.autograd.Function):
    """A clamp whose gradient is zero only if a descent step would lead further out of the bounds.

    A plain clamp has no gradient outside of the bounds, so a parameter that has left them would never return.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(value)
        ctx.low, ctx.high = low, high
        return value.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (value,) = ctx.saved_tensors
        outward = ((value <= ctx.low) & (grads[0] > 0)) | ((value >= ctx.high) & (grads[0] < 0))
        return grads[0].masked_fill(outward, 0), None, None


class Temperature(nn.Module):
    """The softmax temperature tau, learned as log tau and clamped in the forward pass.

    The parameter has the shape (1,) because DeepSpeed takes no scalars. It is clamped in the forward pass because a
    sharded optimizer keeps an fp32 copy, which would undo a clamp after the optimizer step.

    initial, minimum, maximum: of tau. learnable: whether tau is trained. least: tau is never below.
    """

    def __init__(self, initial: float, minimum: float, maximum: float, learnable: bool) -> None:
        super().__init__()
        self.bounds = math.log(minimum), math.log(maximum)
        self.least = minimum * (1 - 1e-6)  # exp of a rounded logarithm may fall short of the minimum
        self.log_temperature = nn.Parameter(torch.tensor([math.log(initial)]), requires_grad=learnable)

    def forward(self) -> Tensor:
        """tau, shape (1,), fp32 or wider."""
        clamped: Tensor = _ClampInward.apply(at_least_fp32(self.log_temperature), *self.bounds)
        return clamped.exp()
