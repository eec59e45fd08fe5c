"""LGMM scores: loops over pairs, padding, independence, limits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from atr_scale.encoders import TokenSequence
from atr_scale.errors import UserError
from atr_scale.scorers import build_scorer, tiles
from tests.sequences import kept_numbers, random_sequence

DIM = 6
WORDS, FRAMES = [3, 1, 5, 2, 4], [4, 7, 1, 2, 3, 5, 6]
OPTIONS: list[dict[str, Any]] = [
    {"direction": direction, "normalise": normalise}
    for direction in ("frames_over_words", "words_over_frames", "both")
    for normalise in ("none", "clipped_l2", "clipped_l2_leaky")
]
SUM: dict[str, Any] = {"pooling": "log_sum_exp", "normalise": "clipped_l2_leaky"}  # of SCAN's code


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of two by two, the last ones not full."""
    monkeypatch.setattr(tiles, "CPU_TILE_NUMBERS", 4 * max(WORDS) * max(FRAMES) * 2)


def one_way(query: Tensor, context: Tensor, lambda1: float, lambda2: float, normalise: str, pooling: str) -> Tensor:
    """One pair, the paper's formulas one after the other: query [q, D] attends over context [c, D]."""
    similarity = cosine_similarity(query[:, None], context[None], dim=-1)
    logits = similarity
    if normalise != "none":
        leaky = torch.where(similarity > 0, similarity, 0.1 * similarity)
        clipped = leaky if normalise == "clipped_l2_leaky" else similarity.clamp(min=0)
        norm = clipped.square().sum(0).sqrt()
        logits = clipped / torch.where(norm > 0, norm, 1)
    weights = (lambda1 * logits).softmax(1)
    attended = weights @ (context / context.norm(dim=1, keepdim=True))
    exponentials = (lambda2 * cosine_similarity(query, attended, dim=1)).exp()
    return (exponentials.mean() if pooling == "log_mean_exp" else exponentials.sum()).log() / lambda2


def by_hand(
    text: TokenSequence,
    audio: TokenSequence,
    direction: str = "frames_over_words",
    normalise: str = "none",
    lambda1: float = 4.0,
    lambda2: float = 5.0,
    pooling: str = "log_mean_exp",
) -> Tensor:
    def score(i: int, j: int) -> Tensor:
        words, frames = text.tokens[i][text.mask[i]], audio.tokens[j][audio.mask[j]]
        rest = (lambda1, lambda2, normalise, pooling)
        found = {
            "frames_over_words": lambda: one_way(frames, words, *rest),
            "words_over_frames": lambda: one_way(words, frames, *rest),
            "both": lambda: (one_way(frames, words, *rest) + one_way(words, frames, *rest)) / 2,
        }
        return found[direction]()

    return torch.stack([torch.stack([score(i, j) for j in range(len(audio.mask))]) for i in range(len(text.mask))])


def inputs(**options: Any) -> tuple[TokenSequence, TokenSequence]:
    return random_sequence(WORDS, DIM, 1, **options), random_sequence(FRAMES, DIM, 2, **options)


@pytest.mark.parametrize("options", [*OPTIONS, {"lambda1": 9.0, "lambda2": 20.0}, SUM, {**SUM, "direction": "both"}])
def test_scores_and_gradients_equal_loops(options: dict[str, Any]) -> None:
    text, audio = inputs(extra=2, gradient=True)
    found, expected = build_scorer("lgmm", dim=DIM, **options).scores(text, audio), by_hand(text, audio, **options)
    assert found.shape == (len(WORDS), len(FRAMES)) and found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weight = torch.randn_like(expected)
    leaves = (text.tokens, audio.tokens)
    got, want = (
        torch.autograd.grad((found * weight).sum(), leaves),
        torch.autograd.grad((expected * weight).sum(), leaves),
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [*OPTIONS, {"lambda1": 40.0}, SUM])
def test_padding_and_companions_do_not_count(options: dict[str, Any]) -> None:
    scorer = build_scorer("lgmm", dim=DIM, **options)
    text, audio = inputs(filler=0.0)
    expected = scorer.scores(text, audio)
    torch.testing.assert_close(scorer.scores(*inputs(extra=3, filler=torch.nan)), expected, rtol=0, atol=1e-14)
    order = torch.tensor([5, 0, 6, 2])
    torch.testing.assert_close(scorer.scores(text, audio.take(order)), expected[:, order], rtol=0, atol=1e-14)
    rows = torch.tensor([4, 1])
    torch.testing.assert_close(scorer.scores(text.take(rows), audio), expected[rows], rtol=0, atol=1e-14)


def test_frames_that_say_the_same_score_the_same_at_any_length() -> None:
    """Log-mean-exp, by default: a clip repeated is no better a match. With log-sum-exp it is, by log 2 / lambda2."""
    text, audio = random_sequence([4], DIM, 1), random_sequence([5], DIM, 2)
    twice = TokenSequence(audio.tokens.repeat(1, 2, 1), audio.mask.repeat(1, 2), audio.pooled)
    scorer = build_scorer("lgmm", dim=DIM)
    torch.testing.assert_close(scorer.scores(text, twice), scorer.scores(text, audio), rtol=0, atol=1e-14)
    summed = build_scorer("lgmm", dim=DIM, pooling="log_sum_exp", lambda2=5.0)
    assert float(summed.scores(text, twice) - summed.scores(text, audio)) == pytest.approx(math.log(2) / 5, abs=1e-14)
    itself = TokenSequence(text.tokens[:, :1], text.mask[:, :1], text.pooled)
    assert abs(float(scorer.scores(itself, itself)) - 1) < 1e-14


@pytest.mark.parametrize("options", OPTIONS)
def test_nothing_to_attend_over_scores_zero(options: dict[str, Any]) -> None:
    """Without a single real word or frame, and with words that cancel out; gradients stay finite."""
    text, audio = inputs(gradient=True)
    text.mask[0], audio.mask[1] = False, False
    scores = build_scorer("lgmm", dim=DIM, **options).scores(text, audio)
    assert not scores[0].any() and not scores[:, 1].any() and scores[1:, 2:].all()
    scores.sum().backward()
    assert text.tokens.grad is not None and audio.tokens.grad is not None
    assert text.tokens.grad.isfinite().all() and audio.tokens.grad.isfinite().all()
    assert not text.tokens.grad[0].any() and not audio.tokens.grad[1].any()


def test_words_that_cancel_out_are_finite() -> None:
    frames = torch.tensor([[[0.0, 1.0]]], requires_grad=True)
    words = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]], requires_grad=True)
    text = TokenSequence(words, torch.ones(1, 2, dtype=torch.bool), words[:, 0])
    audio = TokenSequence(frames, torch.ones(1, 1, dtype=torch.bool), frames[:, 0])
    scores = build_scorer("lgmm", dim=2).scores(text, audio)
    scores.sum().backward()
    assert scores.abs() < 1e-6 and words.grad.isfinite().all() and frames.grad.isfinite().all()  # type: ignore[union-attr]


@pytest.mark.parametrize("options", OPTIONS)
def test_bf16_autocast_gives_fp32_scores(options: dict[str, Any]) -> None:
    text, audio = inputs()
    scorer = build_scorer("lgmm", dim=DIM, **options)
    expected = scorer.scores(text, audio)
    half_text, half_audio = (s.map(torch.Tensor.bfloat16, torch.Tensor.bfloat16) for s in (text, audio))
    half_text.tokens.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        scores = scorer.scores(half_text, half_audio)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), expected, rtol=0, atol=0.02)
    scores.sum().backward()
    assert half_text.tokens.grad is not None and half_text.tokens.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("options", OPTIONS)
def test_nothing_a_pair_is_kept_for_the_backward_pass(options: dict[str, Any]) -> None:
    scorer = build_scorer("lgmm", dim=DIM, **options)

    def kept(factor: int) -> int:
        text = random_sequence(WORDS * factor, DIM, 1, gradient=True)
        audio = random_sequence(FRAMES * factor, DIM, 2, gradient=True)
        return kept_numbers(lambda: scorer.scores(text, audio))

    assert kept(4) <= 4 * kept(1)  # tokens are four times as many, pairs sixteen times


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("lambda1", 0.0),
        ("lambda2", -1.0),
        ("lambda2", float("inf")),
        ("direction", "up"),
        ("normalise", "l1"),
        ("pooling", "max"),
    ],
)
def test_options_out_of_range(option: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"^options of the scorer lgmm: '{option}': Input should be .*, got "):
        build_scorer("lgmm", dim=DIM, **{option: value})
