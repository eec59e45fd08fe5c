"""Cross-entropy of logits u = h s against hard, soft or mixed targets: one sweep forward, one backward.

Symbols and derivation: docs/math/tiled_losses.md, section 3. Soft targets are softmaxes of a teacher's score block.
They enter the loss as sums over the exponentials of the teacher's logits, so that no matrix of targets is stored.

Shape suffixes: B texts of the global batch, b audios of this rank, m rows and n columns of a tile, P positive pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from atr_scale.losses.targets import Pairs, Positives
from atr_scale.losses.tiled.exponentials import (
    ConstantShift,
    Exponentials,
    MaximaShift,
    Shift,
    all_in_range,
    host_bounds,
    log_sums,
    no_sum_is_lost,
)
from atr_scale.losses.tiled.statistics import (
    as_tensor,
    both_directions,
    input_gradients,
    inverse,
    largest_inverse,
    loss_dtype,
    query_weights,
    zeros,
)
from atr_scale.losses.tiled.tiles import KeptTiles, PairsByTile, Tile, Workspace, loss_bytes, stripes_of, tiles_of
from atr_scale.score_block import ScoreBlock


@dataclass(frozen=True)
class Logits:
    """The sum of the blocks' scores; minus infinity for the pairs `excluded`.

    bound: no logit is larger in absolute value: a number for all ranks, or a scalar on the device for this one.
    """

    blocks: tuple[ScoreBlock, ...]
    bound: float | Tensor
    excluded: PairsByTile | None = None

    @staticmethod
    def of(temperature: float | Tensor, least: float | None, *blocks: ScoreBlock) -> Logits:
        """The mean of the blocks' scores / temperature. least: see `largest_inverse`."""
        h = inverse(temperature, blocks[0]) / len(blocks)
        known = [block.largest for block in blocks if block.largest is not None]
        if len(known) == len(blocks):
            bound: float | Tensor = largest_inverse(temperature, least) * sum(known) / len(blocks)
        else:
            bound = h * torch.stack([block.bound().double() for block in blocks]).sum()
        return Logits(tuple(block.scaled(h) for block in blocks), bound)

    def tile(self, tile: Tile, out: Tensor) -> Tensor:
        """[m, n], in `out`."""
        first, *others = self.blocks
        logits = first.stripe(tile.columns, tile.rows, out)
        for other in others:
            logits += other.stripe(tile.columns, tile.rows)
        if self.excluded is not None:
            logits[self.excluded.within(tile)] = -torch.inf
        return logits


@dataclass(frozen=True)
class Targets:
    """(1 - beta) * positives + beta * softmax(teacher), constant, and how much each direction counts.

    teacher:    logits of the soft targets: none, one for both directions, or one for each (t2a, a2t).
    divergence: the entropy of the targets is subtracted, which makes the loss a Kullback-Leibler divergence.
    excluded:   pairs that no softmax counts.
    t2a_share:  part of t2a in the loss; the rest is that of a2t.
    """

    pairs: Positives
    beta: float = 0.0
    teacher: tuple[Logits, ...] = ()
    divergence: bool = False
    excluded: Pairs | None = None
    t2a_share: float = 0.5


def soft_cross_entropy(
    block: ScoreBlock,
    temperature: float | Tensor,
    targets: Targets,
    kept_bytes: int | None = None,
    least_temperature: float | None = None,
) -> Tensor:
    """w sum_i (m_i log sum_j exp u_ij - sum_j T_ij u_ij) + w' sum_j (m'_j log sum_i exp u_ij - sum_i T'_ij u_ij).

    u = scores / temperature, T and T' the targets of t2a and a2t, m and m' their sums for a query, w and w' the weights
    of a query (`query_weights`). A float scalar, the same on every rank.
    kept_bytes: by default `tiles.loss_bytes`. least_temperature: see `largest_inverse`.
    """
    given = as_tensor(temperature, block)
    student = Logits.of(given, least_temperature, block)
    loss: Tensor = _SoftCrossEntropy.apply(block, student, targets, kept_bytes, given, *block.tensors)
    return loss


class _SoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        block: ScoreBlock,
        student: Logits,
        targets: Targets,
        kept_bytes: int | None,
        temperature: Tensor,
        *tensors: Tensor,
    ) -> Tensor:
        sweeps = _Sweeps(block, student, targets)
        if not any(ctx.needs_input_grad):
            kept_bytes = 0
        parts = sweeps.loss(loss_bytes(block.device) if kept_bytes is None else kept_bytes)
        ctx.sweeps = sweeps
        ctx.save_for_backward(temperature, *tensors)
        return both_directions(parts, targets.t2a_share, loss_dtype(block, temperature))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        temperature, *_ = ctx.saved_tensors
        sweeps: _Sweeps = ctx.sweeps
        gradients, by_log_h = sweeps.gradients(by_temperature=ctx.needs_input_grad[4])
        h = inverse(temperature, sweeps.block)  # u = h s
        return None, None, None, None, *input_gradients(grads[0], temperature, by_log_h, sweeps.block, gradients, h)


class _Sums:
    """Sums over the exponentials of a softmax in both directions, float64.

    rows [B], columns [b]: of the exponentials. row_products [B], column_products [b]: of exponentials times values.
    """

    def __init__(self, block: ScoreBlock) -> None:
        self.rows, self.columns = (zeros(block, size) for size in block.shape)
        self.row_products, self.column_products = (zeros(block, size) for size in block.shape)
        self._dtype = block.dtype

    def add(self, tile: Tile, exponentials: Exponentials) -> None:
        self.rows[tile.rows] += exponentials.by_row.sum(1)
        self.columns[tile.columns] += exponentials.by_column.sum(0)

    def add_products(self, tile: Tile, exponentials: Exponentials, values: Sequence[Tensor], out: Tensor) -> None:
        """values: [m, n], the same for both directions or one for each. out: a buffer."""
        self.row_products[tile.rows] += torch.mul(exponentials.by_row, values[0], out=out).sum(1)
        self.column_products[tile.columns] += torch.mul(exponentials.by_column, values[-1], out=out).sum(0)

    def divide(self, row_weight: Tensor | float, column_weight: Tensor | float) -> tuple[Tensor, Tensor]:
        """Factors [B], [b] that turn exponentials into softmaxes times the weights of their queries."""
        return (row_weight / self.rows).to(self._dtype), (column_weight / self.columns).to(self._dtype)


class _Sweeps:
    """The sweeps of one loss, and the state that the forward pass saves for the backward pass.

    pairs:             the P positive pairs.
    row_share [P], column_share [P]: a pair's part of its text's and of its audio's hard targets.
    row_pair_weight [P], column_pair_weight [P]: weight of a pair's logit in t2a and in a2t; pair_weight is their sum.
    query_weights:     weight of a text and of an audio as a query in the loss.
    soft_weights:      weight of a text's and of an audio's soft targets in the loss.
    row_weight [B], column_weight [b]: weight of a query's log-sum-exp in the loss.
    shifts:            of the student's logits, then of the teacher's.
    sums:              the student's, then the teacher's (rows from its t2a logits, columns from its a2t logits).
    positive_logits [1 or more, P] float64: at the positive pairs, the student's and then the teacher's.
    centre:            some logit of the student, the same number on all ranks.
    """

    shifts: Sequence[Shift]
    sums: list[_Sums]
    positive_logits: Tensor
    kept: KeptTiles

    def __init__(self, block: ScoreBlock, student: Logits, targets: Targets) -> None:
        self.block, self.targets, self.work = block, targets, Workspace(block)
        self.tiles = tiles_of(stripes_of(block))
        excluded = None if targets.excluded is None else PairsByTile(targets.excluded, self.tiles, block.device)
        self.logits = (replace(student, excluded=excluded), *targets.teacher)
        self.pairs = PairsByTile(targets.pairs, self.tiles, block.device)
        positives, beta = targets.pairs, targets.beta
        row_share, column_share = positives.shares()
        self.row_share, self.column_share = row_share[self.pairs.rows], column_share[self.pairs.columns]
        self.query_weights = of_text, of_audio = query_weights(block, targets.t2a_share)
        self.row_pair_weight = (1 - beta) * of_text * self.row_share
        self.column_pair_weight = (1 - beta) * of_audio * self.column_share
        self.pair_weight = self.row_pair_weight + self.column_pair_weight
        self.soft_weights = beta * of_text, beta * of_audio
        self.row_weight = (1 - beta) * of_text * row_share * positives.row_count + self.soft_weights[0]
        self.column_weight = (1 - beta) * of_audio * column_share * positives.column_count + self.soft_weights[1]

    def loss(self, kept_bytes: int) -> Tensor:
        """The parts [2] of t2a and a2t in the loss of all ranks, float64; sweeps twice more if a constant shift loses
        sums."""
        block = self.block
        bounds = host_bounds(block, [each.bound for each in self.logits])
        self._sweep([ConstantShift(bound, block.dtype) for bound in bounds], kept_bytes)
        if not no_sum_is_lost(block, bounds) and not all_in_range(
            block, *(x for sums in self.sums for x in (sums.rows, sums.columns))
        ):
            maxima = [MaximaShift(block, self.tiles, partial(self._one, number)) for number in range(len(self.logits))]
            self._sweep(maxima, kept_bytes=0)
        self.work.clear()
        return self._loss()

    def _sweep(self, shifts: Sequence[Shift], kept_bytes: int) -> None:
        """Sums and the logits of the positive pairs under these shifts, one for the student and for each teacher."""
        block, teacher = self.block, self.targets.teacher
        self.shifts, self.kept = shifts, KeptTiles(block, kept_bytes, len(shifts))
        self.work.start_sweep()
        self.sums = [_Sums(block) for _ in shifts[:2]]
        self.positive_logits = zeros(block, len(shifts), len(self.pairs.rows))
        self.centre = zeros(block, 1)
        for tile in self.tiles:
            logits = self._logits(tile, self.kept.reserve("logits", tile, len(shifts)))
            positive = [x[self.pairs.within(tile)] for x in logits]
            self.positive_logits[:, self.pairs.of(tile)] = torch.stack(positive).double()
            every = self._exponentials(tile, logits, self.kept.reserve("exponentials", tile, len(shifts)))
            for sums, exponentials in zip(self.sums, every, strict=True):
                sums.add(tile, exponentials)
            if teacher:
                values, products = self._values(tile, logits), self.work.get("products", tile)
                self.sums[1].add_products(tile, every[1], values, products)
            if tile.number == 0:
                self.centre += logits[0][:1, 0].nan_to_num(0, 0, 0) / block.world.size
        self._merge()

    def _merge(self) -> None:
        """Add up the sums of rows, and the centre, of all ranks."""
        student, *soft = self.sums
        parts = [self.centre, student.rows, *(x for each in soft for x in (each.rows, each.row_products))]
        merged = self.block.sum(torch.cat(parts)).split([len(part) for part in parts])
        self.centre, student.rows, *of_soft = merged
        for each in soft:
            each.rows, each.row_products = of_soft

    def _one(self, number: int, tile: Tile) -> Tensor:
        return self.logits[number].tile(tile, self.work.get("logits", tile))

    def _logits(self, tile: Tile, out: Sequence[Tensor] = ()) -> list[Tensor]:
        """The student's, then the teacher's; out: a tensor for each, by default of the workspace."""
        out = out or [self.work.get(name, tile) for name in self._names("logits")]
        return [logits.tile(tile, each) for logits, each in zip(self.logits, out, strict=True)]

    def _exponentials(self, tile: Tile, logits: Sequence[Tensor], out: Sequence[Tensor] = ()) -> list[Exponentials]:
        """The student's, then the soft targets'; out: a tensor for each of the logits, by default of the workspace."""
        out = out or [self.work.get(name, tile) for name in self._names("exponentials")]
        student, *teacher = self.shifts
        every = [student.both(logits[0], tile, out[0])]
        if len(teacher) == 1:
            every.append(teacher[0].both(logits[1], tile, out[1]))
        elif teacher:
            t2a, a2t = teacher
            every.append(Exponentials(t2a.by_row(logits[1], tile, out[1]), a2t.by_column(logits[2], tile, out[2])))
        return every

    def _kept_exponentials(self, tile: Tile) -> list[Exponentials]:
        """The same from the tile's kept tensors, or an empty list. They are kept under constant shifts alone."""
        kept = self.kept.pop("exponentials", tile)
        student, teacher = kept[:1], kept[1:]
        return [Exponentials(by_direction[0], by_direction[-1]) for by_direction in (student, teacher) if by_direction]

    def _values(self, tile: Tile, logits: Sequence[Tensor]) -> list[Tensor]:
        """Factors of the soft targets in the loss: u, or u - t in a divergence, with t the teacher's logits."""
        student, *teacher = logits
        if not self.targets.divergence:
            return [student]
        return [torch.sub(student, t, out=self.work.get(f"u - t, {n}", tile)) for n, t in enumerate(teacher)]

    def _names(self, content: str) -> list[str]:
        """Names of buffers, for the student and for each teacher."""
        return [f"student {content}", *(f"teacher {content}, {n}" for n in range(len(self.targets.teacher)))]

    def _loss(self) -> Tensor:
        student, shift = self.sums[0], self.shifts[0]
        rows = (self.row_weight * log_sums(student.rows, shift.rows)).sum()
        columns = (self.column_weight * log_sums(student.columns, shift.columns)).sum()
        own_rows = -(self.row_pair_weight * self.positive_logits[0]).sum()
        columns -= (self.column_pair_weight * self.positive_logits[0]).sum()
        if self.targets.teacher:
            soft_rows, own_soft_rows, soft_columns = self._soft_loss()
            rows, own_rows, columns = rows + soft_rows, own_rows + own_soft_rows, columns + soft_columns
        own_rows, columns = self.block.sum(torch.stack([own_rows, columns]))
        return torch.stack([rows + own_rows, columns])

    def _soft_loss(self) -> tuple[Tensor, Tensor | float, Tensor]:
        """The soft targets' part of the loss: of all rows, the same on every rank; this rank's part of them; and of its
        columns."""
        sums, beta = self.sums[1], self.targets.beta
        row_weight, column_weight = self.soft_weights
        rows = -row_weight * (sums.row_products / sums.rows).sum()
        columns = -column_weight * (sums.column_products / sums.columns).sum()
        own_rows: Tensor | float = 0.0
        if self.targets.divergence:
            row_log_sums = log_sums(sums.rows, self.shifts[1].rows)
            column_log_sums = log_sums(sums.columns, self.shifts[-1].columns)
            # beta log beta of every query; the weights of the queries of a direction sum to its share.
            entropy, share = beta * math.log(beta) if beta else 0.0, self.targets.t2a_share
            own_rows, own_columns = self._mixed_entropy(row_log_sums, column_log_sums)
            rows += share * entropy - row_weight * row_log_sums.sum()
            columns += own_columns - column_weight * column_log_sums.sum()
            columns += (1 - share) * entropy / self.block.world.size
        return rows, own_rows, columns

    def _mixed_entropy(self, row_log_sums: Tensor, column_log_sums: Tensor) -> list[Tensor]:
        """Of t2a and of a2t: sum T log T over this rank's positive pairs, less that sum for the soft targets alone."""
        pairs, beta, (of_text, of_audio) = self.pairs, self.targets.beta, self.query_weights
        found = []
        for logits, log_sum, share, weight in (
            (self.positive_logits[1], row_log_sums[pairs.rows], self.row_share, of_text),
            (self.positive_logits[-1], column_log_sums[pairs.columns], self.column_share, of_audio),
        ):
            soft = beta * (logits - log_sum).exp()
            mixed = (1 - beta) * share + soft
            found.append(weight * (torch.xlogy(mixed, mixed) - torch.xlogy(soft, soft)).sum())
        return found

    def gradients(self, by_temperature: bool) -> tuple[tuple[Tensor, ...], Tensor]:
        """(d loss / d u, as the block's tensors receive it from scores equal to u; d loss / d log h of this rank).

        d loss / d log h is sum_ij G_ij u_ij with G = d loss / d u. All of G sums to zero, so any number may be
        subtracted from u first. If all scores are nearly equal, the sum is tiny beside its terms unless that is done.
        """
        block, work = self.block, self.work
        work.start_sweep()
        gradients, by_log_h = block.new_gradients(), zeros(block)
        student_factors = self.sums[0].divide(self.row_weight, self.column_weight)
        soft_factors = [sums.divide(*self.soft_weights) for sums in self.sums[1:]]
        centre = self.centre.to(block.dtype)
        for tile in self.tiles:
            logits = self.kept.pop("logits", tile) or self._logits(tile)
            every = self._kept_exponentials(tile) or self._exponentials(tile, logits)
            gradient = _weighted(every[0], student_factors, tile, work.get("gradient", tile))
            for exponentials, factors in zip(every[1:], soft_factors, strict=True):
                gradient -= _weighted(exponentials, factors, tile, work.get("soft targets", tile))
            gradient[self.pairs.within(tile)] -= self.pair_weight[self.pairs.of(tile)].to(gradient.dtype)
            if by_temperature:
                u = logits[0].sub_(centre)
                if self.logits[0].excluded is not None:
                    u[self.logits[0].excluded.within(tile)] = 0
                by_log_h += u.mul_(gradient).sum()
            block.add_gradient(gradients, tile.columns, gradient, tile.rows)
        return gradients, by_log_h


def _weighted(exponentials: Exponentials, factors: tuple[Tensor, Tensor], tile: Tile, out: Tensor) -> Tensor:
    """rows_i E_ij + columns_j E'_ij [m, n] in `out`, from the exponentials E along rows and E' along columns."""
    rows, columns = factors[0][tile.rows, None], factors[1][tile.columns]
    if exponentials.by_row is exponentials.by_column:
        return torch.add(rows, columns, out=out).mul_(exponentials.by_row)
    return torch.mul(exponentials.by_row, rows, out=out).addcmul_(exponentials.by_column, columns)
