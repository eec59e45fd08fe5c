"""Prior-matrix-revised loss on score blocks: two sweeps forward, one back.

Shape suffixes: B texts of the global batch, b audios of this rank; a stripe is [B, some columns].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atr_scale.objectives.targets import Ids, Positives
from atr_scale.objectives.tiled.statistics import (
    RowLogSums,
    as_tensor,
    empty_columns,
    loss_dtype,
    outputs,
    pair_weights,
    positive_sum,
    query_weights,
    zero,
)
from atr_scale.parallel.blocks import ScoreBlock


def pmr(
    block: ScoreBlock,
    temperature: float | Tensor,
    omega: float,
    positives: Ids | None = None,
    detach_prior: bool = False,
    scale_by_batch: bool = False,
) -> Tensor:
    """`dense.pmr` on a score block (arXiv 2303.05681, eq. 12-14 on the corrected axis).

    positives: (text ids [B, k], audio ids [b, k]) int64; a pair is positive where any column agrees.
    """
    factors = (float(block.shape[0]), float(block.num_columns)) if scale_by_batch else (1.0, 1.0)
    pairs = Positives.of(block, positives)
    return _PMR.apply(block, pairs, omega, detach_prior, factors, as_tensor(temperature, block), *block.tensors)


class _PMR(torch.autograd.Function):
    """Prior-revised logits; with E = exp(omega s), k_j and r_i its column and row sums, h = 1 / tau:

    x = h s E / k (t2a), y = h s E / r (a2t), g = d L / d logits, HC_j = sum_i gx x, HR_i = sum_j gy y,
    dL/ds = E {(1 + omega s) h (gx / k_j + gy / r_i) - omega (HC_j / k_j + HR_i / r_i)};
    a detached prior drops the terms in omega, scaling by the batch puts a factor to each direction's h.
    """

    @staticmethod
    def forward(
        ctx: Any,
        block: ScoreBlock,
        pairs: Positives,
        omega: float,
        detached: bool,
        factors: tuple[float, float],
        temperature: Tensor,
        *tensors: Tensor,
    ) -> Tensor:
        scale = 1 / temperature.item()
        scale_t2a, scale_a2t = scale * factors[0], scale * factors[1]
        prior_rows, prior_columns = RowLogSums(block), empty_columns(block)
        rows, columns = RowLogSums(block), empty_columns(block)
        positive = zero(block)
        for stripe in block.stripes():  # a stripe holds whole columns, so the prior over texts is complete inside it
            scores = block.stripe(stripe)
            exponent = omega * scores
            prior_rows.add(exponent)
            prior_columns[stripe] = exponent.logsumexp(0).double()
            t2a = _revised(scores, exponent, prior_columns[stripe], scale_t2a)
            rows.add(t2a)
            positive += positive_sum(pairs, stripe, t2a, block, columns=False)
        prior_row_sums, row_sums = prior_rows.merged(), rows.merged()

        row_weight, column_weight = query_weights(block, pairs)
        row_pull = torch.zeros(block.shape[0], dtype=torch.float64, device=block.device)
        for stripe in block.stripes():
            scores = block.stripe(stripe)
            a2t = _revised(scores, omega * scores, prior_row_sums[:, None], scale_a2t)
            columns[stripe] = a2t.logsumexp(0).double()
            positive += positive_sum(pairs, stripe, a2t, block, rows=False)
            row_pull += _column_gradient(a2t, columns, column_weight, pairs, stripe, block).mul_(a2t).sum(1).double()
        ctx.sums = prior_row_sums, prior_columns, row_sums, columns
        ctx.row_pull, ctx.local_pull = block.sum(row_pull), row_pull.sum()
        ctx.block, ctx.pairs, ctx.omega, ctx.detached = block, pairs, omega, detached
        ctx.scale, ctx.scale_t2a, ctx.scale_a2t = scale, scale_t2a, scale_a2t
        ctx.save_for_backward(temperature, *tensors)
        loss = (row_weight * row_sums).sum() + block.sum((column_weight * columns).sum() - positive)
        return loss.to(loss_dtype(block, temperature))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        temperature, *_ = ctx.saved_tensors
        block, pairs, omega = ctx.block, ctx.pairs, ctx.omega
        prior_rows, prior_columns, rows, columns = ctx.sums
        row_weight, column_weight = query_weights(block, pairs)
        gradients = block.new_gradients()
        pull = ctx.local_pull
        for stripe in block.stripes():
            scores = block.stripe(stripe)
            dtype = scores.dtype
            exponent = omega * scores
            over_texts = (exponent - prior_columns[stripe].to(dtype)).exp_()
            over_audios = exponent.sub_(prior_rows[:, None].to(dtype)).exp_()
            t2a = ctx.scale_t2a * scores * over_texts
            grad_t2a = (t2a - rows[:, None].to(dtype)).exp_().mul_(row_weight[:, None].to(dtype))
            _subtract_targets(grad_t2a, pairs, stripe, block, columns=False)
            a2t = ctx.scale_a2t * scores * over_audios
            grad_a2t = _column_gradient(a2t, columns, column_weight, pairs, stripe, block)
            column_pull = (grad_t2a * t2a).sum(0)
            pull = pull + column_pull.sum().double()
            grad = ctx.scale_t2a * grad_t2a * over_texts + ctx.scale_a2t * grad_a2t * over_audios
            if not ctx.detached:
                grad *= 1 + omega * scores
                grad -= omega * (column_pull * over_texts + ctx.row_pull[:, None].to(dtype) * over_audios)
            block.add_gradient(gradients, stripe, grad)
        return (None,) * 5 + outputs(grads[0], temperature, pull / ctx.scale, block, gradients)


def _revised(scores: Tensor, exponent: Tensor, log_sums: Tensor, scale: float) -> Tensor:
    """Prior-revised logits: scale * scores * softmax, the softmax from its exponent and log-normaliser."""
    return (exponent - log_sums.to(scores.dtype)).exp_().mul_(scores).mul_(scale)


def _column_gradient(
    logits: Tensor, columns: Tensor, column_weight: Tensor, pairs: Positives, stripe: slice, block: ScoreBlock
) -> Tensor:
    """d L / d logits of the a2t direction inside one stripe."""
    grad = (logits - columns[stripe].to(logits.dtype)).exp_().mul_(column_weight[stripe].to(logits.dtype))
    _subtract_targets(grad, pairs, stripe, block, rows=False)
    return grad


def _subtract_targets(
    grad: Tensor, pairs: Positives, stripe: slice, block: ScoreBlock, *, rows: bool = True, columns: bool = True
) -> None:
    i, j, weight = pair_weights(pairs, stripe, block, rows=rows, columns=columns)
    grad[i, j] -= weight.to(grad.dtype)
