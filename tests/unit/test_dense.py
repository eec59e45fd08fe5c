"""The reference formulas against sums written out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn.functional import cross_entropy

from atr_scale.errors import UserError
from atr_scale.losses import dense

S = [[0.9, 0.2, -0.1], [0.1, 0.8, 0.3], [0.4, -0.2, 0.7]]
TEACHER = [[0.5, 0.1, 0.3], [0.0, 0.6, 0.2], [0.1, 0.4, 0.9]]
TEXTS = [[1.0, 0.3, 0.1], [0.3, 1.0, 0.2], [0.1, 0.2, 1.0]]
AUDIOS = [[1.0, 0.6, 0.0], [0.6, 1.0, -0.3], [0.0, -0.3, 1.0]]
TAU = 0.5
N = range(3)

Matrix = list[list[float]]


def tensor(values: Matrix) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def transposed(m: Matrix) -> Matrix:
    return [[m[i][j] for i in range(len(m))] for j in range(len(m[0]))]


def softmax(row: list[float]) -> list[float]:
    total = sum(math.exp(v) for v in row)
    return [math.exp(v) / total for v in row]


def scaled(m: Matrix, factor: float) -> Matrix:
    return [[factor * v for v in row] for row in m]


def soft_ce(logits: Matrix, target: Matrix) -> float:
    """Mean over rows of minus sum_j target_ij log softmax(logits_i)_j."""
    rows = [
        -sum(t * math.log(p) for t, p in zip(target[i], softmax(logits[i]), strict=True)) for i in range(len(logits))
    ]
    return sum(rows) / len(rows)


def entropy(target: Matrix) -> float:
    return -sum(t * math.log(t) for row in target for t in row if t > 0) / len(target)


IDENTITY = [[1.0 if i == j else 0.0 for j in N] for i in N]


def check(value: Tensor, t2a: float, a2t: float, t2a_share: float = 0.5) -> None:
    assert value.shape == ()
    assert value.item() == pytest.approx(t2a_share * t2a + (1 - t2a_share) * a2t, abs=1e-12)


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_nt_xent_by_hand(share: float) -> None:
    logits = scaled(S, 1 / TAU)
    value = dense.nt_xent(tensor(S), TAU, t2a_share=share)
    check(value, soft_ce(logits, IDENTITY), soft_ce(transposed(logits), IDENTITY), share)


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_pmr_by_hand(share: float) -> None:
    omega = 3.0
    over_texts = transposed([softmax([omega * v for v in column]) for column in transposed(S)])
    over_audios = [softmax([omega * v for v in row]) for row in S]
    t2a = [[S[i][j] * over_texts[i][j] / TAU for j in N] for i in N]
    a2t = [[S[i][j] * over_audios[i][j] / TAU for j in N] for i in N]
    value = dense.pmr(tensor(S), TAU, omega, t2a_share=share)
    check(value, soft_ce(t2a, IDENTITY), soft_ce(transposed(a2t), IDENTITY), share)


def test_pmr_by_hand_scaled_by_the_batch() -> None:
    """CAMoE: each prior times the number of candidates it is spread over, here two texts and three audios."""
    omega, scores = 0.5, S[:2]
    over_texts = transposed([softmax([omega * v for v in column]) for column in transposed(scores)])
    over_audios = [softmax([omega * v for v in row]) for row in scores]
    t2a = [[2 * scores[i][j] * over_texts[i][j] / TAU for j in N] for i in range(2)]
    a2t = [[3 * scores[i][j] * over_audios[i][j] / TAU for j in N] for i in range(2)]
    positives = [[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]
    rows = [[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]]
    value = dense.pmr(tensor(scores), TAU, omega, tensor(positives), scale_by_batch=True)
    check(value, soft_ce(t2a, rows), soft_ce(transposed(a2t), transposed(positives)))


def test_distillation_by_hand() -> None:
    rows = [softmax([v / TAU for v in row]) for row in TEACHER]
    columns = [softmax([v / TAU for v in column]) for column in transposed(TEACHER)]
    logits = scaled(S, 1 / TAU)
    value = dense.distillation(tensor(S), tensor(TEACHER), TAU)
    check(value, soft_ce(logits, rows), soft_ce(transposed(logits), columns))


@pytest.mark.parametrize("share", [0.5, 0.8])
@pytest.mark.parametrize("mode", ["each", "add"])
def test_cmsc_by_hand(mode: Literal["each", "add"], share: float) -> None:
    beta, target_tau = 0.3, 0.2
    mean = [[(TEXTS[i][j] + AUDIOS[i][j]) / 2 for j in N] for i in N]
    guides = (TEXTS, AUDIOS) if mode == "each" else (mean, mean)
    soft = [[softmax([v / target_tau for v in row]) for row in guide] for guide in guides]
    t2a, a2t = ([[(1 - beta) * IDENTITY[i][j] + beta * q[i][j] for j in N] for i in N] for q in soft)
    logits = scaled(S, 1 / TAU)
    value = dense.cmsc(tensor(S), tensor(TEXTS), tensor(AUDIOS), TAU, beta, target_tau, mode=mode, t2a_share=share)
    check(value, soft_ce(logits, t2a) - entropy(t2a), soft_ce(transposed(logits), a2t) - entropy(a2t), share)


def test_intra_modal_by_hand() -> None:
    logits = scaled(AUDIOS, 1 / TAU)
    value = soft_ce(logits, IDENTITY)
    check(dense.intra_modal(tensor(AUDIOS), TAU), value, value)


def test_intra_modal_leaves_out_the_same_clip() -> None:
    """With clips 0 and 1 the same, each meets only clip 2; their mutual score does not matter."""
    same = torch.eye(3, dtype=torch.bool)
    same[0, 1] = same[1, 0] = True
    pair = [[AUDIOS[i][i] / TAU, AUDIOS[i][2] / TAU] for i in (0, 1)]
    third = scaled([AUDIOS[2]], 1 / TAU)
    value = (2 * soft_ce(pair, [[1.0, 0.0]] * 2) + soft_ce(third, [IDENTITY[2]])) / 3
    scores = tensor(AUDIOS).requires_grad_()
    loss = dense.intra_modal(scores, TAU, same)
    check(loss, value, value)
    loss.backward()
    assert scores.grad is not None and scores.grad[0, 1] == scores.grad[1, 0] == 0 and scores.grad.isfinite().all()
    louder = tensor(AUDIOS)
    louder[0, 1] = louder[1, 0] = 0.99
    assert dense.intra_modal(louder, TAU, same) == loss


def test_nt_xent_is_cross_entropy() -> None:
    torch.manual_seed(0)
    scores, target = torch.randn(7, 7, dtype=torch.float64), torch.arange(7)
    expected = (cross_entropy(scores / 0.07, target) + cross_entropy(scores.T / 0.07, target)) / 2
    assert dense.nt_xent(scores, 0.07).item() == pytest.approx(expected.item(), abs=1e-12)
    assert dense.nt_xent(scores, 0.07, torch.eye(7, dtype=torch.bool)) == dense.nt_xent(scores, 0.07)


def test_several_positives_share_a_query() -> None:
    """Normalised per text for t2a, per audio for a2t; a query without one adds nothing, and counts in the mean."""
    positives = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    torch.manual_seed(1)
    scores = torch.randn(3, 4, dtype=torch.float64)
    rows, columns = (scores / TAU).log_softmax(1), (scores / TAU).log_softmax(0)
    t2a = -((rows[0, 0] + rows[0, 1]) / 2 + rows[1, 1]) / 3
    a2t = -(columns[0, 0] + (columns[0, 1] + columns[1, 1]) / 2) / 4
    check(dense.nt_xent(scores, TAU, positives), t2a.item(), a2t.item())


def test_a_mean_over_pairs() -> None:
    """As salsa's code: in each direction the mean over the positive pairs of a batch, however many a query has."""
    positives = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    torch.manual_seed(1)
    scores = torch.randn(3, 4, dtype=torch.float64)
    over_audios, over_texts = (scores / TAU).log_softmax(1), (scores / TAU).log_softmax(0)
    t2a, a2t = (-(x[0, 0] + x[0, 1] + x[1, 1]).item() / 3 for x in (over_audios, over_texts))
    check(dense.nt_xent(scores, TAU, positives, positives_mean="pairs"), t2a, a2t)
    t2a_logits, a2t_logits = (scores * (3.0 * scores).softmax(dim) / TAU for dim in (0, 1))
    t2a, a2t = (-x[positives].mean().item() for x in (t2a_logits.log_softmax(1), a2t_logits.log_softmax(0)))
    check(dense.pmr(scores, TAU, 3.0, positives, positives_mean="pairs"), t2a, a2t)


def test_both_means_agree_if_all_queries_have_equally_many_positives() -> None:
    scores = tensor(S)
    assert dense.nt_xent(scores, TAU, positives_mean="pairs") == dense.nt_xent(scores, TAU)


def test_the_prior_of_pmr_needs_both_directions() -> None:
    """Text 0 finds its audio, but the audio prefers text 1: the revised logit of the pair must drop."""
    omega = 10.0
    scores = tensor([[0.6, 0.1, 0.0], [0.9, 0.7, 0.1], [0.0, 0.1, 0.8]])
    assert scores[0].argmax() == 0 and scores[:, 0].argmax() == 1
    over_texts, over_audios = (omega * scores).softmax(0), (omega * scores).softmax(1)
    # As printed, the prior of t2a runs along its own row, where it only repeats what the row says already.
    assert over_texts[0, 0] < 0.1 and over_audios[0, 0] > 0.9
    target = torch.arange(3)
    t2a = cross_entropy(scores * over_texts / TAU, target)
    a2t = cross_entropy((scores * over_audios / TAU).T, target)
    assert dense.pmr(scores, TAU, omega).item() == pytest.approx(((t2a + a2t) / 2).item(), abs=1e-12)
    literal = cross_entropy(scores * over_audios / TAU, target) + cross_entropy((scores * over_texts / TAU).T, target)
    assert abs(dense.pmr(scores, TAU, omega) - literal / 2) > 0.01


def test_a_detached_prior_changes_the_gradient_alone() -> None:
    values: list[float] = []
    grads: list[Tensor] = []
    for detach in (False, True):
        scores = tensor(S).requires_grad_()
        loss = dense.pmr(scores, TAU, 5.0, detach_prior=detach)
        values.append(loss.item())
        grads += torch.autograd.grad(loss, scores)
    assert values[0] == values[1] and not torch.allclose(grads[0], grads[1], atol=1e-3)


def test_distillation_from_itself_has_no_gradient() -> None:
    scores = tensor(S).requires_grad_()
    temperature = torch.tensor([0.1], dtype=torch.float64, requires_grad=True)
    dense.distillation(scores, scores, temperature).backward()
    assert scores.grad is not None and scores.grad.abs().max() < 1e-15
    teacher = tensor(TEACHER).requires_grad_()
    dense.distillation(tensor(S).requires_grad_(), teacher, TAU).backward()
    assert teacher.grad is None


def test_cmsc_without_soft_targets_is_nt_xent() -> None:
    """beta 0: the targets are one-hot and their entropy zero."""
    value = dense.cmsc(tensor(S), tensor(TEXTS), tensor(AUDIOS), TAU, 0.0, 0.1)
    assert value.item() == pytest.approx(dense.nt_xent(tensor(S), TAU).item(), abs=1e-12)


def test_the_temperature_of_the_targets_is_constant() -> None:
    temperature = torch.tensor([0.2], dtype=torch.float64, requires_grad=True)
    scores = tensor(S).requires_grad_()
    dense.cmsc(scores, tensor(TEXTS), tensor(AUDIOS), TAU, 0.3, temperature).backward()
    assert temperature.grad is None and scores.grad is not None


def test_cmsc_with_its_own_targets_is_zero() -> None:
    """A divergence: at beta 1, the logits' own similarities as targets leave nothing to learn."""
    symmetric = tensor(AUDIOS)
    assert dense.cmsc(symmetric, symmetric, symmetric, TAU, 1.0, TAU).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0])
def test_contrast_plus_soft_term_is_one_soft_term(beta: float) -> None:
    """CE(I) + CE((1 - b) I + b Q) = 2 CE((1 - b/2) I + (b/2) Q), seen in the gradient: entropies are constant."""

    def gradient(loss: Callable[[Tensor], Tensor]) -> Tensor:
        scores = tensor(S).requires_grad_()
        loss(scores).backward()
        assert scores.grad is not None
        return scores.grad

    def soft(scores: Tensor, b: float) -> Tensor:
        return dense.cmsc(scores, tensor(TEXTS), tensor(AUDIOS), TAU, b, 0.2)

    both = gradient(lambda s: dense.nt_xent(s, TAU) + soft(s, beta))
    assert torch.allclose(both, gradient(lambda s: 2 * soft(s, beta / 2)), atol=1e-14)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "nt_xent": lambda s, t: dense.nt_xent(s, t),
    "pmr": lambda s, t: dense.pmr(s, t, 3.0),
    "distillation": lambda s, t: dense.distillation(s, tensor(TEACHER).to(s.dtype), t.detach()),
    "cmsc": lambda s, t: dense.cmsc(s, tensor(TEXTS).to(s.dtype), tensor(AUDIOS).to(s.dtype), t, 0.3, 0.2),
    "intra_modal": lambda s, t: dense.intra_modal(s, t),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients(name: str) -> None:
    temperature = torch.tensor([TAU], dtype=torch.float64, requires_grad=name != "distillation")
    assert gradcheck(LOSSES[name], (tensor(S).requires_grad_(), temperature))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_narrow_scores_are_computed_with_in_fp32(name: str, dtype: torch.dtype) -> None:
    """Exactly what the same scores give when they are widened first; no further rounding on the way."""
    options = [tensor(m).to(dtype) for m in (TEACHER, TEXTS, AUDIOS)]
    losses: dict[str, Callable[..., Tensor]] = {
        "nt_xent": lambda s, *_: dense.nt_xent(s, 0.05),
        "pmr": lambda s, *_: dense.pmr(s, 0.05, 3.0),
        "distillation": lambda s, teacher, *_: dense.distillation(s, teacher, 0.05),
        "cmsc": lambda s, _, text, audio: dense.cmsc(s, text, audio, 0.05, 0.3, 0.2),
        "intra_modal": lambda s, *_: dense.intra_modal(s, 0.05),
    }
    scores = tensor(S).to(dtype).requires_grad_()
    loss = losses[name](scores, *options)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert scores.grad is not None and scores.grad.dtype == dtype and scores.grad.isfinite().all()
    assert loss.item() == losses[name](scores.detach().float(), *(o.float() for o in options)).item()


@pytest.mark.parametrize("temperature", [0.05, torch.tensor(0.05), torch.tensor([0.05])])
def test_a_temperature_is_a_number_or_a_tensor(temperature: float | Tensor) -> None:
    for loss in (dense.nt_xent(tensor(S), temperature), dense.pmr(tensor(S), temperature, 3.0)):
        assert loss.shape == () and loss.isfinite()


def test_mistakes() -> None:
    with pytest.raises(UserError, match=r"scores \[2, 3\] do not pair by position: give positives"):
        dense.nt_xent(torch.zeros(2, 3), 0.1)
    with pytest.raises(UserError, match=r"positives \[3, 3\] and scores \[2, 3\] differ in shape"):
        dense.nt_xent(torch.zeros(2, 3), 0.1, torch.eye(3))
    with pytest.raises(UserError, match="cmsc needs as many texts as audios"):
        dense.cmsc(torch.zeros(2, 3), torch.eye(2), torch.eye(3), 0.1, 0.5, 0.1)
