"""Which samples form global batch k: a pure function of the seed, independent of ranks and workers.

Position p of the endless sample stream belongs to one corpus of the mixture and is the n-th visit to that corpus. Visit
n belongs to epoch n // size of the corpus and follows that epoch's permutation. So the last samples of an epoch and the
first of the next can share a batch, and any batch can be computed without those before it, which makes it possible to
resume exactly, also on another number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: p * _GOLDEN mod 2^64 spreads evenly for every prefix
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Rows:
    """Samples of one batch, in order: number of the corpus, index in the corpus, position in the stream; each [n]."""

    source: np.ndarray
    index: np.ndarray
    position: np.ndarray

    def __getitem__(self, rows: slice) -> Rows:
        return Rows(self.source[rows], self.index[rows], self.position[rows])


class SampleOrder:
    """The seeded order in which the corpora of a mixture are visited.

    sizes: samples of each corpus. weights: relative frequencies of the corpora, by default their sizes. window and
    block: first blocks of `block` neighbouring samples are permuted, then single samples within windows of `window`, so
    that samples that are read together lie near each other.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        batch_size: int,
        *,
        weights: Sequence[float] | None = None,
        seed: int = 0,
        window: int = 4096,
        block: int = 64,
    ) -> None:
        assert sizes and all(n > 0 for n in sizes)
        self.sizes, self.batch_size = list(sizes), batch_size
        self.seed, self.window, self.block = seed, window, block
        share = np.cumsum(np.asarray(weights or sizes, float))
        self._bounds = np.minimum(share[:-1] / share[-1] * 2.0**64, 2.0**64 - 2048).astype(np.uint64)
        self._offset = np.uint64(np.random.default_rng([seed, 0]).integers(1 << 63))
        self._orders: dict[tuple[int, int], np.ndarray] = {}
        self._counted = (0, np.zeros(len(sizes), np.int64))

    def batch(self, number: int) -> Rows:
        """The samples of global batch `number`."""
        first = number * self.batch_size
        position = np.arange(first, first + self.batch_size, dtype=np.int64)
        source = self._sources(position)
        visits = self._visits_before(first)
        index = np.empty_like(position)
        for s, size in enumerate(self.sizes):
            rows = np.flatnonzero(source == s)
            visit = visits[s] + np.arange(len(rows))
            for epoch in np.unique(visit // size):
                chosen = visit // size == epoch
                index[rows[chosen]] = self._order(s, int(epoch))[visit[chosen] % size]
        return Rows(source, index, position)

    def _sources(self, position: np.ndarray) -> np.ndarray:
        """Corpus of each position: a low-discrepancy sequence cut at the weights, which so hold in every stretch."""
        if len(self.sizes) == 1:
            return np.zeros(len(position), np.int64)
        point = position.astype(np.uint64) * _GOLDEN + self._offset
        return np.searchsorted(self._bounds, point, side="right")

    def _visits_before(self, position: int) -> np.ndarray:
        """Number of visits to each corpus before `position`, counted on from the last result."""
        done, counts = self._counted
        if position < done:
            done, counts = 0, np.zeros(len(self.sizes), np.int64)
        while done < position:
            end = min(done + _CHUNK, position)
            if len(self.sizes) == 1:
                end, step = position, np.array([position - done])
            else:
                step = np.bincount(self._sources(np.arange(done, end)), minlength=len(self.sizes))
            done, counts = end, counts + step
        self._counted = (done, counts)
        return counts

    def _order(self, source: int, epoch: int) -> np.ndarray:
        """Permutation of one corpus for one epoch."""
        key = (source, epoch)
        if key not in self._orders:
            for old in [k for k in self._orders if k[0] == source and k[1] < epoch - 1]:
                del self._orders[old]
            rng = np.random.default_rng([self.seed, 1, source, epoch])
            size = self.sizes[source]
            starts = rng.permutation(-(-size // self.block)) * self.block
            order = (starts[:, None] + np.arange(self.block)).ravel()
            order = order[order < size]
            for start in range(0, size, self.window):
                rng.shuffle(order[start : start + self.window])
            self._orders[key] = order
        return self._orders[key]
