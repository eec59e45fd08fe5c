"""The objectives on score blocks: equal to `dense`, over any number of ranks, without a global score matrix.

Shape suffixes: B texts of the global batch, b audios of this rank, k id columns; a stripe is [B, some columns].

Rows are texts and complete over the ranks together; columns are audios and complete on one rank. Column statistics are
local, row statistics are [B] vectors that meet by all-reduce; the scores themselves never travel. Every rank returns
the same global mean loss, and its backward yields this rank's share of the gradient: the sum over ranks is the whole.
Statistics are float64 whatever the scores.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atr_scale.objectives.targets import Positives
from atr_scale.parallel.blocks import ScoreBlock

Ids = tuple[Tensor, Tensor]


def nt_xent(block: ScoreBlock, temperature: float | Tensor, positives: Ids | None = None) -> Tensor:
    """`dense.nt_xent` on a score block.

    positives: (text ids [B, k], audio ids [b, k]) int64; a pair is positive where any column agrees.
    """
    return _NTXent.apply(block, Positives.of(block, positives), _tensor(temperature, block), *block.tensors)


def pmr(
    block: ScoreBlock,
    temperature: float | Tensor,
    omega: float,
    positives: Ids | None = None,
    detach_prior: bool = False,
) -> Tensor:
    """`dense.pmr` on a score block (arXiv 2303.05681, eq. 12-14 on the corrected axis)."""
    pairs = Positives.of(block, positives)
    return _PMR.apply(block, pairs, omega, detach_prior, _tensor(temperature, block), *block.tensors)


class _NTXent(torch.autograd.Function):
    """u = s / tau; L = 1/2 [mean_i (lse_j u_ij - sum_j Y_ij u_ij) + mean_j (lse_i u_ij - sum_i Y'_ij u_ij)]."""

    @staticmethod
    def forward(ctx: Any, block: ScoreBlock, pairs: Positives, temperature: Tensor, *tensors: Tensor) -> Tensor:
        scale = 1 / temperature.item()
        rows, columns = _RowLogSums(block), _empty_columns(block)
        positive = torch.zeros((), dtype=torch.float64, device=block.device)
        for stripe in block.stripes():
            logits = block.stripe(stripe).mul_(scale)
            rows.add(logits)
            columns[stripe] = logits.logsumexp(0).double()
            positive += _positive_sum(pairs, stripe, logits, block, rows=True, columns=True)
        ctx.rows, ctx.columns = rows.merged(), columns
        ctx.block, ctx.pairs, ctx.scale = block, pairs, scale
        ctx.save_for_backward(temperature, *tensors)
        return _mean_of_directions(block, pairs, ctx.rows, columns, positive).to(_dtype(block, temperature))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        temperature, *_ = ctx.saved_tensors
        block, pairs, scale = ctx.block, ctx.pairs, ctx.scale
        row_weight, column_weight = _query_weights(block, pairs)
        gradients = block.new_gradients()
        by_scale = torch.zeros((), dtype=torch.float64, device=block.device)
        for stripe in block.stripes():
            scores = block.stripe(stripe)
            logits = scores * scale
            grad = (logits - ctx.rows[:, None].to(logits.dtype)).exp_().mul_(row_weight[:, None].to(logits.dtype))
            grad += logits.sub_(ctx.columns[stripe].to(logits.dtype)).exp_().mul_(column_weight[stripe].to(grad.dtype))
            _subtract_targets(grad, pairs, stripe, block, rows=True, columns=True)
            by_scale += (grad * scores).sum().double()
            block.add_gradient(gradients, stripe, grad.mul_(scale))
        return None, None, *_outputs(grads[0], temperature, by_scale, block, gradients)


class _PMR(torch.autograd.Function):
    """Prior-revised logits; with E = exp(omega s), k_j and r_i its column and row sums, h = 1 / tau:

    x = h s E / k (t2a), y = h s E / r (a2t), g = d L / d logits, HC_j = sum_i gx x, HR_i = sum_j gy y,
    dL/ds = E {(1 + omega s) h (gx / k_j + gy / r_i) - omega (HC_j / k_j + HR_i / r_i)};
    a detached prior drops the terms in omega.
    """

    @staticmethod
    def forward(
        ctx: Any,
        block: ScoreBlock,
        pairs: Positives,
        omega: float,
        detached: bool,
        temperature: Tensor,
        *tensors: Tensor,
    ) -> Tensor:
        scale = 1 / temperature.item()
        prior_rows, prior_columns = _RowLogSums(block), _empty_columns(block)
        rows, columns = _RowLogSums(block), _empty_columns(block)
        positive = torch.zeros((), dtype=torch.float64, device=block.device)
        for stripe in block.stripes():  # a stripe holds whole columns, so the prior over texts is complete inside it
            scores = block.stripe(stripe)
            exponent = omega * scores
            prior_rows.add(exponent)
            prior_columns[stripe] = exponent.logsumexp(0).double()
            t2a = _revised(scores, exponent, prior_columns[stripe], scale)
            rows.add(t2a)
            positive += _positive_sum(pairs, stripe, t2a, block, rows=True, columns=False)
        prior_row_sums, row_sums = prior_rows.merged(), rows.merged()

        _, column_weight = _query_weights(block, pairs)
        row_pull = torch.zeros(block.shape[0], dtype=torch.float64, device=block.device)
        local_pull = torch.zeros((), dtype=torch.float64, device=block.device)
        for stripe in block.stripes():
            scores = block.stripe(stripe)
            a2t = _revised(scores, omega * scores, prior_row_sums[:, None], scale)
            columns[stripe] = a2t.logsumexp(0).double()
            positive += _positive_sum(pairs, stripe, a2t, block, rows=False, columns=True)
            pull = _column_gradient(a2t, columns, column_weight, pairs, stripe, block).mul_(a2t).sum(1).double()
            row_pull += pull
            local_pull += pull.sum()
        ctx.sums = prior_row_sums, prior_columns, row_sums, columns
        ctx.row_pull, ctx.local_pull = block.sum(row_pull), local_pull
        ctx.block, ctx.pairs, ctx.omega, ctx.detached, ctx.scale = block, pairs, omega, detached, scale
        ctx.save_for_backward(temperature, *tensors)
        return _mean_of_directions(block, pairs, row_sums, columns, positive).to(_dtype(block, temperature))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        temperature, *_ = ctx.saved_tensors
        block, pairs, omega, scale = ctx.block, ctx.pairs, ctx.omega, ctx.scale
        prior_rows, prior_columns, rows, columns = ctx.sums
        row_weight, column_weight = _query_weights(block, pairs)
        gradients = block.new_gradients()
        pull = ctx.local_pull
        for stripe in block.stripes():
            scores = block.stripe(stripe)
            dtype = scores.dtype
            exponent = omega * scores
            over_texts = (exponent - prior_columns[stripe].to(dtype)).exp_()
            over_audios = exponent.sub_(prior_rows[:, None].to(dtype)).exp_()
            t2a = scale * scores * over_texts
            grad_t2a = (t2a - rows[:, None].to(dtype)).exp_().mul_(row_weight[:, None].to(dtype))
            _subtract_targets(grad_t2a, pairs, stripe, block, rows=True, columns=False)
            a2t = scale * scores * over_audios
            grad_a2t = _column_gradient(a2t, columns, column_weight, pairs, stripe, block)
            column_pull = (grad_t2a * t2a).sum(0)
            pull = pull + column_pull.sum().double()
            grad = scale * (grad_t2a * over_texts + grad_a2t * over_audios)
            if not ctx.detached:
                grad *= 1 + omega * scores
                grad -= omega * (column_pull * over_texts + ctx.row_pull[:, None].to(dtype) * over_audios)
            block.add_gradient(gradients, stripe, grad)
        return None, None, None, None, *_outputs(grads[0], temperature, pull / scale, block, gradients)


class _RowLogSums:
    """log sum_j exp(v_ij) of every row, gathered stripe by stripe and then over ranks."""

    def __init__(self, block: ScoreBlock) -> None:
        self.block = block
        self.value = torch.full((block.shape[0],), -torch.inf, dtype=torch.float64, device=block.device)

    def add(self, stripe: Tensor) -> None:
        self.value = torch.logaddexp(self.value, stripe.logsumexp(1).double())

    def merged(self) -> Tensor:
        top = self.block.max(self.value)
        return top + self.block.sum((self.value - top).exp()).log()


def _empty_columns(block: ScoreBlock) -> Tensor:
    return torch.empty(block.shape[1], dtype=torch.float64, device=block.device)


def _revised(scores: Tensor, exponent: Tensor, log_sums: Tensor, scale: float) -> Tensor:
    """Prior-revised logits: scale * scores * softmax, the softmax from its exponent and log-normaliser."""
    return (exponent - log_sums.to(scores.dtype)).exp_().mul_(scores).mul_(scale)


def _column_gradient(
    logits: Tensor, columns: Tensor, column_weight: Tensor, pairs: Positives, stripe: slice, block: ScoreBlock
) -> Tensor:
    """d L / d logits of the a2t direction inside one stripe."""
    grad = (logits - columns[stripe].to(logits.dtype)).exp_().mul_(column_weight[stripe].to(logits.dtype))
    _subtract_targets(grad, pairs, stripe, block, rows=False, columns=True)
    return grad


def _query_weights(block: ScoreBlock, pairs: Positives) -> tuple[Tensor, Tensor]:
    """Weight of every query in the loss: 1/2 for the direction, 1/number of queries, 0 without a positive."""
    rows = (pairs.row_weight > 0).double() / (2 * block.shape[0])
    columns = (pairs.column_weight > 0).double() / (2 * block.num_columns)
    return rows, columns


def _pair_weights(
    pairs: Positives, stripe: slice, block: ScoreBlock, *, rows: bool, columns: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(row, column in the stripe, target weight in the loss) of a stripe's positives, for the chosen directions."""
    i, j = pairs.within(stripe)
    weight = torch.zeros(len(i), dtype=torch.float64, device=block.device)
    if rows:
        weight += pairs.row_weight[i] / (2 * block.shape[0])
    if columns:
        weight += pairs.column_weight[stripe][j] / (2 * block.num_columns)
    return i, j, weight


def _positive_sum(
    pairs: Positives, stripe: slice, logits: Tensor, block: ScoreBlock, *, rows: bool, columns: bool
) -> Tensor:
    """Sum of target weight * logit, read from the same stripe that feeds the exponentials."""
    i, j, weight = _pair_weights(pairs, stripe, block, rows=rows, columns=columns)
    return (weight * logits[i, j].double()).sum()


def _subtract_targets(
    grad: Tensor, pairs: Positives, stripe: slice, block: ScoreBlock, *, rows: bool, columns: bool
) -> None:
    i, j, weight = _pair_weights(pairs, stripe, block, rows=rows, columns=columns)
    grad[i, j] -= weight.to(grad.dtype)


def _mean_of_directions(block: ScoreBlock, pairs: Positives, rows: Tensor, columns: Tensor, positive: Tensor) -> Tensor:
    row_weight, column_weight = _query_weights(block, pairs)
    local = (column_weight * columns).sum() - positive
    return (row_weight * rows).sum() + block.sum(local)


def _outputs(
    upstream: Tensor, temperature: Tensor, by_scale: Tensor, block: ScoreBlock, gradients: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Gradients for (temperature, *block.tensors); d scale / d temperature = -1 / temperature^2."""
    by_temperature = (upstream.double() * -by_scale / temperature.double().square()).to(temperature.dtype)
    scaled = (
        gradient.mul_(upstream.to(gradient.dtype)).to(tensor.dtype)
        for gradient, tensor in zip(gradients, block.tensors, strict=True)
    )
    return by_temperature.reshape(temperature.shape), *scaled


def _dtype(block: ScoreBlock, temperature: Tensor) -> torch.dtype:
    """Of the loss: that of scores / temperature."""
    return torch.promote_types(block.dtype, temperature.dtype)


def _tensor(temperature: float | Tensor, block: ScoreBlock) -> Tensor:
    if isinstance(temperature, Tensor):
        return temperature
    return torch.tensor([temperature], dtype=block.dtype, device=block.device)
