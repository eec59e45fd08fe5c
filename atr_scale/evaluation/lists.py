"""Result lists of vectors without a score matrix: coarse scores choose, exact ones order.

Shape suffixes: Q queries, I items, d width, k places of a list.

k blocks of items with a score of at least s hold k such items, so what lies further than two margins below s is no item
of the list. The few others are scored exactly and sorted.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from atr_scale.evaluation.coarse import (
    AT_LEAST,
    Coarse,
    Precision,
    compare,
    exact_block,
    exact_pairs,
    levels,
    places,
    tie,
)

SCORES = 1 << 24  # coarse scores at once
BLOCK = 64  # items that their best score stands for, at most
FEW = 64  # where more than 1 / FEW of the items are possible, all are computed again, more finely


def nearest(queries: Tensor, items: Tensor, k: int, precision: Precision = "fp32") -> Tensor:
    """[Q, k] int64 (k at most I): the best items of each query by exact scores, best first, the lower index first among
    equal ones, which are those that float64 cannot tell apart.

    queries [Q, d], items [I, d] on one device. precision: of the products that choose; any gives the same lists.
    """
    k = min(k, len(items))
    if len(queries) == 0:
        return torch.empty(0, k, dtype=torch.int64, device=queries.device)
    coarse, step = levels(queries, items, precision), tie(queries, items)
    stripe = max(1, SCORES // len(items))
    out = coarse[0].sides[0].new_empty(min(stripe, len(queries)) * len(items))
    rows = torch.arange(len(queries), device=queries.device).split(stripe)
    return torch.cat([_best(coarse, queries, items, some, k, step, out) for some in rows])


def _best(
    coarse: list[Coarse], queries: Tensor, items: Tensor, rows: Tensor, k: int, step: float, out: Tensor | None = None
) -> Tensor:
    """[n, k] of these rows; `coarse` are the precisions left to try, `out` is memory for the first one's products."""
    size = min(BLOCK, len(items) // (4 * k))
    if not coarse or not size:
        scores = (exact_block(queries[rows], items) / step).round()
        return torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :k]
    products = coarse[0].product(coarse[0].sides[0][rows], coarse[0].sides[1], out)
    best_of_blocks = products[:, : len(items) // size * size].unflatten(1, (size, -1)).amax(1)
    low = coarse[0].reach(best_of_blocks.topk(k).values[:, -1], coarse[0].margins[0][rows] + step)
    possible = torch.empty_like(products, dtype=torch.bool)
    compare(AT_LEAST, products, low[:, None], possible)
    found = count_rows(possible)
    many = found > max(2 * k, len(items) // FEW)
    possible[many] = False
    line, item = places(possible)
    scores = (exact_pairs(queries, items, rows[line], item) / step).round()
    order = torch.sort(scores, descending=True, stable=True).indices
    order = order[torch.sort(line[order], stable=True).indices]
    found = found[~many]
    start = found.cumsum(0) - found
    lists = line.new_empty(len(rows), k)
    lists[~many] = item[order][start[:, None] + torch.arange(k, device=item.device)]
    if many.any():
        lists[many] = _best(coarse[1:], queries, items, rows[many], k, step)
    return lists


def count_rows(mask: Tensor) -> Tensor:
    """[Q] int64: true values of each row."""
    if mask.is_cuda:
        return mask.sum(1)
    return torch.from_numpy(np.fromiter(map(np.count_nonzero, mask.numpy()), np.int64, len(mask)))
