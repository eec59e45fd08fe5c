"""Parts that all tiled losses share: weights of queries, the dtype of the loss, gradients of the inputs.

Shape suffixes: B texts of the global batch, b audios of this rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from atr_scale.losses.directions import tell
from atr_scale.score_block import ScoreBlock


def zeros(block: ScoreBlock, *size: int) -> Tensor:
    """Float64 zeros to accumulate statistics in."""
    return torch.zeros(size, dtype=torch.float64, device=block.device)


def query_weights(block: ScoreBlock, t2a_share: float) -> tuple[float, float]:
    """Weight of a text and of an audio as a query in the loss: the share of its direction / number of queries."""
    return t2a_share / block.shape[0], (1 - t2a_share) / block.num_columns


def both_directions(parts: Tensor, t2a_share: float, dtype: torch.dtype) -> Tensor:
    """The loss of its `parts` [2], t2a and a2t, each times its share. Tells them without it."""
    t2a, a2t = parts.unbind()
    tell(t2a / (t2a_share or 1), a2t / (1 - t2a_share or 1), t2a_share)
    return parts.sum().to(dtype)


def input_gradients(
    upstream: Tensor,
    temperature: Tensor,
    by_log_h: Tensor,
    block: ScoreBlock,
    gradients: tuple[Tensor, ...],
    factor: Tensor | float = 1.0,
) -> tuple[Tensor, ...]:
    """Gradients of (temperature, *block.tensors) from d loss / d log h, h = 1 / temperature, and from `gradients`.

    The gradients of the block's tensors are multiplied by `factor`, in place, and all by `upstream`.
    """
    by_temperature = (upstream.double() * -by_log_h / temperature.double()).to(temperature.dtype)
    scaled = (
        gradient.mul_((upstream * factor).to(gradient.dtype)).to(tensor.dtype)
        for gradient, tensor in zip(gradients, block.tensors, strict=True)
    )
    return by_temperature.reshape(temperature.shape), *scaled


def loss_dtype(block: ScoreBlock, temperature: Tensor) -> torch.dtype:
    """The dtype of scores / temperature."""
    return torch.promote_types(block.dtype, temperature.dtype)


def as_tensor(temperature: float | Tensor, block: ScoreBlock) -> Tensor:
    """The temperature as a tensor; a number gets the block's dtype and the shape (1,)."""
    if isinstance(temperature, Tensor):
        return temperature
    return torch.full((1,), temperature, dtype=block.dtype, device=block.device)


def inverse(temperature: float | Tensor, block: ScoreBlock) -> Tensor:
    """1 / temperature as a float64 scalar on the device."""
    return as_tensor(temperature, block).detach().double().reciprocal().squeeze()


def largest_inverse(temperature: float | Tensor, least: float | None) -> float:
    """1 / temperature is never larger. least: a bound of the temperature; None: it is read, which waits for a GPU."""
    if isinstance(temperature, Tensor):
        return 1 / (float(temperature.detach()) if least is None else least)
    return 1 / temperature
