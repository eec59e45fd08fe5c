"""The temperature of the logits."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from atr_scale.score_block import at_least_fp32


class _ClampInward(torch.autograd.Function):
    """Clamp whose gradient passes unless a descent step would lead further out of the bounds.

    A plain clamp has no gradient outside, so a parameter that once left would never come back.
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
    """The softmax temperature tau, learned as log tau and clamped in the forward.

    The parameter has shape (1,), for DeepSpeed takes no 0-dim ones, and is clamped in the forward because a sharded
    optimizer's fp32 copy would undo a clamp after the step.
    """

    def __init__(self, initial: float, minimum: float, maximum: float, learnable: bool) -> None:
        super().__init__()
        self.bounds = math.log(minimum), math.log(maximum)
        self.log_temperature = nn.Parameter(torch.tensor([math.log(initial)]), requires_grad=learnable)

    def forward(self) -> Tensor:
        """tau, shape (1,), at least fp32."""
        return _ClampInward.apply(at_least_fp32(self.log_temperature), *self.bounds).exp()
