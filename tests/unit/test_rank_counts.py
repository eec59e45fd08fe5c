"""Rank counting in tiles against the whole matrix."""

from __future__ import annotations

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atr_scale.errors import UserError
from atr_scale.evaluation import rank_counts
from atr_scale.evaluation.metrics import Ranks, ranks
from atr_scale.evaluation.rank_counts import MatrixScores, VectorScores, vector_ranks


def same(found: Ranks, wanted: Ranks) -> None:
    for name in ("t2a", "a2t", "clip", "audio_ids"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name), err_msg=name)


def problem(
    seed: int, texts: int, audios: int, levels: int, ordered: bool
) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Vectors of small integers: their products are exact in any order of summation, and many are equal."""
    rng = np.random.default_rng(seed)
    text, audio = (
        torch.from_numpy(rng.integers(-levels, levels + 1, (n, 4)).astype(np.float32)) for n in (texts, audios)
    )
    owner = rng.integers(0, audios, texts)
    return text, audio, np.sort(owner) if ordered else owner


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    texts=st.integers(1, 70),
    audios=st.integers(1, 70),
    levels=st.sampled_from([0, 1, 3]),
    ordered=st.booleans(),
    kept=st.integers(0, 3),
)
def test_ranks_equal_those_of_the_matrix(
    seed: int, texts: int, audios: int, levels: int, ordered: bool, kept: int
) -> None:
    text, audio, owner = problem(seed, texts, audios, levels, ordered)
    ids = np.random.default_rng(seed).permutation(audios) * 7
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rank_counts, "ROWS", 16)
        patch.setattr(rank_counts, "COLUMNS", 32)
        patch.setattr(rank_counts, "BYTES", 4)
        patch.setattr(rank_counts, "KEPT_TILES", kept)
        same(vector_ranks(text, audio, ids[owner], ids), ranks(text @ audio.T, ids[owner], ids))


def test_tiles_of_the_real_size() -> None:
    text, audio, owner = problem(0, 1111, 2345, 2, ordered=True)
    same(vector_ranks(text, audio, owner, np.arange(2345)), ranks(text @ audio.T, owner, np.arange(2345)))
    same(
        vector_ranks(text.double(), audio.double(), owner, np.arange(2345)),
        ranks(text @ audio.T, owner, np.arange(2345)),
    )


def test_captions_of_one_wording_are_equal() -> None:
    """Vectors whose products round: a caption's score is the same wherever it stands."""
    generator = torch.Generator().manual_seed(0)
    audio = torch.nn.functional.normalize(torch.randn(300, 64, generator=generator), dim=1)
    text = torch.nn.functional.normalize(torch.randn(1, 64, generator=generator), dim=1).expand(1500, 64)
    found = vector_ranks(text.contiguous(), audio, np.repeat(np.arange(300), 5), np.arange(300))
    assert found.a2t.tolist() == list(range(1, 1501))


def test_mistakes_get_one_line() -> None:
    text, audio = torch.ones(2, 3), torch.ones(2, 3)
    with pytest.raises(UserError, match="not finite"):
        vector_ranks(text * torch.nan, audio, np.arange(2), np.arange(2))
    with pytest.raises(UserError, match="which is not in audio_ids"):
        vector_ranks(text, audio, np.array([0, 5]), np.arange(2))


@pytest.mark.parametrize("kind", ["vectors", "matrix"])
def test_what_a_report_shows_is_that_of_the_matrix(kind: str) -> None:
    text, audio, _ = problem(3, 30, 20, 3, ordered=False)
    matrix = text @ audio.T
    scores = VectorScores(text, audio) if kind == "vectors" else MatrixScores(matrix)
    assert scores.shape == (30, 20)
    assert torch.equal(scores.row(7), matrix[7]) and torch.equal(scores.column(5), matrix[:, 5])
    rows, columns = torch.tensor([3, 1, 29]), torch.tensor([0, 19])
    assert torch.equal(scores.block(rows, columns), matrix[rows][:, columns])
    wanted = [sorted(range(20), key=lambda k: (-matrix[t, k], k))[:6] for t in range(30)]
    assert scores.lists(6).tolist() == wanted


def test_lists_and_ranks_agree_with_faiss() -> None:
    """Exact search by another implementation; random vectors have no equal scores."""
    generator = torch.Generator().manual_seed(0)
    audio = torch.nn.functional.normalize(torch.randn(700, 32, generator=generator), dim=1)
    text = torch.nn.functional.normalize(audio + 0.3 * torch.randn(700, 32, generator=generator), dim=1)
    ids = np.arange(700)
    found = vector_ranks(text, audio, ids, ids)
    for queries, items, rank in ((text, audio, found.t2a), (audio, text, found.a2t)):
        index = faiss.IndexFlatIP(32)
        index.add(items.numpy())
        _, order = index.search(queries.numpy(), 700)
        np.testing.assert_array_equal((order == ids[:, None]).argmax(1) + 1, rank)
        np.testing.assert_array_equal(VectorScores(queries, items).lists(10), order[:, :10])
