"""Scores in the precision that tiles are computed in, how far they lie from the exact ones, and the exact ones.

Shape suffixes: T texts, A audios, Q queries and I items (one side each), d width, p pairs.

With t' and a' the rounded vectors, |t.a - t'.a'| <= |t - t'| |a| + |t'| |a - a'| (Cauchy-Schwarz), and d additions
lose at most d u |t'| |a'|. The norms are those of the vectors at hand: for unit vectors of d = 512 a margin is 6e-5 in
float32 and 3e-3 in bfloat16. A score further than its margin from a threshold lies on the same side of it exactly;
what a product is rounded to at its end moves no score over a threshold that is rounded the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.linalg import vector_norm

Precision = Literal["fp32", "bf16"]
LEVELS = {"fp32": (torch.float32,), "bf16": (torch.bfloat16, torch.float32)}
GREATER: tuple[Any, Callable] = np.greater, torch.gt
AT_LEAST: tuple[Any, Callable] = np.greater_equal, torch.ge
# What an addition loses. Matrix units cut off where processors round, hence more for bfloat16.
LOST = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-21}
CHUNK = 256  # pairs or rows in float64 at once, they stay in the cache
UNDERFLOW = 1e-16  # what products of numbers below 1e-20 can lose


class Coarse:
    """Products of two sides in one dtype.

    sides: text [T, d], audio [A, d] in that dtype. margins: float64 [T], [A]: no product of this row (with whatever row
    of the other side) is further from the exact score.
    """

    def __init__(self, text: Tensor, audio: Tensor, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.sides = text.to(dtype), audio.to(dtype)
        text_norms, audio_norms = (_norms(*pair) for pair in zip((text, audio), self.sides, strict=True))
        lost = text.shape[1] * LOST[dtype]
        self.margins = _margins(text_norms, audio_norms, lost), _margins(audio_norms, text_norms, lost)

    def product(self, queries: Tensor, items: Tensor, out: Tensor | None = None) -> Tensor:
        """[Q, I] of rows of the sides, to compare with `thresholds`; `out`: memory for it, of `dtype`."""
        if self.dtype == torch.bfloat16 and queries.is_cuda:
            return torch.mm(queries, items.T, out_dtype=torch.float32)
        if out is not None:
            out = out.flatten()[: len(queries) * len(items)].view(len(queries), len(items))
        product = torch.mm(queries, items.T, out=out)
        # The bits of positive numbers are ordered as the numbers are, and compared faster.
        return product.view(torch.int16) if self.dtype == torch.bfloat16 else product

    def thresholds(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """What products are compared with, for low and high float64: one that was at least `low` before it was rounded
        at its end is at least the first, one that is greater than the second was greater than `high`."""
        if self.dtype == torch.bfloat16 and not low.is_cuda:
            low, high = low.to(self.dtype), high.to(self.dtype)
            everything = torch.iinfo(torch.int16).min  # bits of negative numbers are not ordered
            low_bits = low.view(torch.int16).masked_fill(low <= 0, everything)
            return low_bits, high.view(torch.int16).clamp(min=0)
        return low.float(), high.float()

    def reach(self, products: Tensor, margins: Tensor) -> Tensor:
        """[n]: where k products of a line are at least `products` [n], those of its k best exact scores are at least
        this; margins float64 [n]."""
        bits = products.dtype == torch.int16
        scores = (products.view(torch.bfloat16) if bits else products).double()
        rounded = scores.abs() * torch.finfo(torch.bfloat16 if bits else torch.float32).eps / 2
        return self.thresholds(*[scores - rounded - 2 * margins] * 2)[0]


def levels(text: Tensor, audio: Tensor, precision: Precision) -> list[Coarse]:
    """Coarse products of all rows of two sides, coarsest first, down to float32."""
    return [Coarse(text, audio, dtype) for dtype in LEVELS[precision]]


def exact_pairs(left: Tensor, right: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """float64 [p]: left[rows] . right[columns]; of equal vectors equal, whatever stands beside them."""
    size = 1 << 16 if left.is_cuda else CHUNK
    parts = zip(rows.split(size), columns.split(size), strict=True)
    return torch.cat([(left[r].double() * right[c].double()).sum(1) for r, c in parts])


def exact_block(queries: Tensor, items: Tensor) -> Tensor:
    """float64 [Q, I]"""
    return queries.double() @ items.double().T


def tie(text: Tensor, audio: Tensor) -> float:
    """Scores that lie no further apart are equal: float64 cannot tell them apart."""
    largest = [float(vector_norm(side, dim=1).max()) for side in (text, audio)]
    return text.shape[1] * 2.0**-51 * largest[0] * largest[1] + UNDERFLOW


def _norms(exact: Tensor, rounded: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """float64 [n] each: of the vectors, of the rounded ones, of their difference; none too small."""
    chunks = zip(exact.split(CHUNK), rounded.split(CHUNK), strict=True)
    parts = [[vector_norm(z, dim=1, dtype=exact.dtype) for z in (x, y, x - y)] for x, y in chunks]
    not_lost = 1 + exact.shape[1] * LOST[torch.float32]  # the norms are rounded too
    whole, coarse, difference = (torch.cat(part).double() * not_lost for part in zip(*parts, strict=True))
    return whole, coarse, difference


def _margins(own: tuple[Tensor, Tensor, Tensor], other: tuple[Tensor, Tensor, Tensor], lost: float) -> Tensor:
    _, coarse, difference = own
    other_whole, other_coarse, other_difference = (norms.max() for norms in other)
    return difference * other_whole + coarse * other_difference + lost * coarse * other_coarse + UNDERFLOW


def compare(how: tuple[Any, Callable], scores: Tensor, threshold: Tensor, out: Tensor) -> None:
    """out = scores `how` threshold, GREATER or AT_LEAST."""
    if scores.is_cuda:
        how[1](scores, threshold, out=out)
    else:  # numpy compares several times faster than torch
        how[0](scores.numpy(), threshold.numpy(), out=out.numpy())


def places(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of every true value of a matrix, in order."""
    if mask.is_cuda:
        rows, columns = mask.nonzero(as_tuple=True)
        return rows, columns
    found = np.flatnonzero(mask.numpy())  # here too
    return torch.from_numpy(found // mask.shape[1]), torch.from_numpy(found % mask.shape[1])
