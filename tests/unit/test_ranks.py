"""Exact ranks and best-k lists from tiles against the whole matrix."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atr_scale.errors import UserError
from atr_scale.evaluation import ranks as module
from atr_scale.evaluation.metrics import Ranks, ranks
from atr_scale.evaluation.ranks import _Products, best_items, embedding_ranks, ieee_products
from atr_scale.evaluation.retrieval_scores import DualEncoderScores, ScoreMatrix


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
    """Unit vectors: "far" from each other; "near", so that float32 tells few apart; "opposite", pairs of negative
    score; "repeated", vectors that occur several times."""
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


def exact(text: torch.Tensor, audio: torch.Tensor, by_row: bool = False) -> torch.Tensor:
    """Scores in float64, equal if float64 cannot tell them apart, in the whole matrix or in each row."""
    rows = [(row * audio.double()).sum(1) for row in text.double()]  # a matrix product may round equal rows differently
    ties = _Products(text, audio).ties[0][:, None]
    return (torch.stack(rows) / (ties if by_row else ties.max())).round()


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    texts=st.integers(1, 70),
    audios=st.integers(1, 70),
    levels=st.sampled_from([0, 1, 3, 700]),
    ordered=st.booleans(),
    few=st.sampled_from([2, 8, 64]),
)
def test_ranks_equal_those_of_the_matrix(
    seed: int, texts: int, audios: int, levels: int, ordered: bool, few: int
) -> None:
    text, audio, owner = problem(seed, texts, audios, levels, ordered)
    ids = np.random.default_rng(seed).permutation(audios) * 7
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ROWS", 16)
        patch.setattr(module, "COLUMNS", 32)
        patch.setattr(module, "FEW", few)
        same(embedding_ranks(text, audio, ids[owner], ids), ranks(text @ audio.T, ids[owner], ids))


@pytest.mark.parametrize("few", [2, 8, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_are_those_of_exact_scores(kind: str, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    text, audio, owner = real_problem(kind, 700, 500)
    for name, value in (("ROWS", 128), ("COLUMNS", 256), ("FEW", few)):
        monkeypatch.setattr(module, name, value)
    wanted = ranks(exact(text, audio), owner, np.arange(500))
    same(embedding_ranks(text, audio, owner, np.arange(500)), wanted)
    same(embedding_ranks(text.double(), audio.double(), owner, np.arange(500)), wanted)


@pytest.mark.parametrize("few", [2, 8, 64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_lists_are_those_of_exact_scores(kind: str, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    text, audio, _ = real_problem(kind, 300, 1000)
    monkeypatch.setattr(module, "FEW", few)
    monkeypatch.setattr(module, "SCORES", 70_000)
    wanted = torch.sort(exact(text, audio, by_row=True), dim=1, descending=True, stable=True).indices
    for k in (1, 10, 100, 2000):
        assert torch.equal(best_items(text, audio, k), wanted[:, :k])
    assert best_items(text[:0], audio, 3).shape == (0, 3)


def test_no_product_is_further_off_than_its_margin() -> None:
    """Random vectors, and vectors whose rounding errors all have one sign."""
    generator = torch.Generator().manual_seed(0)
    biased = torch.full((1, 64), 1 + 0.49 * torch.finfo(torch.float32).eps, dtype=torch.float64)
    text = torch.cat([torch.randn(50, 64, generator=generator), biased]).double()
    audio = torch.cat([torch.randn(40, 64, generator=generator), biased]).double()
    products = _Products(text, audio)
    off = (products.tile(slice(None), slice(None)) - text @ audio.T).abs()
    assert (off <= products.margins[0][:, None]).all() and (off <= products.margins[1]).all()
    assert products.margins[0][50] < 100 * off[50, 40], "and not much larger"


def test_tiles_of_the_real_size() -> None:
    text, audio, owner = problem(0, 1111, 2345, 2, ordered=True)
    wanted = ranks(text @ audio.T, owner, np.arange(2345))
    same(embedding_ranks(text, audio, owner, np.arange(2345)), wanted)
    text, audio, owner = real_problem("far", 1111, 2345)
    wanted = ranks(exact(text, audio), owner, np.arange(2345))
    same(embedding_ranks(text, audio, owner, np.arange(2345)), wanted)


def test_captions_of_one_wording_are_equal() -> None:
    """Vectors whose products round: a caption's score is the same wherever it stands."""
    generator = torch.Generator().manual_seed(0)
    audio = torch.nn.functional.normalize(torch.randn(300, 64, generator=generator), dim=1)
    text = torch.nn.functional.normalize(torch.randn(1, 64, generator=generator), dim=1).expand(1500, 64)
    found = embedding_ranks(text.contiguous(), audio, np.repeat(np.arange(300), 5), np.arange(300))
    assert found.a2t.tolist() == list(range(1, 1501))


def test_mistakes_get_one_line() -> None:
    text, audio = torch.ones(2, 3), torch.ones(2, 3)
    with pytest.raises(UserError, match="not finite"):
        embedding_ranks(text * torch.nan, audio, np.arange(2), np.arange(2))
    with pytest.raises(UserError, match="which is not in audio_ids"):
        embedding_ranks(text, audio, np.array([0, 5]), np.arange(2))


@pytest.mark.parametrize("kind", ["embeddings", "matrix"])
def test_what_a_report_shows_is_that_of_the_matrix(kind: str) -> None:
    text, audio, _ = problem(3, 30, 20, 3, ordered=False)
    matrix = text @ audio.T
    scores = DualEncoderScores(text, audio) if kind == "embeddings" else ScoreMatrix(matrix)
    assert scores.shape == (30, 20)
    assert torch.equal(scores.row(7), matrix[7]) and torch.equal(scores.column(5), matrix[:, 5])
    rows, columns = torch.tensor([3, 1, 29]), torch.tensor([0, 19])
    assert torch.equal(scores.block(rows, columns), matrix[rows][:, columns])
    wanted = [sorted(range(20), key=lambda k: (-matrix[t, k], k))[:6] for t in range(30)]
    assert scores.lists(6).tolist() == wanted and scores.lists(6, slice(1, None, 3)).tolist() == wanted[1::3]
    assert scores.T.lists(30).tolist() == [sorted(range(30), key=lambda t: (-matrix[t, k], t)) for k in range(20)]


def test_lists_and_ranks_agree_with_faiss() -> None:
    """Exact search by another implementation; random vectors have no equal scores."""
    generator = torch.Generator().manual_seed(0)
    audio = torch.nn.functional.normalize(torch.randn(700, 32, generator=generator), dim=1)
    text = torch.nn.functional.normalize(audio + 0.3 * torch.randn(700, 32, generator=generator), dim=1)
    ids = np.arange(700)
    found = embedding_ranks(text, audio, ids, ids)
    for queries, items, rank in ((text, audio, found.t2a), (audio, text, found.a2t)):
        index = faiss.IndexFlatIP(32)
        index.add(items.numpy())
        _, order = index.search(queries.numpy(), 700)
        np.testing.assert_array_equal((order == ids[:, None]).argmax(1) + 1, rank)
        np.testing.assert_array_equal(DualEncoderScores(queries, items).lists(10), order[:, :10])


def fractions(text: torch.Tensor, audio: torch.Tensor) -> list[list[Fraction]]:
    """Scores without any rounding."""
    rows, columns = ([[Fraction(x) for x in row] for row in side.tolist()] for side in (text, audio))
    return [[sum((a * b for a, b in zip(row, column, strict=True)), Fraction(0)) for column in columns] for row in rows]


def hostile(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """30 texts and 20 audios, [n, 16] each."""
    generator = torch.Generator().manual_seed(0)
    text, audio = (torch.randn(n, 16, generator=generator) for n in (30, 20))
    sides: dict[str, Callable[[], tuple[torch.Tensor, torch.Tensor]]] = {
        "tiny norms": lambda: (text * 1e-25, audio * 1e-18),
        "denormal": lambda: (text * 1e-39, audio),
        "huge norms": lambda: (text * 1e30, audio * 1e25),
        "huge and tiny": lambda: (text * 1e30, audio * 1e-30),
        "one outlier": lambda: (text, torch.cat([audio[:1] * 1e6, audio[1:]])),
        "norms of all sizes": lambda: (text * 10 ** torch.linspace(-6, 6, 30)[:, None], audio),
        "zero vectors among others": lambda: (
            text * (torch.arange(30) % 3 > 0)[:, None],
            audio * (torch.arange(20) != 4)[:, None],
        ),
        "all zero": lambda: (text * 0, audio * 0),
        "all equal": lambda: (text[:1].expand(30, 16), audio[:1].expand(20, 16)),
        "duplicates": lambda: (text[torch.arange(30) % 4], audio[torch.arange(20) % 3]),
        "one unit in the last place": lambda: (
            unit(audio[:1]).expand(30, 16),
            torch.nextafter(unit(audio[:1]), unit(audio[:1]) + torch.eye(16)[torch.arange(20) % 5]),
        ),
    }  # fmt: skip
    left, right = sides[kind]()
    return left.contiguous(), right.contiguous()


HOSTILE = (
    "tiny norms", "denormal", "huge norms", "huge and tiny", "one outlier", "norms of all sizes",
    "zero vectors among others", "all zero", "all equal", "duplicates", "one unit in the last place",
)  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("few", [2, 128])
def test_hostile_embeddings_against_scores_without_rounding(
    kind: str, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("ROWS", 8), ("COLUMNS", 16), ("FEW", few)):
        monkeypatch.setattr(module, name, value)
    text, audio = hostile(kind)
    scores, owner = fractions(text, audio), np.arange(30) * 7 % 20
    levels = {score: level for level, score in enumerate(sorted({score for row in scores for score in row}))}
    matrix = np.array([[levels[score] for score in row] for row in scores], dtype=np.float64)
    same(embedding_ranks(text, audio, owner, np.arange(20)), ranks(matrix, owner, np.arange(20)))
    order = np.argsort(-matrix, axis=1, kind="stable")
    for k in (1, 3, 20):
        np.testing.assert_array_equal(best_items(text, audio, k), order[:, :k])


def test_the_norm_of_a_query_changes_nothing() -> None:
    text, audio, owner = real_problem("repeated", 200, 100)
    scaled = text * 2.0 ** torch.linspace(-100, 100, 200).round()[:, None]
    found, wanted = (embedding_ranks(side, audio, owner, np.arange(100)).t2a for side in (scaled, text))
    np.testing.assert_array_equal(found, wanted)
    for k in (2, 50):
        assert torch.equal(best_items(scaled, audio, k), best_items(text, audio, k))


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_ranks_are_exact_if_the_process_allows_faster_products(precision: str) -> None:
    """TF32 on a GPU and bf16 on a CPU would put scores outside of the margin."""
    text, audio, owner = real_problem("far", 700, 500)
    wanted = ranks(exact(text, audio), owner, np.arange(500))
    lists = torch.sort(exact(text, audio), dim=1, descending=True, stable=True).indices[:, :3]
    plain = text @ audio.T
    matmul = torch.backends.cuda.matmul
    try:
        torch.set_float32_matmul_precision(precision)
        with ieee_products():
            assert matmul.fp32_precision == "ieee"
            assert torch.equal(text @ audio.T, plain)
        assert matmul.fp32_precision == "tf32" and torch.get_float32_matmul_precision() == precision
        same(embedding_ranks(text, audio, owner, np.arange(500)), wanted)
        assert torch.equal(best_items(text, audio, 3), lists)
        assert torch.get_float32_matmul_precision() == precision
        with pytest.raises(ZeroDivisionError), ieee_products():
            raise ZeroDivisionError
        assert torch.get_float32_matmul_precision() == precision, "restored after an error too"
    finally:
        torch.set_float32_matmul_precision("highest")
