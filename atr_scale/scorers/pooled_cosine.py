"""The cosine of a caption and the vector that it pools from a clip, from forms of the attention's weights w.

docs/math/text_aware_pooling.md derives all formulas; names here are the symbols there. Everything is [i, j], a number
for each caption i and clip j, except `offsets` [i, 2] and `constants` [4].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

EPS = 1e-5  # inside every LayerNorm
SHORTEST = 1e-12  # lower bound of a vector's length, as in torch.nn.functional.normalize


class Forms(NamedTuple):
    """Forms of w. Those in brackets belong to a residual block."""

    dot: Tensor  # w . X n
    quadratic: tuple[Tensor, ...]  # w' G w: q_1 and q_2 (and q_3)
    linear: tuple[Tensor, ...]  # w . l: l_0 (and l_1, l_2)


class FormGradients(NamedTuple):
    """c = d loss / d dot, and the derivatives by the other forms, divided by c."""

    c: Tensor
    quadratic: tuple[Tensor, ...]
    linear: tuple[Tensor, ...]

    def mean(self, forms: Forms) -> Tensor:
        """The mean under w of d loss / d w, divided by c: by Euler's theorem, a sum over forms."""
        mean = forms.dot.clone()
        for rho, q in zip(self.quadratic, forms.quadratic, strict=True):
            mean.addcmul_(rho, q, value=2)
        for rho, along in zip(self.linear, forms.linear, strict=True):
            mean.addcmul_(rho, along)
        return mean


class _Cosine(NamedTuple):
    score: Tensor
    R: Tensor  # one over the deviation of the last LayerNorm
    h: Tensor  # half the derivative by R of the squared length
    t: Tensor  # one over the length


def cosines(dim: int, forms: Forms, offsets: Tensor, constants: Tensor) -> Tensor:
    """Scores, with the EPS of every LayerNorm. dim: D."""
    return _cosine(dim, _last_forms(dim, forms, offsets, constants)[0], offsets, constants).score


def gradients(
    dim: int, forms: Forms, offsets: Tensor, constants: Tensor, by_scores: Tensor
) -> tuple[FormGradients, Tensor, Tensor]:
    """Gradients of the forms, of `offsets` and of `constants`, from that of the scores."""
    last, r = _last_forms(dim, forms, offsets, constants)
    score, R, h, t = _cosine(dim, last, offsets, constants)
    kappa = (score * t).masked_fill_(t >= 1 / SHORTEST, 0)  # the shortest length is constant
    by_numerator = by_scores * t
    c = by_numerator * R
    rho_1 = torch.addcmul(last.dot, kappa, h, value=-1) * R.square() * (-0.5 / dim)
    rho_2, rho_l = kappa * R * -0.5, -kappa
    by_shift, by_shift_shift = by_numerator.sum(1), (by_numerator * kappa).sum() * -0.5
    if r is None:
        found = FormGradients(c, (rho_1, rho_2), (rho_l,))
        return found, pad(by_shift.unsqueeze(1), (1, 0)), pad(by_shift_shift.view(1), (3, 0))
    (q_1, q_2, _), (l_0, l_1, l_2) = forms.quadratic, forms.linear
    by_r = forms.dot + 2 * rho_1 * (r * q_1 + l_1) + 2 * rho_2 * (r * q_2 + l_2) + rho_l * l_0
    rho_3 = by_r * r.square() * (-0.5 / dim)
    found = FormGradients(c * r, (rho_1 * r, rho_2 * r, rho_3), (rho_l, 2 * rho_1, 2 * rho_2))
    by_constants = torch.stack([*((c * rho).sum() for rho in (rho_1, rho_2, rho_l)), by_shift_shift])
    return found, torch.stack([c.sum(1), by_shift], 1), by_constants


def _last_forms(dim: int, forms: Forms, offsets: Tensor, constants: Tensor) -> tuple[Forms, Tensor | None]:
    """The forms of the last LayerNorm's input, and a residual block's factor r."""
    if len(forms.quadratic) == 2:
        return forms, None
    (q_1, q_2, q_3), (l_0, l_1, l_2) = forms.quadratic, forms.linear
    uu, scaled_uu, u_shift, _ = constants
    r = (q_3 / dim + EPS).rsqrt()
    last = Forms(
        r * forms.dot + offsets[:, :1],
        (r * (r * q_1 + 2 * l_1) + uu, r * (r * q_2 + 2 * l_2) + scaled_uu),
        (r * l_0 + u_shift,),
    )
    return last, r


def _cosine(dim: int, forms: Forms, offsets: Tensor, constants: Tensor) -> _Cosine:
    (q_1, q_2), (l_0,) = forms.quadratic, forms.linear
    R = (q_1 / dim + EPS).rsqrt()
    h = torch.addcmul(l_0, R, q_2)
    t = torch.addcmul(constants[3], R, h + l_0).clamp(min=SHORTEST**2).rsqrt()
    return _Cosine(torch.addcmul(offsets[:, 1:], R, forms.dot) * t, R, h, t)
