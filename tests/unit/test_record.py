"""Numbers of a log line that are made from the batches."""

from __future__ import annotations

import numpy as np

from atr_scale.training.record import share_of_repeated


def test_pairs_whose_clip_or_caption_another_pair_has_too() -> None:
    ids = np.array([[1, 10], [1, 11], [2, 12], [3, 10], [4, 10]])
    assert share_of_repeated(ids) == [2 / 5, 3 / 5]
    assert share_of_repeated(ids[2:3]) == [0.0, 0.0]
