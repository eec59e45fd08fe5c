"""Prior-matrix-revised loss on score blocks: two sweeps forward, one back.

Shape suffixes: B texts of the global batch, b audios of this rank; a stripe is [B, some columns].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atr_scale.losses.targets import Ids, Positives
from atr_scale.losses.tiled.exponentials import Shift, all_in_range, largest_of_ranks, log_sums, maxima
from atr_scale.losses.tiled.statistics import as_tensor, loss_dtype, outputs, query_weights, zeros
from atr_scale.losses.tiled.tiles import PairsByPart, Part, Tile, Workspace, parts_of, tiles_of
from atr_scale.score_block import ScoreBlock


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
        ctx.sweeps = _Sweeps(block, pairs, omega, scale * factors[0], scale * factors[1])
        loss = ctx.sweeps.loss(scale)
        ctx.detached = detached
        ctx.save_for_backward(temperature, *tensors)
        return loss.to(loss_dtype(block, temperature))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        temperature, *_ = ctx.saved_tensors
        gradients, pull = ctx.sweeps.gradients(ctx.detached)
        return (None,) * 5 + outputs(grads[0], temperature, pull * temperature, ctx.sweeps.block, gradients)


class _Sweeps:
    """What the sweeps forward leave for the sweep back.

    prior, prior_rows [B], prior_columns [b]: shift and sums of E. t2a, rows [B]: those of exp x along rows.
    a2t, columns [b]: those of exp y along columns. row_pull: [B], HR.
    """

    prior: Shift
    t2a: Shift
    a2t: Shift
    prior_rows: Tensor
    prior_columns: Tensor
    rows: Tensor
    columns: Tensor
    row_pull: Tensor

    def __init__(self, block: ScoreBlock, pairs: Positives, omega: float, scale_t2a: float, scale_a2t: float) -> None:
        self.block, self.omega = block, omega
        self.scale_t2a, self.scale_a2t = scale_t2a, scale_a2t
        self.stripes, self.work = tiles_of(block, whole_columns=True), Workspace(block)
        self.pairs = PairsByPart(pairs, parts_of(self.stripes))
        self.row_weight, self.column_weight = query_weights(block, pairs)
        self.share_t2a = pairs.row_weight[self.pairs.rows] / (2 * block.shape[0])
        self.share_a2t = pairs.column_weight[self.pairs.columns] / (2 * block.num_columns)

    def loss(self, scale: float) -> Tensor:
        """The loss of all ranks, float64, after as many sweeps as the spread of the logits asks for."""
        block = self.block
        (bound,) = largest_of_ranks(block, [block.bound()])
        self.prior = Shift.constant(abs(self.omega) * bound, block.dtype)
        self.t2a = self.a2t = Shift.constant(scale * bound, block.dtype)
        positive = self._sweep_texts() + self._sweep_audios()
        if not all_in_range(block, self.prior_rows, self.prior_columns, self.rows, self.columns):
            self.prior = maxima(block, self.stripes, lambda stripe: self._scores(stripe).mul_(self.omega))
            self._sweep_texts()  # sums of the prior alone, for the next two
            self.t2a = maxima(block, self.stripes, self._t2a_logits)
            self.a2t = maxima(block, self.stripes, self._a2t_logits)
            positive = self._sweep_texts() + self._sweep_audios()
        from_rows = (self.row_weight * log_sums(self.rows, self.t2a.rows)).sum()
        from_columns = (self.column_weight * log_sums(self.columns, self.a2t.columns)).sum()
        self.local_pull, self.row_pull = self.row_pull.sum(), block.sum(self.row_pull)
        return from_rows + block.sum(from_columns - positive)

    def _scores(self, stripe: Tile) -> Tensor:
        return self.block.stripe(stripe.columns, out=self.work.get("scores", stripe))

    def _exponent(self, scores: Tensor, part: Part) -> Tensor:
        return torch.mul(scores, self.omega, out=self.work.get("prior", part))

    def _over_texts(self, columns: slice) -> Tensor:
        """What makes h * the prior over texts of its exponentials, [columns]."""
        return (self.scale_t2a / self.prior_columns[columns]).to(self.block.dtype)

    def _over_audios(self, rows: slice) -> Tensor:
        """The same over audios, [rows, 1]."""
        return (self.scale_a2t / self.prior_rows[rows]).to(self.block.dtype)[:, None]

    def _t2a_logits(self, stripe: Tile) -> Tensor:
        scores = self._scores(stripe)
        prior = self.prior.along_columns(scores * self.omega, stripe)
        return scores.mul_(prior).mul_(self._over_texts(stripe.columns))

    def _a2t_logits(self, stripe: Tile) -> Tensor:
        scores = self._scores(stripe)
        for part in stripe.parts:
            own = stripe.of(scores, part)
            prior = self.prior.along_rows(self._exponent(own, part), part)
            own.mul_(prior).mul_(self._over_audios(part.rows))
        return scores

    def _sweep_texts(self) -> Tensor:
        """Sums of the prior and of t2a; the prior over texts is complete after the first pass over a stripe.

        Returns sum of target * logit of t2a over this rank's positives.
        """
        block, positive = self.block, zeros(self.block)
        self.prior_rows, self.rows = zeros(block, block.shape[0]), zeros(block, block.shape[0])
        self.prior_columns = zeros(block, block.shape[1])
        for stripe in self.stripes:
            products = self._scores(stripe)
            for part in stripe.parts:
                scores = stripe.of(products, part)
                along_rows, along_columns = self.prior.both(self._exponent(scores, part), part)
                self.prior_rows[part.rows] += along_rows.sum(1)
                self.prior_columns[part.columns] += along_columns.sum(0)
                scores.mul_(along_columns)
            over_texts = self._over_texts(stripe.columns)
            for part in stripe.parts:
                logits = stripe.of(products, part).mul_(over_texts)
                positive += (self.share_t2a[self.pairs.of(part)] * logits[self.pairs.within(part)]).sum()
                self.rows[part.rows] += self.t2a.along_rows(logits, part).sum(1)
        self.prior_rows, self.rows = block.sum(torch.stack([self.prior_rows, self.rows]))
        return positive

    def _sweep_audios(self) -> Tensor:
        """Sums of a2t and HR; returns sum of target * logit of a2t over this rank's positives."""
        block, positive = self.block, zeros(self.block)
        self.row_pull, self.columns = zeros(block, block.shape[0]), zeros(block, block.shape[1])
        for stripe in self.stripes:
            products = self._a2t_logits(stripe)
            for part in stripe.parts:
                logits, own = stripe.of(products, part), self.pairs.of(part)
                targets = self.share_a2t[own] * logits[self.pairs.within(part)]
                self.row_pull.index_add_(0, self.pairs.rows[own], targets, alpha=-1)
                positive += targets.sum()
                exponentials = self.a2t.along_columns(logits, part, out=self.work.get("prior", part))
                self.columns[part.columns] += exponentials.sum(0)
                logits.mul_(exponentials)
            weight = self.column_weight[stripe.columns] / self.columns[stripe.columns]
            self.row_pull += products @ weight.to(block.dtype)
        return positive

    def gradients(self, detached: bool) -> tuple[tuple[Tensor, ...], Tensor]:
        """(d L / d scores as the block's tensors receive it, d L / d log h)."""
        block, omega, work = self.block, self.omega, self.work
        gradients, pull = block.new_gradients(), self.local_pull
        row_factor = (self.row_weight / self.rows).to(block.dtype)[:, None]
        column_factor = (self.column_weight / self.columns).to(block.dtype)
        row_pull = (omega / self.scale_a2t * self.row_pull).to(block.dtype)[:, None]
        for stripe in self.stripes:
            columns = stripe.columns
            stripe_scores, stripe_texts = self._scores(stripe), work.get("over texts", stripe)
            column_pull, over_texts = torch.zeros_like(column_factor[columns]), self._over_texts(columns)
            for part in stripe.parts:
                scores, own, positives = stripe.of(stripe_scores, part), self.pairs.of(part), self.pairs.within(part)
                along_rows, along_columns = self.prior.both(self._exponent(scores, part), part)
                texts = torch.mul(along_columns, over_texts, out=stripe.of(stripe_texts, part))
                audios = along_rows.mul_(self._over_audios(part.rows))
                logits = torch.mul(texts, scores, out=work.get("logits", part))
                grad = self.t2a.along_rows(logits, part, out=work.get("gradient", part)).mul_(row_factor[part.rows])
                grad[positives] -= self.share_t2a[own].to(grad.dtype)
                column_pull += logits.mul_(grad).sum(0)
                grad_a2t = self.a2t.along_columns(torch.mul(audios, scores, out=logits), part)
                grad_a2t.mul_(column_factor[columns])
                grad_a2t[positives] -= self.share_a2t[own].to(grad.dtype)
                grad.mul_(texts).addcmul_(grad_a2t, audios)
                if detached:
                    scores.copy_(grad)
                else:
                    scores.mul_(omega).add_(1).mul_(grad).addcmul_(audios, row_pull[part.rows], value=-1)
            pull = pull + column_pull.sum().double()
            if not detached:
                stripe_scores.addcmul_(stripe_texts, column_pull / self.scale_t2a, value=-omega)
            block.add_gradient(gradients, columns, stripe_scores)
        return gradients, pull
