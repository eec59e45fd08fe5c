"""The objectives on score blocks against the dense formulas, in one process."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from atr_scale import score_block as blocks
from atr_scale.errors import UserError
from atr_scale.losses import tiled
from atr_scale.losses.tiled import tiles
from atr_scale.score_block import EmbeddingScores, ModalityScores, StoredScores
from tests.losses import BLOCKS, CASES, SQUARE, dense_loss, tiled_loss, unit

Ids = tuple[Tensor, Tensor]


def vectors(texts: int, audios: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    text, audio = (unit(rows, 6, 2 * seed + n).to(dtype).requires_grad_() for n, rows in enumerate((texts, audios)))
    return text, audio


def random_ids(texts: int, audios: int, clips: int, seed: int) -> Ids:
    """Two columns as in training, from few values: several positives a query, and some without any."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(clips, (texts, 2), generator=generator), torch.randint(clips, (audios, 2), generator=generator)


def run(
    case: str, kind: str, text: Tensor, audio: Tensor, temperature: Tensor | float, ids: Ids | None
) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of texts, audios and temperature; kind: dense, embedding or stored."""
    inputs = [text, audio, *([temperature] if isinstance(temperature, Tensor) else [])]
    # Values that every dtype holds.
    teacher = unit(len(text), 5, 98).bfloat16().to(text.dtype), unit(len(audio), 5, 99).bfloat16().to(text.dtype)
    if kind == "dense":
        loss = dense_loss(case, text, audio, temperature, ids, teacher)
    else:
        loss = tiled_loss(case, BLOCKS[kind], text, audio, temperature, ids, teacher)
    return loss, list(torch.autograd.grad(loss, inputs))


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(sorted(CASES)),
    kind=st.sampled_from(["embedding", "stored"]),
    texts=st.integers(1, 13),
    audios=st.integers(1, 13),
    clips=st.integers(1, 30),
    stripe=st.integers(1, 14),
    rows=st.integers(1, 14),
    tau=st.floats(0.02, 2),
    seed=st.integers(0, 1000),
)
def test_tiled_equals_dense(
    name: str, kind: str, texts: int, audios: int, clips: int, stripe: int, rows: int, tau: float, seed: int
) -> None:
    """Any shape and any tiles; several positives a query, and none."""
    audios = texts if name in SQUARE else audios
    text, audio = vectors(texts, audios, seed)
    temperature = torch.tensor([tau], dtype=torch.float64, requires_grad=True)
    ids = random_ids(texts, audios, clips, seed)
    expected, expected_grads = run(name, "dense", text, audio, temperature, ids)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "STRIPE_COLUMNS", stripe)
        patch.setattr(tiles, "TILE_ROWS", rows)
        loss, grads = run(name, kind, text, audio, temperature, ids)
    assert abs(loss - expected) < 1e-11
    for got, want in zip(grads, expected_grads, strict=True):
        assert (got - want).abs().max() <= 1e-11 * (1 + want.abs().max())


@pytest.mark.parametrize("name", CASES)
def test_pairs_by_position(name: str) -> None:
    text, audio = vectors(300, 300, 0)  # more than one stripe of the real width
    for kind in ("embedding", "stored"):
        loss, grads = run(name, kind, text, audio, 0.07, None)
        expected, expected_grads = run(name, "dense", text, audio, 0.07, None)
        assert abs(loss - expected) < 1e-12
        assert max((g - e).abs().max() for g, e in zip(grads, expected_grads, strict=True)) < 1e-12


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_inputs_are_summed_in_fp32(name: str, dtype: torch.dtype) -> None:
    audios = 20 if name in SQUARE else 17
    text, audio = vectors(20, audios, 3, dtype)
    ids = random_ids(20, audios, 12, 3)
    wide = [x.detach().double().requires_grad_() for x in (text, audio)]
    expected, expected_grads = run(name, "dense", wide[0], wide[1], 0.05, ids)
    loss, grads = run(name, "embedding", text, audio, 0.05, ids)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-5)
    for got, want in zip(grads, expected_grads, strict=True):
        assert got.dtype == dtype
        slack = 1e-4 if dtype == torch.float32 else 2**-7
        assert (got - want).abs().max() <= slack * want.abs().max()


@pytest.mark.parametrize("name", CASES)
def test_a_temperature_is_a_number_or_a_tensor(name: str) -> None:
    text, audio = vectors(6, 6, 1)
    expected, _ = run(name, "dense", text, audio, 0.1, None)
    for shape in ((), (1,)):
        temperature = torch.full(shape, 0.1, dtype=torch.float64, requires_grad=True)
        loss, grads = run(name, "embedding", text, audio, temperature, None)
        assert loss.shape == () and abs(loss - expected) < 1e-12 and grads[2].shape == shape
    assert abs(run(name, "stored", text, audio, 0.1, None)[0] - expected) < 1e-12


@pytest.mark.parametrize("name", CASES)
def test_a_narrow_temperature_does_not_round_the_loss(name: str) -> None:
    """The model's temperature is fp32; with float64 scores the result is float64 as the dense one is."""
    text, audio = vectors(6, 6, 1)
    temperature = torch.tensor([0.07], requires_grad=True)
    loss, grads = run(name, "embedding", text, audio, temperature, None)
    expected, expected_grads = run(name, "dense", text, audio, temperature, None)
    assert loss.dtype == expected.dtype == torch.float64 and abs(loss - expected) < 1e-12
    assert grads[2].dtype == torch.float32 and grads[2].item() == pytest.approx(expected_grads[2].item(), rel=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_scores_are_left_as_they_are(name: str) -> None:
    text, audio = vectors(9, 9 if name in SQUARE else 6, 2)
    ids = random_ids(len(text), len(audio), 5, 0)
    teacher = unit(len(text), 5, 98), unit(len(audio), 5, 99)
    made: list[Tensor] = []

    def make(rows: Tensor, columns: Tensor) -> StoredScores:
        made.append((rows @ columns.T).detach().requires_grad_())
        return StoredScores(made[-1])

    def loss() -> Tensor:
        made.clear()
        return tiled_loss(name, make, text, audio, 0.1, ids, teacher)

    def gradients() -> list[Tensor]:
        return [scores.grad for scores in made if scores.grad is not None]

    if name == "intra_modal_local":
        return  # stores no scores
    loss().backward()
    first = gradients()
    assert first and torch.equal(made[0].detach(), (text @ (text if "intra" in name else audio).T).detach())
    (3 * loss()).backward()
    assert all(torch.allclose(a, 3 * b, rtol=1e-12) for a, b in zip(gradients(), first, strict=True))


@pytest.mark.parametrize("name", CASES)
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


def test_modality_scores_take_the_whole_gradient_on_their_side() -> None:
    """As much as rows and columns of plain scores receive together."""
    x, _ = vectors(7, 7, 4)
    ids = random_ids(7, 7, 4, 1)[0]
    for same in (None, (ids, ids)):
        (here,) = torch.autograd.grad(tiled.intra_modal(ModalityScores(x), 0.1, same), x)
        rows, columns = x.detach().clone().requires_grad_(), x.detach().clone().requires_grad_()
        loss = tiled.intra_modal(EmbeddingScores(rows, columns), 0.1, same)
        as_row, as_column = torch.autograd.grad(loss, (rows, columns))
        assert torch.allclose(here, as_row + as_column, atol=1e-14) and as_row.abs().max() > 1e-3


def test_distillation_from_itself_has_no_gradient() -> None:
    text, audio = vectors(8, 5, 0)
    temperature = torch.tensor([0.1], dtype=torch.float64, requires_grad=True)
    block = EmbeddingScores(text, audio)
    loss = tiled.distillation(block, block, temperature)
    assert all(g.abs().max() < 1e-14 for g in torch.autograd.grad(loss, (text, audio, temperature)))


def test_a_teacher_receives_no_gradient() -> None:
    text, audio = vectors(6, 6, 0)
    teacher = vectors(6, 6, 1)
    ids = random_ids(6, 6, 9, 0)
    in_text, in_audio = (ModalityScores(x) for x in teacher)
    for loss in (
        tiled.distillation(EmbeddingScores(text, audio), EmbeddingScores(*teacher), 0.1),
        tiled.cmsc(EmbeddingScores(text, audio), in_text, in_audio, 0.1, 0.3, 0.1, ids),
    ):
        loss.backward()
        assert text.grad is not None and all(x.grad is None for x in teacher)


def test_teachers_side_by_side_are_their_weighted_mean() -> None:
    """One table of vectors, each member's times the root of its weight, is the ensemble."""
    text, audio = vectors(7, 4, 0)
    members = [(unit(7, 3, 10), unit(4, 3, 11), 0.25), (unit(7, 5, 12), unit(4, 5, 13), 0.75)]
    of_texts = torch.cat([t * weight**0.5 for t, _, weight in members], 1)
    of_audios = torch.cat([a * weight**0.5 for _, a, weight in members], 1)
    loss = tiled.distillation(EmbeddingScores(text, audio), EmbeddingScores(of_texts, of_audios), 0.1)
    mean = torch.stack([weight * t @ a.T for t, a, weight in members]).sum(0)
    assert abs(loss - tiled.distillation(EmbeddingScores(text, audio), StoredScores(mean), 0.1)) < 1e-13


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0])
def test_contrast_plus_soft_term_is_one_soft_term(beta: float) -> None:
    """CE(I) + CE((1 - b) I + b Q) = 2 CE((1 - b/2) I + (b/2) Q), seen in the gradient: entropies are constant."""
    text, audio = vectors(9, 9, 0)
    in_text, in_audio = (ModalityScores(unit(9, 4, seed)) for seed in (7, 8))

    def soft(share: float) -> Tensor:
        return tiled.cmsc(EmbeddingScores(text, audio), in_text, in_audio, 0.1, share, 0.2)

    both = torch.autograd.grad(tiled.nt_xent(EmbeddingScores(text, audio), 0.1) + soft(beta), (text, audio))
    once = torch.autograd.grad(2 * soft(beta / 2), (text, audio))
    assert all(torch.allclose(a, b, atol=1e-13) for a, b in zip(both, once, strict=True))


def test_the_prior_by_the_batch_leaves_scores_at_omega_zero() -> None:
    """A uniform prior times its number of candidates is one."""
    text, audio = vectors(6, 9, 0)
    ids = random_ids(6, 9, 5, 0)
    uniform = tiled.pmr(EmbeddingScores(text, audio), 0.1, 0.0, ids, scale_by_batch=True)
    assert abs(uniform - tiled.nt_xent(EmbeddingScores(text, audio), 0.1, ids)) < 1e-13


def test_mistakes() -> None:
    text, audio = vectors(3, 4, 0)
    with pytest.raises(UserError, match="3 texts and 4 audios do not pair by position"):
        tiled.nt_xent(EmbeddingScores(text, audio), 0.1)
    with pytest.raises(UserError, match=r"need text ids \[3, k\] and audio ids \[4, k\], got \[3\] and \[4\]"):
        tiled.nt_xent(EmbeddingScores(text, audio), 0.1, (torch.zeros(3), torch.zeros(4)))
    with pytest.raises(UserError, match=r"cmsc needs as many texts as audios, got scores \[3, 4\]"):
        tiled.cmsc(scores := EmbeddingScores(text, audio), scores, scores, 0.1, 0.3, 0.1)
    with pytest.raises(UserError, match=r"text_block is \[4, 4\] and the scores are \[3, 3\]: they must agree"):
        tiled.cmsc(ModalityScores(text), ModalityScores(audio), ModalityScores(text), 0.1, 0.3, 0.1)
    with pytest.raises(UserError, match=r"teacher_block is \[3, 3\] and the scores are \[3, 4\]"):
        tiled.distillation(EmbeddingScores(text, audio), ModalityScores(text), 0.1)
    with pytest.raises(UserError, match=r"intra_modal needs samples against themselves, got \[3, 4\]"):
        tiled.intra_modal(EmbeddingScores(text, audio), 0.1)
    with pytest.raises(UserError, match="of one width d"):
        EmbeddingScores(text, audio[:, :3])
    with pytest.raises(UserError, match=r"stored scores need \[B, b\]"):
        StoredScores(torch.zeros(3))
