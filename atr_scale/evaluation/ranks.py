"""Exact retrieval ranks and best-k lists of a dual encoder, without the score matrix.

Shape suffixes: T texts, A audios, Q queries, I items (candidates of a query), d width, n lines of a tile, p pairs.

Scores are computed in tiles, in float32. A margin, which docs/math/ranks.md derives, bounds how far such a score lies
from the exact one. A pair whose tile score is within the margin of the score it is compared with is scored again in
float64. So neither the tile size nor the number of processes changes a rank.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atr_scale.distributed.world import World
from atr_scale.errors import UserError
from atr_scale.evaluation.metrics import Ids, Ranks, as_int64, positions, rounds
from atr_scale.score_block import ALL, at_least_fp32

ROWS, COLUMNS = 1024, 2048  # a product of this size is fast, and the tile stays in the cache
SCORES = 1 << 24  # scores of a stripe of `best_items`
BLOCK = 64  # items represented by their maximum in `best_items`, at most
FEW = 128  # if more than 1 / FEW of the pairs are undecided, one float64 product is faster than the single pairs
PAIRS = 256  # pairs scored at once on a CPU: their embeddings stay in the cache
ORDINARY = 2.0**20  # embeddings are scaled for float32 if their largest norm is not between this and its inverse
T2A, A2T = 0, 1


def embedding_ranks(
    text: Tensor, audio: Tensor, text_audio_ids: Ids, audio_ids: Ids, world: World | None = None
) -> Ranks:
    """Ranks of the exact scores text @ audio.T, as `metrics.ranks` defines them for a score matrix.

    text [T, d] and audio [A, d], float, on one device; ids as in `metrics.ranks`. Scores that float64 cannot tell apart
    are equal. All processes of `world` call this with the same arguments, divide the texts among them and get all
    ranks. Raises UserError like `metrics.ranks`, and if an embedding is not finite.
    """
    world = world or World()
    clips = as_int64(audio_ids)
    clip = positions(as_int64(text_audio_ids), clips)
    counter = _Counter(_Products(text, audio), clip)
    with ieee_products():
        before = counter.count(range(world.rank * ROWS, len(text), world.size * ROWS))
    if world.size > 1:
        before = world.sum(before.to(world.device))
    t2a, a2t = (1 + before).cpu().numpy()
    return Ranks(t2a=t2a, a2t=a2t, clip=clip, audio_ids=clips)


def best_items(queries: Tensor, items: Tensor, k: int) -> Tensor:
    """[Q, min(k, I)] int64: the items with the highest exact scores of each query, best first.

    queries [Q, d] and items [I, d], float, on one device. Scores are compared in multiples of the tie of their query
    (docs/math/ranks.md), and of equal ones the lower index comes first. Equal embeddings always have equal scores.
    Raises UserError if an embedding is not finite.
    """
    k = min(k, len(items))
    if len(queries) == 0:  # of a process that has no query to re-rank
        return torch.empty(0, k, dtype=torch.int64, device=queries.device)
    products = _Products(queries, items)
    with ieee_products():
        stripes = torch.arange(len(queries), device=queries.device).split(max(1, SCORES // len(items)))
        return torch.cat([_best(products, rows, k) for rows in stripes])


@contextmanager
def ieee_products() -> Iterator[None]:
    """Matrix products of float32 are computed in float32, whatever the process allows (TF32 on GPUs, bf16 on CPUs)."""
    torch_backends: Any = torch.backends
    backends = torch_backends.cuda.matmul, torch_backends.mkldnn.matmul
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


class _Products:
    """Scores of two sets of embeddings, in float32 and in float64.

    ties, margins: float64 ([Q], [I]), for the scores of each query with all items and of each item with all queries.
    Two scores that differ by no more than `ties` are equal, because rounding in float64 can make this difference. No
    tile lies further from `factor` times the float64 scores than `factor` times `margins`. docs/math/ranks.md derives
    both.
    """

    def __init__(self, queries: Tensor, items: Tensor) -> None:
        self.queries, self.items = (at_least_fp32(side.detach()) for side in (queries, items))
        width, norms = queries.shape[1], (_norms(self.queries), _norms(self.items))
        factors = [_factor(norm) for norm in norms]
        self.coarse = [_scaled(side, factor) for side, factor in zip((self.queries, self.items), factors, strict=True)]
        self.factor = factors[0] * factors[1]
        largest = norms[0] * norms[1].max(), norms[1] * norms[0].max()  # no score is larger
        self.ties = [(width * 2.0**-51 * bound).clamp(min=2.0**-1000) for bound in largest]  # positive for zeros too
        roundings = (width + 3) * 2.0**-24
        relative, underflow = roundings / (1 - roundings), width * 2.0**-100 / self.factor
        self.margins = [relative * bound + tie + underflow for bound, tie in zip(largest, self.ties, strict=True)]

    def tile(self, queries: slice | Tensor, items: slice) -> Tensor:
        """[Q, I] float32: `factor` times the scores of some queries and items."""
        return self.coarse[0][queries] @ self.coarse[1][items].T

    @cached_property
    def distinct_items(self) -> tuple[Tensor, Tensor]:
        """(different items float64, index of each item among them [I]): a product may round equal rows differently."""
        items, index = self.items.unique(dim=0, return_inverse=True)
        return items.double(), index

    def pairs(self, queries: Tensor, items: Tensor) -> Tensor:
        """[p] float64 scores of query queries[k] and item items[k]."""
        return _dot(self.queries, self.items, queries, items)


class _Counter:
    """Counts, for each text, the candidates that come before the right one in both directions.

    The query of text i is the text itself in T2A, and its clip in A2T. The right candidate is the clip, or the text.
    """

    def __init__(self, products: _Products, clip: NDArray[np.int64]) -> None:
        self.products = products
        device = products.queries.device
        self.clip = torch.from_numpy(clip).to(device)
        self.texts = torch.arange(len(clip), device=device)
        self.own = products.pairs(self.texts, self.clip)
        self.tie = products.ties[0], products.ties[1][self.clip]
        reach = products.margins[0] + self.tie[0], products.margins[1][self.clip] + self.tie[1]
        # Rounding is monotone, so a float32 score compares with a rounded threshold as with the threshold itself.
        self.low, self.high = ([((self.own + sign * r) * products.factor).float() for r in reach] for sign in (-1, 1))
        # A round holds at most one caption of each clip, in the order of the clips: a tile's column is used once.
        edges = np.arange(0, len(products.items) + COLUMNS, COLUMNS)
        self.rounds = [
            (torch.from_numpy(texts).to(device), np.searchsorted(clip[texts], edges).tolist()) for texts in rounds(clip)
        ]

    def count(self, stripes: range) -> Tensor:
        """[2, T] int64: how many candidates of the texts' stripes come before, in T2A and in A2T."""
        before = torch.zeros(2, len(self.texts), dtype=torch.int64, device=self.own.device)
        for row in stripes:
            for column in range(0, len(self.products.items), COLUMNS):
                self._add_tile(before, row, column)
        return before

    def _add_tile(self, before: Tensor, row: int, column: int) -> None:
        rows = slice(row, row + ROWS)
        tile = self.products.tile(rows, slice(column, column + COLUMNS))
        before[T2A, rows] += self._before(T2A, self.texts[rows], tile, column)
        for texts, edges in self.rounds:
            some = texts[slice(*edges[column // COLUMNS :][:2])]
            if len(some):
                part = tile if len(some) == tile.shape[1] else tile[:, self.clip[some] - column]
                before[A2T, some] += self._before(A2T, some, part.T, row)

    def _before(self, direction: int, texts: Tensor, scores: Tensor, first: int) -> Tensor:
        """[n]: how many of the candidates first, first + 1, ... come before the right one of n texts.

        scores: float32 [n, candidates], one line for each text.
        """
        before = torch.zeros_like(texts)
        undecided = _compare(operator.ge, scores, self.low[direction][texts])
        if _total(undecided) > scores.numel() // FEW // 8:
            above = _compare(operator.gt, scores, self.high[direction][texts])
            before, undecided = _count(above), undecided ^ above
            if _total(undecided) > scores.numel() // FEW:
                return self._before_in_float64(direction, texts, slice(first, first + scores.shape[1]))
        line, candidate = _places(undecided)
        candidate += first
        query = (texts, self.clip[texts])[direction][line]
        pairs = self.products.pairs(*((query, candidate) if direction == T2A else (candidate, query)))
        found = line[self._comes_before(direction, texts[line], pairs, candidate)]
        return before + torch.bincount(found, minlength=len(texts))

    def _before_in_float64(self, direction: int, texts: Tensor, candidates: slice) -> Tensor:
        """[n]: the same, every pair scored in float64."""
        queries, items = self.products.queries, self.products.items
        lines, others = (queries[texts], items) if direction == T2A else (items[self.clip[texts]], queries)
        scores = lines.double() @ others[candidates].double().T
        index = torch.arange(candidates.start, candidates.start + scores.shape[1], device=scores.device)
        return self._comes_before(direction, texts[:, None], scores, index).sum(1)

    def _comes_before(self, direction: int, texts: Tensor, scores: Tensor, candidate: Tensor) -> Tensor:
        """Whether candidates with these float64 scores come before the right ones of the texts; shapes broadcast."""
        own, tie, right = self.own[texts], self.tie[direction][texts], (self.clip[texts], texts)[direction]
        return (scores > own + tie) | ((scores >= own - tie) & (candidate < right))


def _best(products: _Products, rows: Tensor, k: int) -> Tensor:
    """[n, k] best items of these queries."""
    num_items = len(products.items)
    size = min(BLOCK, num_items // (4 * k))
    if size == 0:
        return _best_in_float64(products, rows, k)
    scores = products.tile(rows, ALL)
    # k blocks have a maximum of at least the k-th largest one, so k items have a float32 score of at least that.
    best_of_blocks = scores[:, : num_items // size * size].unflatten(1, (size, -1)).amax(1)
    kth = best_of_blocks.topk(k).values[:, -1].double()
    ties, margins = products.ties[0][rows], products.margins[0][rows]
    possible = _compare(operator.ge, scores, (kth - (2 * margins + ties) * products.factor).float())
    found = _count(possible)
    many = found > max(2 * k, num_items // FEW)
    possible[many] = False
    line, item = _places(possible)
    on_grid = (products.pairs(rows[line], item) / ties[line]).round()
    order = torch.sort(on_grid, descending=True, stable=True).indices
    order = order[torch.sort(line[order], stable=True).indices]
    found = found[~many]
    first = found.cumsum(0) - found
    best = rows.new_empty(len(rows), k)
    best[~many] = item[order][first[:, None] + torch.arange(k, device=item.device)]
    if many.any():
        best[many] = _best_in_float64(products, rows[many], k)
    return best


def _best_in_float64(products: _Products, rows: Tensor, k: int) -> Tensor:
    """[n, k]: the same, every pair scored in float64."""
    items, index = products.distinct_items
    best = []
    for part in rows.split(max(1, SCORES // 8 // len(index))):
        on_grid = (products.queries[part].double() @ items.T / products.ties[0][part, None]).round()[:, index]
        best.append(torch.sort(on_grid, dim=1, descending=True, stable=True).indices[:, :k])
    return torch.cat(best)


def _norms(embeddings: Tensor) -> Tensor:
    """[n] float64."""
    rows = torch.arange(len(embeddings), device=embeddings.device)
    norms = _dot(embeddings, embeddings, rows, rows).sqrt()
    if not norms.isfinite().all():
        raise UserError(
            "retrieval scores: embeddings are not finite, the model has diverged; evaluate an earlier checkpoint"
        )
    return norms


def _factor(norms: Tensor) -> float:
    """A power of two, by which a product changes no order. It prevents overflow and underflow in float32."""
    largest = float(norms.max())
    return 1.0 if largest == 0 or 1 / ORDINARY <= largest <= ORDINARY else 2.0 ** -math.frexp(largest)[1]


def _scaled(embeddings: Tensor, factor: float) -> Tensor:
    """float32; without a copy if nothing changes."""
    return embeddings.float() if factor == 1 else (embeddings.double() * factor).float()


def _dot(left: Tensor, right: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """[p] float64: left[rows] . right[columns]; the same for equal vectors, at whatever place."""
    size = 1 << 16 if left.is_cuda else PAIRS
    parts = zip(rows.split(size), columns.split(size), strict=True)
    return torch.cat([(left[r].double() * right[c].double()).sum(1) for r, c in parts])


def _fast(values: Tensor) -> Any:
    """On a CPU a numpy array, because numpy compares and counts several times faster than torch."""
    return values if values.is_cuda else values.numpy()


def _compare(how: Callable[[Any, Any], Any], scores: Tensor, threshold: Tensor) -> Tensor:
    """[n, m] bool: scores [n, m] `how` threshold [n], in the memory layout of scores."""
    return torch.as_tensor(how(_fast(scores), _fast(threshold)[:, None]))


def _count(mask: Tensor) -> Tensor:
    """[n] int64: true values of each line of mask [n, m]."""
    return torch.as_tensor(_fast(mask).sum(1))


def _total(mask: Tensor) -> int:
    """Number of true values."""
    return int(mask.sum() if mask.is_cuda else np.count_nonzero(mask.numpy()))


def _places(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Line and column of every true value of mask [n, m], in the order of its memory."""
    if mask.stride(0) < mask.stride(1):
        columns, lines = _places(mask.T)
        return lines, columns
    found = mask.flatten().nonzero().squeeze(1) if mask.is_cuda else torch.from_numpy(np.flatnonzero(mask.numpy()))
    return found // mask.shape[1], found % mask.shape[1]
