"""Folds: a division of the clips of a corpus that is known from the index of its shards, without reading samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from atr_scale.batch import stable_id
from atr_scale.data.shard_reader import ShardSet


def fold_of(keys: Sequence[str], count: int) -> np.ndarray:
    """The fold of each clip, int64 [N] from 0 to `count` - 1, from the keys of their samples."""
    return np.array([stable_id(key) % count for key in keys], np.int64)


def without_fold(shards: ShardSet, count: int, held_out: int) -> ShardSet:
    """The shards without the clips of fold `held_out` of `count`."""
    kept = np.flatnonzero(fold_of(shards.keys, count) != held_out)
    return replace(
        shards,
        shard_of=shards.shard_of[kept],
        start=shards.start[kept],
        stop=shards.stop[kept],
        keys=[shards.keys[row] for row in kept.tolist()],
        captions=None if shards.captions is None else shards.captions[kept],
    )
