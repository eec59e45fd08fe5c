"""Prior-matrix-revised loss on score blocks: two sweeps forward, one backward.

The names follow docs/math/tiled_losses.md, section 4, which derives the gradient:

    E = exp(omega s),  k_j = sum_i E_ij,  r_i = sum_j E_ij,  P = E / k_j,  Q = E / r_i
    x = h_x s P,  X_i = sum_j exp x_ij,  gx = d loss / d x,  HC_j = sum_i gx_ij x_ij     (t2a)
    y = h_y s Q,  Y_j = sum_i exp y_ij,  gy = d loss / d y,  HR_i = sum_j gy_ij y_ij     (a2t)

with h_x = h_y = 1 / temperature, times the number of candidates if the prior is scaled by the batch.

Shape suffixes: B texts of the global batch, b audios of this rank, m rows and n columns of a tile, P positive pairs; a
stripe is [B, n].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atr_scale.losses.targets import Ids, Positives, PositivesMean
from atr_scale.losses.tiled.exponentials import (
    ConstantShift,
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
from atr_scale.losses.tiled.tiles import PairsByTile, Stripe, Tile, Workspace, stripes_of, tiles_of
from atr_scale.score_block import ScoreBlock


def pmr(
    block: ScoreBlock,
    temperature: float | Tensor,
    omega: float,
    positives: Ids | Positives | None = None,
    detach_prior: bool = False,
    scale_by_batch: bool = False,
    t2a_share: float = 0.5,
    positives_mean: PositivesMean = "queries",
    least_temperature: float | None = None,
) -> Tensor:
    """`dense.pmr` on a score block (arXiv 2303.05681, eq. 12-14 on the corrected axis).

    positives: (text ids [B, k], audio ids [b, k]) int64; a pair is positive if any column agrees.
    least_temperature: as of `nt_xent`.
    """
    candidates = (float(block.shape[0]), float(block.num_columns)) if scale_by_batch else (1.0, 1.0)
    pairs = Positives.of(block, positives, positives_mean)
    given = as_tensor(temperature, block)
    sweeps = _Sweeps(block, pairs, omega, inverse(given, block), candidates, t2a_share)
    loss: Tensor = _PMR.apply(sweeps, largest_inverse(given, least_temperature), detach_prior, given, *block.tensors)
    return loss


class _PMR(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, sweeps: _Sweeps, largest_h: float, detach_prior: bool, temperature: Tensor, *tensors: Tensor
    ) -> Tensor:
        parts = sweeps.loss(largest_h)
        ctx.sweeps, ctx.detach_prior = sweeps, detach_prior
        ctx.save_for_backward(temperature, *tensors)
        return both_directions(parts, sweeps.t2a_share, loss_dtype(sweeps.block, temperature))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        temperature, *_ = ctx.saved_tensors
        sweeps: _Sweeps = ctx.sweeps
        gradients, by_log_h = sweeps.gradients(ctx.detach_prior)
        return None, None, None, *input_gradients(grads[0], temperature, by_log_h, sweeps.block, gradients)


class _Sweeps:
    """The sweeps of one loss, and the state that the forward pass saves for the backward pass.

    w_t2a [B], w_a2t [b]: weights of the queries in the loss. T_t2a, T_a2t [P]: targets of the positive pairs, times
    the weight of their query. E_shift, x_shift, y_shift: of omega s, x and y before exp.
    k, Y [b] and r, X, HR [B]: see above, float64, rows over all ranks; HR_local: HR of this rank's columns alone.
    h_over_k [b], h_over_r [B, 1], w_over_X [B, 1], w_over_Y [b]: factors of the exponentials, in the scores' dtype.
    """

    E_shift: Shift
    x_shift: Shift
    y_shift: Shift
    k: Tensor
    r: Tensor
    X: Tensor
    Y: Tensor
    HR: Tensor
    HR_local: Tensor
    h_over_k: Tensor
    h_over_r: Tensor
    w_over_X: Tensor
    w_over_Y: Tensor

    def __init__(
        self,
        block: ScoreBlock,
        pairs: Positives,
        omega: float,
        h: Tensor,
        candidates: tuple[float, float],
        t2a_share: float,
    ) -> None:
        self.block, self.omega, self.candidates, self.t2a_share = block, omega, candidates, t2a_share
        self.h_x, self.h_y = (h * number for number in candidates)
        self.work = Workspace(block)
        self.stripes = stripes_of(block, times_smaller=2)  # up to six buffers of a tile's size are in use at once
        self.pairs = PairsByTile(pairs, tiles_of(self.stripes), block.device)
        of_text, of_audio = query_weights(block, t2a_share)
        row_share, column_share = pairs.shares()
        self.w_t2a = of_text * row_share * pairs.row_count
        self.w_a2t = of_audio * column_share * pairs.column_count
        self.T_t2a = of_text * row_share[self.pairs.rows]
        self.T_a2t = of_audio * column_share[self.pairs.columns]

    def loss(self, largest_h: float) -> Tensor:
        """The parts [2] of t2a and a2t in the loss of all ranks, float64; sweeps six times more if constant shifts lose
        sums.

        largest_h: 1 / temperature is never larger.
        """
        block, tiles = self.block, tiles_of(self.stripes)
        (bound,) = host_bounds(block, [block.bound() if block.largest is None else block.largest])
        self.E_shift = ConstantShift(abs(self.omega) * bound, block.dtype)
        self.x_shift = self.y_shift = ConstantShift(largest_h * bound, block.dtype)
        positive_logits = self._sweep_t2a(), self._sweep_a2t()
        largest = [abs(self.omega) * bound, largest_h * max(self.candidates) * bound]
        if not no_sum_is_lost(block, largest) and not all_in_range(block, self.r, self.k, self.X, self.Y):
            self.E_shift = MaximaShift(block, tiles, lambda tile: self.omega * self._s(tile))
            self._sweep_t2a()  # k and r under the new shift, which x and y need
            self.x_shift = MaximaShift(block, tiles, lambda tile: self._x(self._s(tile), tile))
            self.y_shift = MaximaShift(block, tiles, lambda tile: self._y(self._s(tile), tile))
            positive_logits = self._sweep_t2a(), self._sweep_a2t()
        self.work.clear()
        from_rows = (self.w_t2a * log_sums(self.X, self.x_shift.rows)).sum()
        from_columns = (self.w_a2t * log_sums(self.Y, self.y_shift.columns)).sum()
        of_t2a, of_a2t = block.sum(torch.stack([-positive_logits[0], from_columns - positive_logits[1]]))
        return torch.stack([from_rows + of_t2a, of_a2t])

    def _sweep_t2a(self) -> Tensor:
        """Computes k, r and X. Returns sum T_ij x_ij over this rank's positive pairs."""
        block, work, dtype = self.block, self.work, self.block.dtype
        work.start_sweep()
        self.k, self.r, self.X = (zeros(block, block.shape[axis]) for axis in (1, 0, 0))
        self.h_over_k = torch.empty(block.shape[1], dtype=dtype, device=block.device)
        positive_logits = zeros(block)
        for stripe in self.stripes:
            s, E_stripe = self._s(stripe), work.get("E", stripe)
            for tile in stripe.tiles:
                E = self.E_shift.both(s[tile.rows], tile, E_stripe[tile.rows], self.omega)
                self.r[tile.rows] += E.by_row.sum(1)
                self.k[tile.columns] += E.by_column.sum(0)
            self.h_over_k[stripe.columns] = (self.h_x / self.k[stripe.columns]).to(dtype)
            for tile in stripe.tiles:  # k of the stripe is complete
                x = _revised(E_stripe[tile.rows], self.h_over_k[tile.columns], s[tile.rows], work.get("x", tile))
                positive_logits += (self.T_t2a[self.pairs.of(tile)] * x[self.pairs.within(tile)]).sum()
                self.X[tile.rows] += self.x_shift.by_row(x, tile, work.get("exp x", tile)).sum(1)
        self.r, self.X = block.sum(torch.stack([self.r, self.X]))
        self.h_over_r = (self.h_y / self.r).to(dtype)[:, None]
        self.w_over_X = (self.w_t2a / self.X).to(dtype)[:, None]
        return positive_logits

    def _sweep_a2t(self) -> Tensor:
        """Computes Y and HR. Returns sum T'_ij y_ij over this rank's positive pairs."""
        block, work, dtype = self.block, self.work, self.block.dtype
        work.start_sweep()
        self.Y, self.HR_local = zeros(block, block.shape[1]), zeros(block, block.shape[0])
        self.w_over_Y = torch.empty(block.shape[1], dtype=dtype, device=block.device)
        positive_logits = zeros(block)
        for stripe in self.stripes:
            s, y_exp_y = self._s(stripe), work.get("y exp y", stripe)
            for tile in stripe.tiles:
                y, own = self._y(s[tile.rows], tile), self.pairs.of(tile)
                Ty = self.T_a2t[own] * y[self.pairs.within(tile)]
                positive_logits += Ty.sum()
                self.HR_local.index_add_(0, self.pairs.rows[own], Ty, alpha=-1)
                exp_y = self.y_shift.by_column(y, tile, work.get("exp y", tile))
                self.Y[tile.columns] += exp_y.sum(0)
                torch.mul(y, exp_y, out=y_exp_y[tile.rows])
            self.w_over_Y[stripe.columns] = (self.w_a2t[stripe.columns] / self.Y[stripe.columns]).to(dtype)
            self.HR_local += y_exp_y @ self.w_over_Y[stripe.columns]  # HR_i = sum_j (w'_j exp y_ij / Y_j - T'_ij) y_ij
        self.HR = block.sum(self.HR_local)
        return positive_logits

    def gradients(self, detach_prior: bool) -> tuple[tuple[Tensor, ...], Tensor]:
        """(d loss / d s as the block's tensors receive it, d loss / d log h of this rank's columns).

        d loss / d s = (1 + omega s) (gx h_x P + gy h_y Q) - omega (Q HR_i + P HC_j), without the terms in omega if the
        prior is detached.
        """
        block, work, omega = self.block, self.work, 0.0 if detach_prior else self.omega
        work.start_sweep()
        gradients, by_log_h = block.new_gradients(), self.HR_local.sum()
        HR_factor = (omega / self.h_y * self.HR).to(block.dtype)[:, None]  # of h_y Q
        for stripe in self.stripes:
            hP_stripe, gradient_stripe = work.get("h_x P", stripe), work.get("gradient", stripe)
            HC = torch.zeros(stripe.shape[1], dtype=block.dtype, device=block.device)
            for tile in stripe.tiles:
                s, rows = self._s(tile), tile.rows
                E = self.E_shift.both(s, tile, work.get("E", tile), self.omega)
                hP = torch.mul(E.by_column, self.h_over_k[tile.columns], out=hP_stripe[rows])
                x = torch.mul(hP, s, out=work.get("x or y", tile))
                gx = self._gx(x, tile, work.get("gx or gy", tile))
                HC += torch.mul(gx, x, out=work.get("gx x", tile)).sum(0)
                gradient = torch.mul(gx, hP, out=gradient_stripe[rows])  # gx h_x P
                hQ = torch.mul(E.by_row, self.h_over_r[rows], out=work.get("h_y Q", tile))
                y = torch.mul(hQ, s, out=work.get("x or y", tile))
                gy = self._gy(y, tile, work.get("gx or gy", tile))
                gradient.addcmul_(gy, hQ)  # + gy h_y Q
                if omega:
                    gradient.addcmul_(gradient, s, value=omega)  # times 1 + omega s
                    gradient.addcmul_(hQ, HR_factor[rows], value=-1)  # - omega Q HR_i
            if omega:
                gradient_stripe.addcmul_(hP_stripe, omega / self.h_x * HC, value=-1)  # - omega P HC_j
            by_log_h = by_log_h + HC.sum().double()
            block.add_gradient(gradients, stripe.columns, gradient_stripe)
        return gradients, by_log_h

    def _s(self, place: Tile | Stripe) -> Tensor:
        return self.block.stripe(place.columns, place.rows, out=self.work.get("s", place))

    def _x(self, s: Tensor, tile: Tile) -> Tensor:
        E = self.E_shift.by_column(s, tile, self.work.get("E", tile), self.omega)
        return _revised(E, self.h_over_k[tile.columns], s, self.work.get("x", tile))

    def _y(self, s: Tensor, tile: Tile) -> Tensor:
        E = self.E_shift.by_row(s, tile, self.work.get("E", tile), self.omega)
        return _revised(E, self.h_over_r[tile.rows], s, self.work.get("y", tile))

    def _gx(self, x: Tensor, tile: Tile, out: Tensor) -> Tensor:
        """w_i exp(x_ij) / X_i - T_ij."""
        gx = self.x_shift.by_row(x, tile, out).mul_(self.w_over_X[tile.rows])
        gx[self.pairs.within(tile)] -= self.T_t2a[self.pairs.of(tile)].to(gx.dtype)
        return gx

    def _gy(self, y: Tensor, tile: Tile, out: Tensor) -> Tensor:
        """w'_j exp(y_ij) / Y_j - T'_ij."""
        gy = self.y_shift.by_column(y, tile, out).mul_(self.w_over_Y[tile.columns])
        gy[self.pairs.within(tile)] -= self.T_a2t[self.pairs.of(tile)].to(gy.dtype)
        return gy


def _revised(E: Tensor, factor: Tensor, s: Tensor, out: Tensor) -> Tensor:
    """Logits x or y in `out`, multiplied in the order of the backward pass.

    The last bits of a large logit change its exponential by much more, which must be the one that X or Y adds up.
    """
    return torch.mul(E, factor, out=out).mul_(s)
