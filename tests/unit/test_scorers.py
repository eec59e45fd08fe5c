"""Scorers of pooled vectors: padding, range, names."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from atr_scale.encoders import TokenSequence
from atr_scale.errors import UserError
from atr_scale.parallel.blocks import EmbeddingScores
from atr_scale.parallel.world import World
from atr_scale.scorers import SCORERS, build_scorer

DIM = 5
FRAMES = [4, 1, 6]


def sequence(lengths: list[int], total: int, filler: float, seed: int = 0) -> TokenSequence:
    """Clips of `lengths` frames in `total`, padded with `filler`."""
    generator = torch.Generator().manual_seed(seed)
    real = [torch.randn(n, DIM, generator=generator) - 1 for n in lengths]
    pooled = torch.randn(len(lengths), DIM, generator=generator)
    tokens = torch.full((len(lengths), total, DIM), filler)
    mask = torch.zeros(len(lengths), total, dtype=torch.bool)
    for row, frames in enumerate(real):
        tokens[row, : len(frames)], mask[row, : len(frames)] = frames, True
    return TokenSequence(tokens, mask, pooled)


def by_hand(name: str, audio: TokenSequence) -> Tensor:
    rows = []
    for tokens, mask, pooled in zip(audio.tokens, audio.mask, audio.pooled, strict=True):
        real = tokens[mask]
        mean, largest = real.mean(0), real.max(0).values
        rows.append({"pooled": pooled, "mean": mean, "max": largest, "meanmax": mean + largest}[name])
    return normalize(torch.stack(rows), dim=1)


@pytest.mark.parametrize("name", SCORERS)
def test_padding_does_not_count(name: str) -> None:
    scorer = build_scorer(name, dim=DIM)
    tight = sequence(FRAMES, 6, 0.0)
    expected = by_hand(name, tight)
    assert torch.allclose(scorer.embed_audio(tight), expected, atol=1e-6)
    for total, filler in ((6, 100.0), (11, 0.0), (11, -100.0)):
        assert torch.allclose(scorer.embed_audio(sequence(FRAMES, total, filler)), expected, atol=1e-6)


@pytest.mark.parametrize("name", SCORERS)
def test_scores_are_cosines_and_equal_the_block(name: str) -> None:
    scorer = build_scorer(name, dim=DIM)
    text, audio = sequence([3] * 7, 3, 0.0, seed=1), sequence(FRAMES, 6, 0.0)
    scores = scorer.scores(text, audio)
    assert scores.shape == (7, 3) and scores.abs().max() <= 1 + 1e-6
    assert torch.allclose(scores, normalize(text.pooled, dim=1) @ by_hand(name, audio).T, atol=1e-6)
    block = scorer.block(text, audio, World())
    assert isinstance(block, EmbeddingScores) and block.shape == (7, 3)
    assert torch.equal(block.stripe(slice(0, 3)), scores)


@pytest.mark.parametrize("name", SCORERS)
def test_a_vector_with_itself_scores_one_at_any_loudness(name: str) -> None:
    scorer = build_scorer(name, dim=DIM)
    audio = sequence(FRAMES, 6, 0.0)
    text = TokenSequence(audio.tokens, audio.mask, 37 * scorer.embed_audio(audio))
    assert torch.allclose(scorer.scores(text, audio).diagonal(), torch.ones(3), atol=1e-6)


@pytest.mark.parametrize("name", SCORERS)
def test_padding_gets_no_gradient(name: str) -> None:
    audio = sequence(FRAMES, 8, 0.5)
    tokens = audio.tokens.clone().requires_grad_()
    scorer = build_scorer(name, dim=DIM)
    text = sequence([3] * 2, 3, 0.0, seed=1)
    scorer.scores(
        text, TokenSequence(tokens, audio.mask, tokens.sum(1) if name == "pooled" else audio.pooled)
    ).sum().backward()
    if name != "pooled":
        assert tokens.grad is not None and tokens.grad[~audio.mask].eq(0).all() and tokens.grad[audio.mask].ne(0).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_unit_vectors_are_fp32_under_autocast(dtype: torch.dtype) -> None:
    audio = sequence(FRAMES, 6, 0.0)
    half = TokenSequence(audio.tokens.to(dtype), audio.mask, audio.pooled.to(dtype))
    for name in SCORERS:
        vectors = build_scorer(name, dim=DIM).embed_audio(half)
        assert vectors.dtype == torch.float32
        assert torch.allclose(vectors.norm(dim=1), torch.ones(3), atol=1e-6)


def test_unknown_names_and_options() -> None:
    with pytest.raises(UserError, match=r"unknown scorer 'meen': known are pooled, mean, max, meanmax"):
        build_scorer("meen", dim=DIM)
    with pytest.raises(UserError, match="'mean' does not take these options: heads"):
        build_scorer("mean", dim=DIM, heads=3)
