"""The objectives on score blocks against the dense formulas, in one process."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from atr_scale.errors import UserError
from atr_scale.objectives import build_objective, dense, tiled
from atr_scale.objectives.targets import positives_mask
from atr_scale.parallel import blocks
from atr_scale.parallel.blocks import EmbeddingScores, ScoreBlock, StoredScores

Ids = tuple[Tensor, Tensor]
OBJECTIVES: dict[str, dict[str, float | bool]] = {
    "nt_xent": {},
    "pmr": {"omega": 4.0},
    "pmr_detached": {"omega": 4.0, "detach_prior": True},
}


def vectors(texts: int, audios: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = (normalize(torch.randn(n, 6, generator=generator, dtype=torch.float64), dim=1) for n in (texts, audios))
    text, audio = (x.to(dtype).requires_grad_() for x in made)
    return text, audio


def random_ids(texts: int, audios: int, clips: int, seed: int) -> Ids:
    """Two columns as in training, from few values: several positives a query, and some without any."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(clips, (texts, 2), generator=generator), torch.randint(clips, (audios, 2), generator=generator)


def run(
    name: str, kind: str, text: Tensor, audio: Tensor, temperature: Tensor | float, ids: Ids | None
) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of texts, audios and temperature; kind: dense, embedding or stored."""
    options = dict(OBJECTIVES[name])
    function = name.removesuffix("_detached")
    inputs = [text, audio, *([temperature] if isinstance(temperature, Tensor) else [])]
    if kind == "dense":
        mask = None if ids is None else positives_mask(*ids)
        loss = getattr(dense, function)(text @ audio.T, temperature, positives=mask, **options)
    else:
        block: ScoreBlock = EmbeddingScores(text, audio) if kind == "embedding" else StoredScores(text @ audio.T)
        loss = getattr(tiled, function)(block, temperature, positives=ids, **options)
    return loss, list(torch.autograd.grad(loss, inputs))


@settings(max_examples=120, deadline=None)
@given(
    name=st.sampled_from(sorted(OBJECTIVES)),
    kind=st.sampled_from(["embedding", "stored"]),
    texts=st.integers(1, 13),
    audios=st.integers(1, 13),
    clips=st.integers(1, 30),
    stripe=st.integers(1, 14),
    tau=st.floats(0.02, 2),
    seed=st.integers(0, 1000),
)
def test_tiled_equals_dense(
    name: str, kind: str, texts: int, audios: int, clips: int, stripe: int, tau: float, seed: int
) -> None:
    """Any shape and striping; several positives a query, and none."""
    text, audio = vectors(texts, audios, seed)
    temperature = torch.tensor([tau], dtype=torch.float64, requires_grad=True)
    ids = random_ids(texts, audios, clips, seed)
    expected, expected_grads = run(name, "dense", text, audio, temperature, ids)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "STRIPE_COLUMNS", stripe)
        loss, grads = run(name, kind, text, audio, temperature, ids)
    assert abs(loss - expected) < 1e-11
    for got, want in zip(grads, expected_grads, strict=True):
        assert (got - want).abs().max() <= 1e-11 * (1 + want.abs().max())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_pairs_by_position(name: str) -> None:
    text, audio = vectors(300, 300, 0)  # more than one stripe of the real width
    for kind in ("embedding", "stored"):
        loss, grads = run(name, kind, text, audio, 0.07, None)
        expected, expected_grads = run(name, "dense", text, audio, 0.07, None)
        assert abs(loss - expected) < 1e-12
        assert max((g - e).abs().max() for g, e in zip(grads, expected_grads, strict=True)) < 1e-12


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_inputs_are_summed_in_fp32(name: str, dtype: torch.dtype) -> None:
    text, audio = vectors(20, 17, 3, dtype)
    ids = random_ids(20, 17, 12, 3)
    wide = [x.detach().double().requires_grad_() for x in (text, audio)]
    expected, expected_grads = run(name, "dense", wide[0], wide[1], 0.05, ids)
    loss, grads = run(name, "embedding", text, audio, 0.05, ids)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-5)
    for got, want in zip(grads, expected_grads, strict=True):
        assert got.dtype == dtype
        slack = 1e-4 if dtype == torch.float32 else 2**-7
        assert (got - want).abs().max() <= slack * want.abs().max()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_temperature_is_a_number_or_a_tensor(name: str) -> None:
    text, audio = vectors(6, 6, 1)
    expected, _ = run(name, "dense", text, audio, 0.1, None)
    for shape in ((), (1,)):
        temperature = torch.full(shape, 0.1, dtype=torch.float64, requires_grad=True)
        loss, grads = run(name, "embedding", text, audio, temperature, None)
        assert loss.shape == () and abs(loss - expected) < 1e-12 and grads[2].shape == shape
    assert abs(run(name, "stored", text, audio, 0.1, None)[0] - expected) < 1e-12


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_narrow_temperature_does_not_round_the_loss(name: str) -> None:
    """The model's temperature is fp32; with float64 scores the result is float64 as the dense one is."""
    text, audio = vectors(6, 6, 1)
    temperature = torch.tensor([0.07], requires_grad=True)
    loss, grads = run(name, "embedding", text, audio, temperature, None)
    expected, expected_grads = run(name, "dense", text, audio, temperature, None)
    assert loss.dtype == expected.dtype == torch.float64 and abs(loss - expected) < 1e-12
    assert grads[2].dtype == torch.float32 and grads[2].item() == pytest.approx(expected_grads[2].item(), rel=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_scores_are_left_as_they_are(name: str) -> None:
    text, audio = vectors(9, 6, 2)
    scores = (text @ audio.T).detach().requires_grad_()
    before = scores.detach().clone()
    ids = random_ids(9, 6, 5, 0)
    options = OBJECTIVES[name]
    loss = getattr(tiled, name.removesuffix("_detached"))(StoredScores(scores), 0.1, positives=ids, **options)
    loss.backward()
    assert torch.equal(scores.detach(), before)
    first = scores.grad
    assert first is not None
    again = before.clone().requires_grad_()
    (3 * getattr(tiled, name.removesuffix("_detached"))(StoredScores(again), 0.1, positives=ids, **options)).backward()
    assert again.grad is not None and torch.allclose(again.grad, 3 * first, rtol=1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_lowest_temperature_is_finite_in_fp32(name: str) -> None:
    text, audio = vectors(40, 40, 5, torch.float32)
    same = text.detach().clone().requires_grad_()  # scores of exactly one on the diagonal
    for pair in ((text, audio), (text, same), (text, (-text).detach().requires_grad_())):
        temperature = torch.tensor([0.01], requires_grad=True)
        loss, grads = run(name, "embedding", *pair, temperature, None)
        assert loss.isfinite() and all(g.isfinite().all() for g in grads)
        wide = [x.detach().double().requires_grad_() for x in pair]
        expected, _ = run(name, "dense", wide[0], wide[1], 0.01, None)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-4)


def test_a_batch_without_any_positive_is_zero() -> None:
    text, audio = vectors(4, 5, 0)
    ids = torch.arange(4)[:, None], torch.arange(5)[:, None] + 100
    loss, grads = run("nt_xent", "embedding", text, audio, 0.1, ids)
    assert loss == 0 and all((g == 0).all() for g in grads)


def test_a_pair_that_agrees_in_both_columns_counts_once() -> None:
    text, audio = vectors(3, 3, 0)
    one = torch.tensor([[1, 7], [2, 8], [3, 9]])
    loss, _ = run("nt_xent", "embedding", text, audio, 0.1, (one, one))
    assert abs(loss - run("nt_xent", "embedding", text, audio, 0.1, (one[:, :1], one[:, :1]))[0]) < 1e-14


def test_objectives_by_name() -> None:
    text, audio = vectors(4, 4, 0)
    ids = (torch.arange(4)[:, None],) * 2
    temperature = torch.tensor([0.1], dtype=torch.float64)
    terms = build_objective("pmr", omega=4.0, detach_prior=True)(EmbeddingScores(text, audio), temperature, ids)
    assert list(terms) == ["pmr"]
    assert abs(terms["pmr"] - run("pmr_detached", "dense", text, audio, 0.1, ids)[0]) < 1e-12
    with pytest.raises(UserError, match="unknown objective 'clip': known are nt_xent, pmr"):
        build_objective("clip")


def test_mistakes() -> None:
    text, audio = vectors(3, 4, 0)
    with pytest.raises(UserError, match="3 texts and 4 audios do not pair by position"):
        tiled.nt_xent(EmbeddingScores(text, audio), 0.1)
    with pytest.raises(UserError, match=r"need text ids \[3, k\] and audio ids \[4, k\], got \[3\] and \[4\]"):
        tiled.nt_xent(EmbeddingScores(text, audio), 0.1, (torch.zeros(3), torch.zeros(4)))
    with pytest.raises(UserError, match="of one width d"):
        EmbeddingScores(text, audio[:, :3])
    with pytest.raises(UserError, match=r"stored scores need \[B, b\]"):
        StoredScores(torch.zeros(3))
