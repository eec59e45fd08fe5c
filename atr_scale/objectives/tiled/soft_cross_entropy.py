"""Cross-entropy of scaled scores against hard, soft or mixed targets: one sweep forward, one back.

Shape suffixes: B texts of the global batch, b audios of this rank, k id columns; a stripe is [B, some columns].

NT-Xent, distillation, CMSC and intra-modal contrast differ in their targets alone. Soft targets are softmaxes of a
teacher's score block; they enter as sum_j P_ij u_ij, which streams beside the log sums, so no target matrix is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from atr_scale.errors import UserError
from atr_scale.objectives.targets import Ids, Pairs, Positives
from atr_scale.objectives.tiled.statistics import (
    RowLogSums,
    RowMeans,
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

Stripes = Callable[[slice], Tensor]


def nt_xent(block: ScoreBlock, temperature: float | Tensor, positives: Ids | None = None) -> Tensor:
    """`dense.nt_xent` on a score block.

    positives: (text ids [B, k], audio ids [b, k]) int64; a pair is positive where any column agrees.
    """
    return _apply(block, temperature, _Targets(Positives.of(block, positives)))


def distillation(block: ScoreBlock, teacher_block: ScoreBlock, temperature: float | Tensor) -> Tensor:
    """`dense.distillation` on a score block and its teacher's block of the same shape, constant (no gradient).

    An ensemble's mean cosine is one `EmbeddingScores`: its members' unit vectors, each times the root of its weight,
    joined along their width.
    """
    _same_shape(block, "teacher_block", teacher_block)
    teacher = _Teacher(*[_logits(temperature, teacher_block)] * 2)
    return _apply(block, temperature, _Targets(Positives.none(block), beta=1.0, teacher=teacher))


def cmsc(
    block: ScoreBlock,
    text_block: ScoreBlock,
    audio_block: ScoreBlock,
    temperature: float | Tensor,
    beta: float,
    target_temperature: float | Tensor,
    positives: Ids | None = None,
    mode: Literal["each", "add"] = "each",
) -> Tensor:
    """`dense.cmsc` on score blocks; text_block: all texts x this rank's, audio_block: all audios x this rank's."""
    if block.shape[0] != block.num_columns:
        raise UserError(f"cmsc needs as many texts as audios, got scores {[block.shape[0], block.num_columns]}")
    _same_shape(block, "text_block", text_block)
    _same_shape(block, "audio_block", audio_block)
    if mode == "add":
        teacher = _Teacher(*[_logits(target_temperature, text_block, audio_block)] * 2)
    else:
        teacher = _Teacher(_logits(target_temperature, text_block), _logits(target_temperature, audio_block))
    targets = _Targets(Positives.of(block, positives), beta=beta, teacher=teacher, divergence=True)
    return _apply(block, temperature, targets)


def intra_modal(block: ScoreBlock, temperature: float | Tensor, same: Ids | None = None) -> Tensor:
    """`dense.intra_modal` on a block of one modality's samples: all of the global batch x this rank's.

    same: (ids [B, k] of all samples, ids [b, k] of this rank's) int64; pairs that agree in any column are left out of
    the negatives. With `ModalityScores` the gradient is complete on the rank.
    """
    if block.shape[0] != block.num_columns:
        raise UserError(f"intra_modal needs samples against themselves, got {[block.shape[0], block.num_columns]}")
    excluded = None if same is None else Pairs.agreeing(block, same).beside_itself(block)
    return _apply(block, temperature, _Targets(Positives.of(block), excluded=excluded))


@dataclass(frozen=True)
class _Teacher:
    """Logits of the soft targets by stripe, of t2a (softmax along rows) and of a2t (along columns)."""

    t2a: Stripes
    a2t: Stripes

    def stripes(self, columns: slice) -> tuple[Tensor, Tensor]:
        """Both, the same tensor where they are equal."""
        t2a = self.t2a(columns)
        return t2a, t2a if self.a2t is self.t2a else self.a2t(columns)


@dataclass(frozen=True)
class _Targets:
    """(1 - beta) * positives + beta * softmax(teacher).

    excluded: pairs that no softmax sees. divergence: the targets' entropy is subtracted, so that the loss is KL.
    """

    pairs: Positives
    beta: float = 0.0
    teacher: _Teacher | None = None
    divergence: bool = False
    excluded: Pairs | None = None

    def soft_weights(self, block: ScoreBlock) -> tuple[float, float]:
        """Weight in the loss of a text's soft targets, and of an audio's."""
        return self.beta / (2 * block.shape[0]), self.beta / (2 * block.num_columns)

    def query_weights(self, block: ScoreBlock) -> tuple[Tensor, Tensor]:
        """Sum of the targets of every query, times its weight in the loss: [B] and [b]."""
        rows, columns = query_weights(block, self.pairs)
        soft_row, soft_column = self.soft_weights(block)
        return (1 - self.beta) * rows + soft_row, (1 - self.beta) * columns + soft_column

    def exclude(self, logits: Tensor, stripe: slice) -> Tensor:
        if self.excluded is not None:
            logits[self.excluded.within(stripe)] = -torch.inf
        return logits


class _SoftSums:
    """Soft targets of both directions, gathered stripe by stripe: sum_j P_ij u_ij, and log sums of the teacher's v.

    Of a divergence sum_j P_ij (u_ij - v_ij), which leaves only the entropy of the positives to be put right.
    """

    def __init__(self, block: ScoreBlock, targets: _Targets) -> None:
        self.block, self.targets = block, targets
        self.rows, self.columns, self.column_means = RowMeans(block), empty_columns(block), empty_columns(block)
        self.positives: list[tuple[Tensor, Tensor]] = []  # v of the positives in both directions

    def add(self, stripe: slice, logits: Tensor, t2a: Tensor, a2t: Tensor) -> None:
        """Logits of some columns, and the teacher's."""
        divergence = self.targets.divergence
        self.rows.add(t2a, logits - t2a if divergence else logits)
        log_sums = a2t.logsumexp(0)
        self.columns[stripe] = log_sums.double()
        values = logits - a2t if divergence else logits
        self.column_means[stripe] = (a2t - log_sums).exp_().mul_(values).sum(0).double()
        if divergence:
            pairs = self.targets.pairs.within(stripe)
            self.positives.append((t2a[pairs].double(), a2t[pairs].double()))

    def merged(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(log sums of rows, of columns, this part of the loss from all ranks' rows, from this rank's columns)."""
        row_weight, column_weight = self.targets.soft_weights(self.block)
        row_sums, row_means = self.rows.merged()
        rows, columns = -row_weight * row_means.sum(), -column_weight * self.column_means.sum()
        if self.targets.divergence:
            entropy_of_share = self.targets.beta * math.log(self.targets.beta) if self.targets.beta else 0.0
            rows += entropy_of_share - row_weight * row_sums.sum()
            columns += self._positives_entropy(row_sums) - column_weight * self.columns.sum()
        return row_sums, self.columns, rows, columns

    def _positives_entropy(self, row_sums: Tensor) -> Tensor:
        """What the positives add to sum Y log Y of the soft part alone, from this rank's pairs."""
        pairs, beta = self.targets.pairs, self.targets.beta
        t2a, a2t = (torch.cat(values) for values in zip(*self.positives, strict=True))
        total = zero(self.block)
        for logits, log_sums, weight, queries in (
            (t2a, row_sums[pairs.rows], pairs.row_weight[pairs.rows], self.block.shape[0]),
            (a2t, self.columns[pairs.columns], pairs.column_weight[pairs.columns], self.block.num_columns),
        ):
            soft = beta * (logits - log_sums).exp()
            mixed = (1 - beta) * weight + soft
            total += (torch.xlogy(mixed, mixed) - torch.xlogy(soft, soft)).sum() / (2 * queries)
        return total


class _SoftCrossEntropy(torch.autograd.Function):
    """u = s / tau; L = 1/2 [mean_i (m_i lse_j u_ij - sum_j Y_ij u_ij) + mean_j (m'_j lse_i u_ij - sum_i Y'_ij u_ij)],

    m the sum of a query's targets Y: 1, or less where it has no positive. The targets are constant.
    """

    @staticmethod
    def forward(ctx: Any, block: ScoreBlock, targets: _Targets, temperature: Tensor, *tensors: Tensor) -> Tensor:
        scale = 1 / temperature.item()
        rows, columns = RowLogSums(block), empty_columns(block)
        hard, soft = zero(block), _SoftSums(block, targets)
        for stripe in block.stripes():
            logits = targets.exclude(block.stripe(stripe).mul_(scale), stripe)
            rows.add(logits)
            columns[stripe] = logits.logsumexp(0).double()
            hard += positive_sum(targets.pairs, stripe, logits, block)
            if targets.teacher:
                soft.add(stripe, logits, *targets.teacher.stripes(stripe))
        row_sums = rows.merged()
        row_weight, column_weight = targets.query_weights(block)
        from_rows = (row_weight * row_sums).sum()
        from_columns = (column_weight * columns).sum() - (1 - targets.beta) * hard
        ctx.teacher_sums = None
        if targets.teacher:
            *ctx.teacher_sums, soft_rows, soft_columns = soft.merged()
            from_rows, from_columns = from_rows + soft_rows, from_columns + soft_columns
        ctx.block, ctx.targets, ctx.scale, ctx.sums = block, targets, scale, (row_sums, columns)
        ctx.save_for_backward(temperature, *tensors)
        return (from_rows + block.sum(from_columns)).to(loss_dtype(block, temperature))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        temperature, *_ = ctx.saved_tensors
        block, targets, scale = ctx.block, ctx.targets, ctx.scale
        row_weight, column_weight = targets.query_weights(block)
        soft_row, soft_column = targets.soft_weights(block)
        gradients = block.new_gradients()
        by_scale = zero(block)
        for stripe in block.stripes():
            scores = block.stripe(stripe)
            logits = targets.exclude(scores * scale, stripe)
            rows, columns = ctx.sums
            grad = _softmax(logits, rows[:, None], row_weight[:, None])
            grad += _softmax(logits, columns[stripe], column_weight[stripe])
            if targets.teacher:
                t2a, a2t = targets.teacher.stripes(stripe)
                rows, columns = ctx.teacher_sums
                grad -= _softmax(t2a, rows[:, None], soft_row)
                grad -= _softmax(a2t, columns[stripe], soft_column)
            i, j, weight = pair_weights(targets.pairs, stripe, block)
            grad[i, j] -= ((1 - targets.beta) * weight).to(grad.dtype)
            by_scale += (grad * scores).sum().double()
            block.add_gradient(gradients, stripe, grad.mul_(scale))
        return None, None, *outputs(grads[0], temperature, by_scale, block, gradients)


def _softmax(logits: Tensor, log_sums: Tensor, weight: Tensor | float) -> Tensor:
    """weight * exp(logits - log_sums)."""
    if isinstance(weight, Tensor):
        weight = weight.to(logits.dtype)
    return (logits - log_sums.to(logits.dtype)).exp_().mul_(weight)


def _apply(block: ScoreBlock, temperature: float | Tensor, targets: _Targets) -> Tensor:
    return _SoftCrossEntropy.apply(block, targets, as_tensor(temperature, block), *block.tensors)


def _logits(temperature: float | Tensor, *blocks: ScoreBlock) -> Stripes:
    """The blocks' mean scores / temperature by stripe, constant."""
    scale = 1 / (as_tensor(temperature, blocks[0]).item() * len(blocks))

    def stripe(columns: slice) -> Tensor:
        first, *others = (block.stripe(columns) for block in blocks)
        for other in others:
            first += other
        return first.mul_(scale)

    return stripe


def _same_shape(block: ScoreBlock, name: str, other: ScoreBlock) -> None:
    if other.shape != block.shape:
        raise UserError(f"{name} is {list(other.shape)} and the scores are {list(block.shape)}: they must agree")
