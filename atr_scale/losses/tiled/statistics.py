"""What the tiled losses share: weights of queries, and gradients of the outputs.

Shape suffixes: B texts of the global batch, b audios of this rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from atr_scale.losses.targets import Positives
from atr_scale.score_block import ScoreBlock


def zeros(block: ScoreBlock, *size: int) -> Tensor:
    """Float64 statistics to add up in."""
    return torch.zeros(size, dtype=torch.float64, device=block.device)


def query_weights(block: ScoreBlock, pairs: Positives) -> tuple[Tensor, Tensor]:
    """Weight of every query in the loss: 1/2 for the direction, 1/number of queries, 0 without a positive."""
    rows = (pairs.row_weight > 0).double() / (2 * block.shape[0])
    columns = (pairs.column_weight > 0).double() / (2 * block.num_columns)
    return rows, columns


def outputs(
    upstream: Tensor,
    temperature: Tensor,
    by_scale: Tensor,
    block: ScoreBlock,
    gradients: tuple[Tensor, ...],
    factor: float = 1.0,
) -> tuple[Tensor, ...]:
    """Gradients for (temperature, *block.tensors), the latter times `factor`.

    d scale / d temperature = -1 / temperature^2.
    """
    by_temperature = (upstream.double() * -by_scale / temperature.double().square()).to(temperature.dtype)
    scaled = (
        gradient.mul_((upstream * factor).to(gradient.dtype)).to(tensor.dtype)
        for gradient, tensor in zip(gradients, block.tensors, strict=True)
    )
    return by_temperature.reshape(temperature.shape), *scaled


def loss_dtype(block: ScoreBlock, temperature: Tensor) -> torch.dtype:
    """That of scores / temperature."""
    return torch.promote_types(block.dtype, temperature.dtype)


def as_tensor(temperature: float | Tensor, block: ScoreBlock) -> Tensor:
    if isinstance(temperature, Tensor):
        return temperature
    return torch.tensor([temperature], dtype=block.dtype, device=block.device)
