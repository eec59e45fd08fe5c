"""What a job needs of a configuration before its ranks start."""

from __future__ import annotations

import pytest

from atr_scale.job_inputs import nodes_that_fit


@pytest.mark.parametrize(
    ("batch", "nodes", "ranks", "fit"),
    [(64, 4, 4, 4), (64, 3, 4, 2), (48, 3, 4, 3), (6, 3, 4, 3), (64, 1, 8, 1)],
)
def test_nodes_among_whose_ranks_a_batch_divides(batch: int, nodes: int, ranks: int, fit: int) -> None:
    """If there are none, training says which numbers of ranks there may be."""
    assert nodes_that_fit(batch, nodes, ranks) == fit
