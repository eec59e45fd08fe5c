"""Scorers with one vector a caption and a clip; and what every scorer promises, on these and on text-aware pooling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from atr_scale.batch import TokenSequence
from atr_scale.distributed.world import World
from atr_scale.errors import UserError
from atr_scale.score_block import EmbeddingScores, StoredScores
from atr_scale.scorers import SCORERS, build_scorer, tiles
from atr_scale.scorers.scorer import Scorer, gather_sequence
from tests.sequences import random_sequence

DIM = 5
WORDS, FRAMES = [3, 1, 2, 3, 2, 1, 3], [4, 1, 6]
OPTIONS = {"netrvlad": {"num_clusters": 3}, "attention": {"hidden_dim": 4}, "tap": {"attention_dim": 3}}
DUAL_ENCODERS = ["pooled", "mean", "max", "meanmax", "netrvlad", "attention"]
ALL = [*DUAL_ENCODERS, "tap"]


def build(name: str) -> Scorer:
    """In float64, with parameters far from their start."""
    scorer = build_scorer(name, dim=DIM, **OPTIONS.get(name, {})).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in scorer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return scorer


def by_hand(name: str, pool: Any, frames: Tensor, pooled: Tensor) -> Tensor:
    """The vector of one clip [D] from its real frames [T, D]."""
    mean, largest = frames.mean(0), frames.max(0).values
    if name == "attention":
        first, _, second = pool.weigh
        logits = [second.weight[0] @ (first.weight @ frame + first.bias).relu() + second.bias[0] for frame in frames]
        weights = torch.stack(logits).exp() / torch.stack(logits).exp().sum()
        return sum(weight * frame for weight, frame in zip(weights, frames, strict=True))
    if name == "netrvlad":
        shares = [(pool.assign.weight @ frame + pool.assign.bias).softmax(0) for frame in frames]
        clusters = [
            sum(share[cluster] * frame for share, frame in zip(shares, frames, strict=True))
            for cluster in range(len(pool.assign.bias))
        ]
        joined = torch.cat([cluster / cluster.norm() for cluster in clusters])
        return pool.project.weight @ (joined / joined.norm())
    return {"pooled": pooled, "mean": mean, "max": largest, "meanmax": mean + largest}[name]


def reference(name: str, scorer: Scorer, text: TokenSequence, audio: TokenSequence) -> Tensor:
    vectors = [
        by_hand(name, scorer.pool, tokens[mask], pooled)
        for tokens, mask, pooled in zip(audio.tokens, audio.mask, audio.pooled, strict=True)
    ]
    return normalize(text.pooled, dim=1) @ torch.stack([v / v.norm() for v in vectors]).T


@pytest.mark.parametrize("name", DUAL_ENCODERS)
def test_scores_and_gradients_equal_loops(name: str) -> None:
    scorer = build(name)
    text = random_sequence(WORDS, DIM, 1)
    audio = random_sequence(FRAMES, DIM, 2, extra=2, gradient=True)
    leaves = [audio.tokens, text.pooled.requires_grad_(), audio.pooled.requires_grad_(), *scorer.parameters()]
    found, expected = scorer.scores(text, audio), reference(name, scorer, text, audio)
    assert found.shape == (len(WORDS), len(FRAMES))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weight = torch.randn(found.shape, dtype=torch.float64)
    gradients = [
        torch.autograd.grad((scores * weight).sum(), leaves, allow_unused=True) for scores in (found, expected)
    ]
    for got, want in zip(*gradients, strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", DUAL_ENCODERS)
def test_an_embedding_block_holds_the_scores(name: str) -> None:
    scorer, text, audio = build(name), random_sequence(WORDS, DIM, 1), random_sequence(FRAMES, DIM, 2)
    block = scorer.block(text, audio, World())
    assert scorer.is_dual_encoder and isinstance(block, EmbeddingScores) and block.shape == (len(WORDS), len(FRAMES))
    scores = scorer.scores(text, audio)
    assert torch.equal(block.stripe(slice(0, len(FRAMES))), scores) and scores.abs().max() <= 1 + 1e-12
    assert torch.equal(scorer.embed_text(text) @ scorer.embed_audio(audio).T, scores)


@pytest.mark.parametrize("name", ALL)
def test_padding_does_not_count(name: str) -> None:
    scorer, text = build(name), random_sequence(WORDS, DIM, 1)
    expected = scorer.scores(text, random_sequence(FRAMES, DIM, 2))
    for extra, filler in ((0, 1e3), (5, 0.0), (5, -1e3)):
        audio = random_sequence(FRAMES, DIM, 2, extra=extra, filler=filler, gradient=True)
        scores = scorer.scores(text, audio)
        torch.testing.assert_close(scores, expected, rtol=0, atol=1e-12)
        if scorer.reads_audio_tokens:
            (gradient,) = torch.autograd.grad(scores.sum(), audio.tokens)
            assert gradient[~audio.mask].eq(0).all() and gradient[audio.mask].ne(0).any()


@pytest.mark.parametrize("name", ALL)
def test_a_score_depends_on_its_pair_alone(name: str) -> None:
    scorer, text, audio = build(name), random_sequence(WORDS, DIM, 1), random_sequence(FRAMES, DIM, 2)
    scores = scorer.scores(text, audio)
    rows, columns = torch.tensor([6, 0, 3]), torch.tensor([2, 0])
    torch.testing.assert_close(
        scorer.scores(text.take(rows), audio.take(columns)), scores[rows][:, columns], rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("name", ALL)
def test_a_clip_without_frames_gives_no_nan(name: str) -> None:
    scorer, text, audio = build(name), random_sequence(WORDS, DIM, 1), random_sequence(FRAMES, DIM, 2, gradient=True)
    audio = TokenSequence(audio.tokens, audio.mask & torch.tensor([[True], [False], [True]]), audio.pooled)
    scores = scorer.scores(text, audio)
    expected = scorer.scores(text, audio.take(torch.tensor([0, 2])))
    torch.testing.assert_close(scores[:, [0, 2]], expected, rtol=0, atol=1e-12)
    if not scorer.reads_audio_tokens:
        return
    assert scores[:, 1].eq(0).all()
    for gradient in torch.autograd.grad(scores.sum(), [audio.tokens, *scorer.parameters()]):
        assert gradient.isfinite().all() and gradient.abs().max() < 1e6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ALL)
def test_scores_are_fp32_whatever_the_autocast(name: str, dtype: torch.dtype) -> None:
    scorer, text, audio = build(name).float(), random_sequence(WORDS, DIM, 1), random_sequence(FRAMES, DIM, 2)
    half = [TokenSequence(s.tokens.to(dtype), s.mask, s.pooled.to(dtype)) for s in (text, audio)]
    wide = [TokenSequence(s.tokens.float(), s.mask, s.pooled.float()) for s in half]
    with torch.autocast("cpu", torch.bfloat16):
        found = scorer.scores(*half)
        block = scorer.block(half[0], half[1], World())
    stripe = block.stripe(slice(0, 3))
    assert found.dtype == stripe.dtype == torch.float32
    # Means and sums over frames may round in the dtype of the frames; a product rounded so would be off by more.
    tolerance = 1e-6 if name not in ("mean", "meanmax") else {torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(found, scorer.scores(*wide), rtol=0, atol=tolerance)
    torch.testing.assert_close(stripe, found, rtol=0, atol=1e-6)


def test_pairwise_scorers_store_their_block_and_embed_nothing() -> None:
    scorer, text, audio = build("tap"), random_sequence(WORDS, DIM, 1), random_sequence(FRAMES, DIM, 2)
    block = scorer.block(text, audio, World())
    assert isinstance(block, StoredScores) and torch.equal(block.scores, scorer.scores(text, audio))
    for embed, sequence in ((scorer.embed_text, text), (scorer.embed_audio, audio)):
        with pytest.raises(UserError, match="TextAwarePoolingScorer is a pairwise scorer, without embeddings"):
            embed(sequence)


def test_words_travel_only_where_they_are_read() -> None:
    text = random_sequence(WORDS, DIM, 1)
    assert gather_sequence(text, World(), with_tokens=False).tokens.shape == (len(WORDS), 0, DIM)
    gathered = gather_sequence(text, World(), with_tokens=True)
    assert torch.equal(gathered.tokens, text.tokens) and torch.equal(gathered.mask, text.mask)


def test_tiles_follow_the_memory_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On any device that is no CPU: a power of two numbers, all texts beside few clips, and all pairs once."""
    like = torch.empty(0, device="meta")
    for free, numbers in ((2**36, 2**28), (2**36 - 1, 2**27), (0, 1)):
        monkeypatch.setattr(tiles, "free_device_memory", lambda device, free=free: free)
        assert tiles.tile_numbers(like) == numbers and tiles.kept_bytes(like.device) == free // 2
        for texts, clips in ((32768, 4096), (7, 3)) if free else ((7, 3),):
            found = tiles.pair_tiles(texts, clips, 32, like)
            assert sum((r.stop - r.start) * (c.stop - c.start) for r, c in found) == texts * clips
            largest = max((r.stop - r.start) * (c.stop - c.start) for r, c in found)
            assert largest * 32 <= max(numbers, 32)
            assert numbers < 2**27 or all(r == slice(0, texts) for r, _ in found)


def test_unknown_names_and_options() -> None:
    with pytest.raises(UserError, match=rf"unknown scorer 'meen': known are {', '.join(SCORERS)}"):
        build_scorer("meen", dim=DIM)
    for name, options, message in (
        ("mean", {"heads": 3}, "options of the scorer mean: unknown key 'heads'; known keys: none"),
        ("netrvlad", {"clusters": 3}, r"netrvlad: unknown key 'clusters'; did you mean 'num_clusters'\?"),
        ("netrvlad", {"num_clusters": "few"}, "'num_clusters': Input should be a valid integer.*, got 'few'"),
        ("netrvlad", {"num_clusters": 0}, "'num_clusters': Input should be greater than or equal to 1, got 0"),
        ("attention", {"hidden_dim": 0}, "'hidden_dim': Input should be greater than or equal to 1, got 0"),
    ):
        with pytest.raises(UserError, match=message):
            build_scorer(name, dim=DIM, **options)
