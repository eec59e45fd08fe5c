"""Cross-entropy of scaled scores against hard, soft or mixed targets: one sweep forward, one back.

Shape suffixes: B texts of the global batch, b audios of this rank, m rows and n columns of a part, P positive pairs.

Soft targets are softmaxes of a teacher's score block; they enter as sum_j P_ij u_ij, which is summed beside the
exponentials of the teacher's logits, so no target matrix is kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from atr_scale.losses.targets import Pairs, Positives
from atr_scale.losses.tiled.exponentials import (
    Shift,
    all_in_range,
    largest_of_ranks,
    log_sums,
    maxima,
    weigh,
)
from atr_scale.losses.tiled.statistics import as_tensor, loss_dtype, outputs, query_weights, zeros
from atr_scale.losses.tiled.tiles import (
    KeptTiles,
    PairsByPart,
    Part,
    Tile,
    Workspace,
    parts_of,
    tiles_of,
)
from atr_scale.score_block import ScoreBlock


@dataclass(frozen=True)
class Logits:
    """scale * the blocks' summed scores, without the pairs `excluded`."""

    blocks: tuple[ScoreBlock, ...]
    scale: float
    excluded: PairsByPart | None = None

    @staticmethod
    def of(temperature: float | Tensor, *blocks: ScoreBlock) -> Logits:
        """The blocks' mean scores / temperature."""
        return Logits(blocks, 1 / (as_tensor(temperature, blocks[0]).item() * len(blocks)))

    def tile(self, tile: Tile, out: Tensor | None = None) -> Tensor:
        """[m, n], the caller's to overwrite."""
        first, *others = self.blocks
        logits = first.stripe(tile.columns, tile.rows, self.scale, out)
        for other in others:
            logits += other.stripe(tile.columns, tile.rows, self.scale)
        if self.excluded is not None:
            logits[self.excluded.within(tile)] = -torch.inf
        return logits

    def bound(self) -> Tensor:
        """No logit of this rank is larger in absolute value."""
        return self.scale * torch.stack([block.bound().double() for block in self.blocks]).sum()


@dataclass(frozen=True)
class Targets:
    """(1 - beta) * positives + beta * softmax(teacher), constant.

    teacher: logits of the soft targets, one for both directions or one for each (t2a, a2t). excluded: pairs that no
    softmax sees. divergence: the targets' entropy is subtracted, so that the loss is KL.
    """

    pairs: Positives
    beta: float = 0.0
    teacher: tuple[Logits, ...] = ()
    divergence: bool = False
    excluded: Pairs | None = None


def soft_cross_entropy(block: ScoreBlock, temperature: float | Tensor, targets: Targets, kept_bytes: int) -> Tensor:
    """1/2 [mean_i (m_i lse_j u_ij - sum_j Y_ij u_ij) + mean_j (m'_j lse_i u_ij - sum_i Y'_ij u_ij)], u = s / tau,

    m the sum of a query's targets Y: 1, or less where it has no positive. kept_bytes: see `tiles.LOSS_BYTES`.
    """
    return _SoftCrossEntropy.apply(block, targets, kept_bytes, as_tensor(temperature, block), *block.tensors)


class _SoftCrossEntropy(torch.autograd.Function):
    """With E = exp(u), r_i and k_j its row and column sums: d L / d u_ij = E_ij (m_i / r_i + m'_j / k_j) - Y_ij - Y'_ij

    where everything is times the weight of its query in the loss.
    """

    @staticmethod
    def forward(
        ctx: Any, block: ScoreBlock, targets: Targets, kept_bytes: int, temperature: Tensor, *tensors: Tensor
    ) -> Tensor:
        sweeps = _Sweeps(block, targets, 1 / temperature.item())
        loss = sweeps.loss(kept_bytes if any(ctx.needs_input_grad) else 0)
        ctx.sweeps = sweeps
        ctx.save_for_backward(temperature, *tensors)
        return loss.to(loss_dtype(block, temperature))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        temperature, *_ = ctx.saved_tensors
        sweeps: _Sweeps = ctx.sweeps
        gradients = sweeps.gradients()
        by_scale = sweeps.block.inner_product(gradients)
        return (
            None,
            None,
            None,
            *outputs(grads[0], temperature, by_scale, sweeps.block, gradients, sweeps.student.scale),
        )


class _Sums:
    """Of exponentials, and of exponentials times values: of rows [B] and of local columns [b], float64."""

    def __init__(self, block: ScoreBlock) -> None:
        self.rows, self.row_products = zeros(block, block.shape[0]), zeros(block, block.shape[0])
        self.columns, self.column_products = zeros(block, block.shape[1]), zeros(block, block.shape[1])
        self._dtype = block.dtype

    def divide(self, rows: Tensor | float, columns: Tensor | float) -> tuple[Tensor, Tensor]:
        """Weights of queries over the sums of their exponentials."""
        return (rows / self.rows).to(self._dtype), (columns / self.columns).to(self._dtype)

    def merge(self, block: ScoreBlock) -> None:
        """Rows over ranks."""
        self.rows, self.row_products = block.sum(torch.stack([self.rows, self.row_products]))


class _Sweeps:
    """What the sweep forward leaves for the sweep back."""

    def __init__(self, block: ScoreBlock, targets: Targets, scale: float) -> None:
        self.block, self.targets = block, targets
        self.tiles = tiles_of(block)
        excluded = None if targets.excluded is None else PairsByPart(targets.excluded, self.tiles)
        self.student = Logits((block,), scale, excluded)
        self.pairs = PairsByPart(targets.pairs, parts_of(self.tiles))
        # Weight in the loss of a text's soft targets and of an audio's, of the pairs' hard ones, and of a query's sum.
        self.soft_weights = targets.beta / (2 * block.shape[0]), targets.beta / (2 * block.num_columns)
        hard = 1 - targets.beta
        rows, columns = query_weights(block, targets.pairs)
        self.row_weight, self.column_weight = hard * rows + self.soft_weights[0], hard * columns + self.soft_weights[1]
        self.row_share = targets.pairs.row_weight[self.pairs.rows]
        self.column_share = targets.pairs.column_weight[self.pairs.columns]
        self.pair_weight = hard / 2 * (self.row_share / block.shape[0] + self.column_share / block.num_columns)

    def loss(self, kept_bytes: int) -> Tensor:
        """The loss of all ranks, float64, after as many sweeps as the spread of the logits asks for."""
        logits = (self.student, *self.targets.teacher)
        bounds = largest_of_ranks(self.block, [each.bound() for each in logits])
        self._sweep([Shift.constant(bound, self.block.dtype) for bound in bounds], kept_bytes)
        if not all_in_range(self.block, *(x for sums in self.sums for x in (sums.rows, sums.columns))):
            self._sweep([maxima(self.block, self.tiles, each.tile) for each in logits], kept_bytes=0)
        return self._loss()

    def _sweep(self, shifts: Sequence[Shift], kept_bytes: int) -> None:
        """Sums and positives' logits under these shifts: the student's, then the teacher's."""
        block, teacher = self.block, self.targets.teacher
        self.shifts, self.sums = shifts, [_Sums(block) for _ in shifts[:2]]
        self.work, self.kept = Workspace(block), KeptTiles(block, kept_bytes)
        self.positives = torch.zeros(1 + len(teacher), len(self.pairs.rows), dtype=torch.float64, device=block.device)
        for tile in self.tiles:
            kept = self.kept.reserve(tile, len(shifts))
            logits = self._logits(tile, kept)
            for part in tile.parts:
                student, *others = (tile.of(x, part) for x in logits)
                i, j = self.pairs.within(part)
                self.positives[:, self.pairs.of(part)] = torch.stack([x[i, j] for x in (student, *others)]).double()
                if teacher:
                    self._add_soft(part, student, others)
                self._add(self.sums[0], part, *shifts[0].both(student, part))
        for sums in self.sums:
            sums.merge(block)

    def _logits(self, tile: Tile, out: Sequence[Tensor] = ()) -> list[Tensor]:
        """The student's and then the teacher's, in `out` or in the workspace."""
        every = (self.student, *self.targets.teacher)
        out = out or [self.work.get(f"logits {n}", tile) for n in range(len(every))]
        return [each.tile(tile, x) for each, x in zip(every, out, strict=True)]

    def _add_soft(self, part: Part, student: Tensor, teacher: Sequence[Tensor]) -> None:
        """Sums of the teacher's exponentials, and of their products with the student's logits.

        In a divergence with the difference of the student's and the teacher's.
        """
        sums, out, values = self.sums[1], self.work.get("products", part), [student]
        if self.targets.divergence:
            values = [torch.sub(student, x, out=self.work.get(f"values {n}", part)) for n, x in enumerate(teacher)]
        along = self._exponentials(part, teacher)
        self._add(sums, part, *along)
        sums.row_products[part.rows] += torch.mul(along[0], values[0], out=out).sum(1)
        if along[0] is not along[1]:
            torch.mul(along[1], values[-1], out=out)
        sums.column_products[part.columns] += out.sum(0)

    def _exponentials(self, part: Part, teacher: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Those of the soft targets along rows and along columns, from the teacher's logits, which are overwritten."""
        if len(teacher) == 1:
            return self.shifts[1].both(teacher[0], part)
        return self.shifts[1].along_rows(teacher[0], part), self.shifts[2].along_columns(teacher[1], part)

    @staticmethod
    def _add(sums: _Sums, part: Part, along_rows: Tensor, along_columns: Tensor) -> None:
        sums.rows[part.rows] += along_rows.sum(1)
        sums.columns[part.columns] += along_columns.sum(0)

    def _loss(self) -> Tensor:
        student, shift = self.sums[0], self.shifts[0]
        rows = (self.row_weight * log_sums(student.rows, shift.rows)).sum()
        columns = (self.column_weight * log_sums(student.columns, shift.columns)).sum()
        columns -= (self.pair_weight * self.positives[0]).sum()
        if self.targets.teacher:
            soft_rows, soft_columns = self._soft_loss()
            rows, columns = rows + soft_rows, columns + soft_columns
        return rows + self.block.sum(columns)

    def _soft_loss(self) -> tuple[Tensor, Tensor]:
        """Part of the soft targets in the loss, from all ranks' rows and from this rank's columns."""
        sums, beta = self.sums[1], self.targets.beta
        row_weight, column_weight = self.soft_weights
        rows = -row_weight * (sums.row_products / sums.rows).sum()
        columns = -column_weight * (sums.column_products / sums.columns).sum()
        if self.targets.divergence:
            row_sums = log_sums(sums.rows, self.shifts[1].rows)
            column_sums = log_sums(sums.columns, self.shifts[-1].columns)
            rows += (beta * math.log(beta) if beta else 0.0) - row_weight * row_sums.sum()
            columns += self._positives_entropy(row_sums, column_sums) - column_weight * column_sums.sum()
        return rows, columns

    def _positives_entropy(self, row_sums: Tensor, column_sums: Tensor) -> Tensor:
        """What the positives add to sum Y log Y of the soft part alone, from this rank's pairs."""
        pairs, beta = self.pairs, self.targets.beta
        total = zeros(self.block)
        for logits, sums, share, queries in (
            (self.positives[1], row_sums[pairs.rows], self.row_share, self.block.shape[0]),
            (self.positives[-1], column_sums[pairs.columns], self.column_share, self.block.num_columns),
        ):
            soft = beta * (logits - sums).exp()
            mixed = (1 - beta) * share + soft
            total += (torch.xlogy(mixed, mixed) - torch.xlogy(soft, soft)).sum() / (2 * queries)
        return total

    def gradients(self) -> tuple[Tensor, ...]:
        """d L / d u, as the block's tensors receive it from scores that are u."""
        block, work = self.block, self.work
        gradients = block.new_gradients()
        factors = [self.sums[0].divide(self.row_weight, self.column_weight)]
        factors += [sums.divide(*self.soft_weights) for sums in self.sums[1:]]
        for tile in self.tiles:
            kept = self.kept.pop(tile)
            tensors = kept or self._logits(tile)
            for part in tile.parts:
                student, *others = (tile.of(x, part) for x in tensors)
                both = (student, student) if kept else self.shifts[0].both(student, part)
                weighed = [both]
                if others:
                    weighed.append((others[0], others[-1]) if kept else self._exponentials(part, others))
                grad, *soft = (
                    weigh(*both, rows[part.rows], columns[part.columns], work.get("weights", part))
                    for both, (rows, columns) in zip(weighed, factors, strict=True)
                )
                for targets in soft:
                    grad -= targets
                i, j = self.pairs.within(part)
                grad[i, j] -= self.pair_weight[self.pairs.of(part)].to(grad.dtype)
            block.add_gradient(gradients, tile.columns, tensors[0], tile.rows)
        return gradients
