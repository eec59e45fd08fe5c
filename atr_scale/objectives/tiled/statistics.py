"""What the tiled losses share: streaming row statistics, weights of queries and of pairs, gradients of the outputs.

Shape suffixes: B texts of the global batch, b audios of this rank; a stripe is [B, some columns].
"""

from __future__ import annotations

import torch
from torch import Tensor

from atr_scale.objectives.targets import Positives
from atr_scale.parallel.blocks import ScoreBlock


class RowLogSums:
    """log sum_j exp(v_ij) of every row, gathered stripe by stripe and then over ranks."""

    def __init__(self, block: ScoreBlock) -> None:
        self.block = block
        self.value = torch.full((block.shape[0],), -torch.inf, dtype=torch.float64, device=block.device)

    def add(self, stripe: Tensor) -> None:
        self.value = torch.logaddexp(self.value, stripe.logsumexp(1).double())

    def merged(self) -> Tensor:
        top = self.block.max(self.value)
        return top + self.block.sum((self.value - top).exp()).log()


class RowMeans:
    """sum_j P_ij x_ij of every row under P_i = softmax_j(v_ij), and log sum_j exp(v_ij), gathered in the same way."""

    def __init__(self, block: ScoreBlock) -> None:
        self.block, self.log_sums = block, RowLogSums(block)
        self.value = torch.zeros(block.shape[0], dtype=torch.float64, device=block.device)

    def add(self, stripe: Tensor, values: Tensor) -> None:
        """v and x of some columns, [B, columns] each."""
        before, added = self.log_sums.value, stripe.logsumexp(1)
        self.log_sums.value = torch.logaddexp(before, added.double())
        mean = (stripe - added[:, None]).exp_().mul_(values).sum(1).double()
        self.value *= (before - self.log_sums.value).exp()
        self.value += mean * (added.double() - self.log_sums.value).exp()

    def merged(self) -> tuple[Tensor, Tensor]:
        """(log sums, means) over all ranks."""
        log_sums = self.log_sums.merged()
        return log_sums, self.block.sum(self.value * (self.log_sums.value - log_sums).exp())


def empty_columns(block: ScoreBlock) -> Tensor:
    """One float64 statistic a local column, [b]."""
    return torch.empty(block.shape[1], dtype=torch.float64, device=block.device)


def zero(block: ScoreBlock) -> Tensor:
    """A float64 scalar to add up in."""
    return torch.zeros((), dtype=torch.float64, device=block.device)


def query_weights(block: ScoreBlock, pairs: Positives) -> tuple[Tensor, Tensor]:
    """Weight of every query in the loss: 1/2 for the direction, 1/number of queries, 0 without a positive."""
    rows = (pairs.row_weight > 0).double() / (2 * block.shape[0])
    columns = (pairs.column_weight > 0).double() / (2 * block.num_columns)
    return rows, columns


def pair_weights(
    pairs: Positives, stripe: slice, block: ScoreBlock, *, rows: bool = True, columns: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """(row, column in the stripe, target weight in the loss) of a stripe's positives, for the chosen directions."""
    i, j = pairs.within(stripe)
    weight = torch.zeros(len(i), dtype=torch.float64, device=block.device)
    if rows:
        weight += pairs.row_weight[i] / (2 * block.shape[0])
    if columns:
        weight += pairs.column_weight[stripe][j] / (2 * block.num_columns)
    return i, j, weight


def positive_sum(
    pairs: Positives, stripe: slice, logits: Tensor, block: ScoreBlock, *, rows: bool = True, columns: bool = True
) -> Tensor:
    """Sum of target weight * logit, read from the same stripe that feeds the exponentials."""
    i, j, weight = pair_weights(pairs, stripe, block, rows=rows, columns=columns)
    return (weight * logits[i, j].double()).sum()


def outputs(
    upstream: Tensor, temperature: Tensor, by_scale: Tensor, block: ScoreBlock, gradients: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Gradients for (temperature, *block.tensors); d scale / d temperature = -1 / temperature^2."""
    by_temperature = (upstream.double() * -by_scale / temperature.double().square()).to(temperature.dtype)
    scaled = (
        gradient.mul_(upstream.to(gradient.dtype)).to(tensor.dtype)
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
