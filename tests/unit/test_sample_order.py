"""The sample order: exact epochs, exact mixtures, any batch without those before it, decided by the seed alone."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atr_scale.data.sample_order import Rows, SampleOrder

sizes = st.lists(st.integers(1, 60), min_size=1, max_size=4)
batch_sizes = st.integers(1, 40)
seeds = st.integers(0, 2**32)
shuffles = st.fixed_dictionaries({"window": st.integers(1, 50), "block": st.integers(1, 20)})


def stream(plan: SampleOrder, batches: int) -> Rows:
    """The first `batches` batches, joined."""
    rows = [plan.batch(k) for k in range(batches)]
    return Rows(*(np.concatenate([getattr(r, name) for r in rows]) for name in ("source", "index", "position")))


def same(a: Rows, b: Rows) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("source", "index", "position"))


@settings(max_examples=60, deadline=None)
@given(sizes=sizes, batch_size=batch_sizes, seed=seeds, shuffle=shuffles)
def test_every_corpus_gives_exact_epochs(sizes: list[int], batch_size: int, seed: int, shuffle: dict[str, int]) -> None:
    """Visits [k n, (k + 1) n) of a corpus of n samples are a permutation, for any batch size and mixture."""
    plan = SampleOrder(sizes, batch_size, seed=seed, window=shuffle["window"], block=shuffle["block"])
    rows = stream(plan, 1 + 3 * sum(sizes) // batch_size)
    assert np.array_equal(rows.position, np.arange(len(rows.position)))
    for source, size in enumerate(sizes):
        visits = rows.index[rows.source == source]
        assert len(visits) >= size
        for start in range(0, len(visits) - size + 1, size):
            assert sorted(visits[start : start + size]) == list(range(size))


@settings(max_examples=60, deadline=None)
@given(sizes=sizes, batch_size=batch_sizes, seed=seeds, numbers=st.lists(st.integers(0, 60), min_size=1, max_size=12))
def test_any_batch_is_found_at_once(sizes: list[int], batch_size: int, seed: int, numbers: list[int]) -> None:
    """In any order, also backwards, from a new object and from one that has found other batches."""
    weights = [1.0 + k for k in range(len(sizes))]
    iterated = SampleOrder(sizes, batch_size, weights=weights, seed=seed, window=7, block=3)
    expected = [iterated.batch(k) for k in range(61)]
    wandering = SampleOrder(sizes, batch_size, weights=weights, seed=seed, window=7, block=3)
    for number in numbers:
        assert same(wandering.batch(number), expected[number])
        assert same(
            SampleOrder(sizes, batch_size, weights=weights, seed=seed, window=7, block=3).batch(number),
            expected[number],
        )


@given(sizes=sizes, seed=seeds)
@settings(max_examples=30, deadline=None)
def test_the_stream_does_not_depend_on_the_batch_size(sizes: list[int], seed: int) -> None:
    assert same(stream(SampleOrder(sizes, 12, seed=seed), 10), stream(SampleOrder(sizes, 5, seed=seed), 24))


def test_nothing_but_the_seed_decides() -> None:
    before = stream(SampleOrder([50, 30], 8, seed=5), 20)
    np.random.seed(99)
    np.random.random(17)
    assert same(stream(SampleOrder([50, 30], 8, seed=5), 20), before)
    assert not same(stream(SampleOrder([50, 30], 8, seed=6), 20), before)


def test_epochs_differ_and_a_tail_opens_the_next() -> None:
    rows = stream(SampleOrder([10], 4, seed=0), 10)
    epochs = rows.index.reshape(4, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    third = SampleOrder([10], 4, seed=0).batch(2)
    assert set(third.index[:2]).isdisjoint(rows.index[:8]), "the third batch opens with the first epoch's tail"


def test_corpora_of_one_size_are_shuffled_apart() -> None:
    rows = stream(SampleOrder([40, 40], 8, seed=3), 20)
    first, second = (rows.index[rows.source == s][:40] for s in (0, 1))
    assert not np.array_equal(first, second)


@settings(max_examples=40, deadline=None)
@given(
    weights=st.lists(st.floats(0.05, 20), min_size=2, max_size=4),
    batch_size=st.integers(4, 128),
    seed=seeds,
)
def test_mixtures_follow_the_weights(weights: list[float], batch_size: int, seed: int) -> None:
    """In every batch and every prefix of the stream, not only in the long run."""
    plan = SampleOrder([1000] * len(weights), batch_size, weights=weights, seed=seed)
    share = np.asarray(weights) / sum(weights)
    counts = np.array([np.bincount(plan.batch(k).source, minlength=len(weights)) for k in range(40)])
    slack = 2 + np.log2(batch_size)  # discrepancy of a golden-ratio sequence grows with the logarithm
    assert np.abs(counts - share * batch_size).max() <= slack
    assert np.abs(counts.mean(0) - share * batch_size).max() <= 1
    total = np.arange(1, 41)[:, None] * batch_size
    assert np.abs(counts.cumsum(0) - share * total).max() <= 2 + np.log2(40 * batch_size)


def test_the_default_weight_of_a_corpus_is_its_size() -> None:
    rows = stream(SampleOrder([900, 100], 50, seed=1), 200)
    assert np.bincount(rows.source) == pytest.approx([9000, 1000], abs=15)


def test_shuffling_keeps_neighbours_near_and_mixes_the_whole() -> None:
    size, window, block = 10_000, 512, 64
    order = stream(SampleOrder([size], 500, seed=0, window=window, block=block), 20).index
    for start in range(0, size, window):
        part = order[start : start + window]
        # A window of 512 positions touches no more than its own 8 blocks and one cut at each end.
        assert len(np.unique(part // block)) <= window // block + 2
    windows = [part // block for part in (order[:window], order[-window:])]
    assert np.ptp(windows[0]) > 20, "a window holds blocks from all over the corpus"
    assert np.abs(np.diff(order[:window])).mean() > block, "inside a window samples are mixed"
    positions = np.empty(size)
    positions[order] = np.arange(size)
    assert abs(np.corrcoef(positions, np.arange(size))[0, 1]) < 0.2


def test_far_batches_are_found() -> None:
    """Batch 100,000 of a mixture, and of a single corpus far beyond."""
    mixture = SampleOrder([1000, 3000], 64, seed=2)
    late = mixture.batch(100_000)
    assert abs(np.count_nonzero(late.source == 0) - 16) <= 4
    single = SampleOrder([1000], 64, seed=2).batch(10**9)
    assert single.position[0] == 64 * 10**9 and len(single.index) == 64


def test_slices_of_a_batch_are_disjoint_and_complete() -> None:
    rows = SampleOrder([30, 20], 12, seed=4).batch(3)
    parts = [rows[slice(r * 4, (r + 1) * 4)] for r in range(3)]
    assert same(Rows(*(np.concatenate([getattr(p, n) for p in parts]) for n in ("source", "index", "position"))), rows)
    assert all(a.position[-1] + 1 == b.position[0] for a, b in pairwise(parts))
