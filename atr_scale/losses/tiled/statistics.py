"""Parts that all tiled losses share: weights of queries, the dtype of the loss, gradients of the inputs.

Shape suffixes: B texts of the global batch, b audios of this rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from atr_scale.losses.targets import Positives
from atr_scale.score_block import ScoreBlock


def zeros(block: ScoreBlock, *size: int) -> Tensor:
    """Float64 zeros to accumulate statistics in."""
    return torch.zeros(size, dtype=torch.float64, device=block.device)


def query_weights(block: ScoreBlock, pairs: Positives) -> tuple[Tensor, Tensor]:
    """Weights [B], [b] of the queries in the loss: 1/2 for the direction / number of queries; 0 without a positive."""
    rows = (pairs.row_weight > 0).double() / (2 * block.shape[0])
    columns = (pairs.column_weight > 0).double() / (2 * block.num_columns)
    return rows, columns


def input_gradients(
    upstream: Tensor,
    temperature: Tensor,
    by_h: Tensor,
    block: ScoreBlock,
    gradients: tuple[Tensor, ...],
    factor: float = 1.0,
) -> tuple[Tensor, ...]:
    """Gradients of (temperature, *block.tensors) from d loss / d h, h = 1 / temperature, and from `gradients`.

    The gradients of the block's tensors are multiplied by `factor`, in place, and all by `upstream`.
    """
    by_temperature = (upstream.double() * -by_h / temperature.double().square()).to(temperature.dtype)
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
    return torch.tensor([temperature], dtype=block.dtype, device=block.device)
