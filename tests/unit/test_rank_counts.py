"""Rank counting in tiles against the whole matrix."""

from __future__ import annotations

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atr_scale.errors import UserError
from atr_scale.evaluation import lists, rank_counts
from atr_scale.evaluation.coarse import LEVELS, Coarse, Precision, tie
from atr_scale.evaluation.lists import nearest
from atr_scale.evaluation.metrics import Ranks, ranks
from atr_scale.evaluation.rank_counts import MatrixScores, VectorScores, vector_ranks

PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")


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


def unit(values: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(values, dim=1)


def real_problem(kind: str, texts: int, audios: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Unit vectors: "far" from each other; "near", so that bfloat16 tells few apart; "opposite", pairs of negative
    score; "repeated", where vectors occur several times."""
    generator = torch.Generator().manual_seed(seed)
    owner = np.random.default_rng(seed).integers(0, audios, texts)
    audio, noise = (torch.randn(n, 48, generator=generator) for n in (audios, texts))
    if kind == "near":
        audio = torch.randn(1, 48, generator=generator) + 3e-3 * audio
    elif kind == "repeated":
        audio = audio[torch.randint(audios // 4, (audios,), generator=generator)]
    text = audio[owner] * (-1 if kind == "opposite" else 1) + noise * (3e-3 if kind == "near" else 2)
    if kind == "repeated":
        text = text[torch.randint(texts, (texts,), generator=generator)]
    return unit(text), unit(audio), owner


KINDS = ("far", "near", "opposite", "repeated")


def exact(text: torch.Tensor, audio: torch.Tensor) -> torch.Tensor:
    """Scores in float64, equal where they are no further apart than it can tell."""
    return (text.double() @ audio.double().T / tie(text, audio)).round()


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    texts=st.integers(1, 70),
    audios=st.integers(1, 70),
    levels=st.sampled_from([0, 1, 3, 700]),  # 700: bfloat16 rounds them
    ordered=st.booleans(),
    few=st.sampled_from([2, 8, 64]),
    precision=st.sampled_from(PRECISIONS),
)
def test_ranks_equal_those_of_the_matrix(
    seed: int, texts: int, audios: int, levels: int, ordered: bool, few: int, precision: Precision
) -> None:
    text, audio, owner = problem(seed, texts, audios, levels, ordered)
    ids = np.random.default_rng(seed).permutation(audios) * 7
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rank_counts, "ROWS", 16)
        patch.setattr(rank_counts, "COLUMNS", 32)
        patch.setattr(rank_counts, "BYTES", 4)
        patch.setattr(rank_counts, "FEW", few)
        same(vector_ranks(text, audio, ids[owner], ids, precision=precision), ranks(text @ audio.T, ids[owner], ids))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("few", [2, 8, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_are_those_of_exact_scores(
    kind: str, few: int, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, audio, owner = real_problem(kind, 700, 500)
    for name, value in (("ROWS", 128), ("COLUMNS", 256), ("BYTES", 32), ("FEW", few)):
        monkeypatch.setattr(rank_counts, name, value)
    wanted = ranks(exact(text, audio), owner, np.arange(500))
    same(vector_ranks(text, audio, owner, np.arange(500), precision=precision), wanted)
    same(vector_ranks(text.double(), audio.double(), owner, np.arange(500), precision=precision), wanted)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("few", [2, 8, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_lists_are_those_of_exact_scores(
    kind: str, few: int, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, audio, _ = real_problem(kind, 300, 1000)
    monkeypatch.setattr(lists, "FEW", few)
    monkeypatch.setattr(lists, "SCORES", 70_000)
    wanted = torch.sort(exact(text, audio), dim=1, descending=True, stable=True).indices
    for k in (1, 10, 100, 2000):
        assert torch.equal(nearest(text, audio, k, precision), wanted[:, :k])
    assert nearest(text[:0], audio, 3).shape == (0, 3)


@pytest.mark.parametrize("dtype", LEVELS["bf16"])
def test_no_product_is_further_off_than_its_margin(dtype: torch.dtype) -> None:
    """Random vectors, and such whose errors of rounding all add up."""
    generator = torch.Generator().manual_seed(0)
    step = torch.finfo(dtype).eps
    half = torch.full((1, 64), 1 + 0.49 * step, dtype=torch.float64)
    text = torch.cat([torch.randn(50, 64, generator=generator), half]).double()
    audio = torch.cat([torch.randn(40, 64, generator=generator), half]).double()
    coarse = Coarse(text, audio, dtype)
    off = (coarse.sides[0].float() @ coarse.sides[1].float().T - text @ audio.T).abs()
    assert (off <= coarse.margins[0][:, None]).all() and (off <= coarse.margins[1]).all()
    if dtype == torch.bfloat16:
        assert Coarse(text[50:], audio[40:], dtype).margins[0] < 1.1 * off[50, 40], "and not much larger"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_tiles_of_the_real_size(precision: Precision) -> None:
    text, audio, owner = problem(0, 1111, 2345, 2, ordered=True)
    wanted = ranks(text @ audio.T, owner, np.arange(2345))
    same(vector_ranks(text, audio, owner, np.arange(2345), precision=precision), wanted)
    text, audio, owner = real_problem("far", 1111, 2345)
    wanted = ranks(exact(text, audio), owner, np.arange(2345))
    same(vector_ranks(text, audio, owner, np.arange(2345), precision=precision), wanted)


def test_captions_of_one_wording_are_equal() -> None:
    """Vectors whose products round: a caption's score is the same wherever it stands."""
    generator = torch.Generator().manual_seed(0)
    audio = torch.nn.functional.normalize(torch.randn(300, 64, generator=generator), dim=1)
    text = torch.nn.functional.normalize(torch.randn(1, 64, generator=generator), dim=1).expand(1500, 64)
    for precision in PRECISIONS:
        found = vector_ranks(text.contiguous(), audio, np.repeat(np.arange(300), 5), np.arange(300), None, precision)
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
    assert scores.lists(6).tolist() == wanted and scores.lists(6, slice(1, None, 3)).tolist() == wanted[1::3]
    assert scores.T.lists(30).tolist() == [sorted(range(30), key=lambda t: (-matrix[t, k], t)) for k in range(20)]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_lists_and_ranks_agree_with_faiss(precision: Precision) -> None:
    """Exact search by another implementation; random vectors have no equal scores."""
    generator = torch.Generator().manual_seed(0)
    audio = torch.nn.functional.normalize(torch.randn(700, 32, generator=generator), dim=1)
    text = torch.nn.functional.normalize(audio + 0.3 * torch.randn(700, 32, generator=generator), dim=1)
    ids = np.arange(700)
    found = vector_ranks(text, audio, ids, ids, precision=precision)
    for queries, items, rank in ((text, audio, found.t2a), (audio, text, found.a2t)):
        index = faiss.IndexFlatIP(32)
        index.add(items.numpy())
        _, order = index.search(queries.numpy(), 700)
        np.testing.assert_array_equal((order == ids[:, None]).argmax(1) + 1, rank)
        np.testing.assert_array_equal(VectorScores(queries, items, precision).lists(10), order[:, :10])
