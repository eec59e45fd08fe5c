"""Text-aware scorers, forward and backward, against plain implementations that hold a vector for every pair.

Shape suffixes: i texts, j clips, f frames, n words, D width, K attention width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, layer_norm, linear, normalize

from atr_scale.batch import TokenSequence
from atr_scale.scorers import build_scorer, tiles
from atr_scale.scorers.scorer import Scorer
from tools.bench.measure import Function, peak_mib, seconds
from tools.bench.table import Row, run

Scores = Callable[[TokenSequence, TokenSequence], Tensor]


def rows() -> Iterator[Row]:
    yield from text_aware_pooling("TAP, 384 x 384, 32 frames", 384, 384, 32, {}, time=0.10, memory=1 / 15)
    yield from text_aware_pooling("TAP with residual block, 256 x 256", 256, 256, 32, {"residual": True})
    yield from text_aware_pooling("TAP, 256 x 32, 750 frames (no Gram matrices)", 256, 32, 750, {})
    yield from local_global(128)
    yield from co_attention(8, tiles_a_side=1)
    yield from co_attention(8, tiles_a_side=2)


def text_aware_pooling(
    name: str, texts: int, clips: int, frames: int, options: dict[str, bool], **targets: float
) -> Iterator[Row]:
    """D = 1024, K = 512."""
    scorer: Any = build_scorer("tap", 1024, attention_dim=512, **options)
    text, audio = sequence(texts, 1, 1024), sequence(clips, frames, 1024)
    naive = partial(naive_pooling, scorer)
    yield from compare(name, scorer, naive, "a vector a pair [i, j, D]", text, audio, **targets)


def naive_pooling(scorer: Any, text: TokenSequence, audio: TokenSequence) -> Tensor:
    """X-Pool's pooling block as it is usually written, with the scorer's parameters."""
    w = scorer.weights
    width = (w.dim,)
    sentence, frames = (layer_norm(x, width, w.norm_scale, w.norm_shift) for x in (text.pooled, audio.tokens))
    query, key, value = linear(sentence, w.query), linear(frames, w.key), linear(frames, w.value)
    logits = torch.einsum("ik,jfk->ijf", query, key) / math.sqrt(w.attention_dim)
    weight = logits.masked_fill(~audio.mask, -torch.inf).softmax(-1)
    pooled = torch.einsum("ijf,jfk->ijk", weight, value) @ w.out  # [i, j, D]
    if w.residual:
        pooled = layer_norm(pooled, width, w.inner_scale, w.inner_shift)
        pooled = pooled + linear(pooled, w.linear_weight, w.linear_bias)
    pooled = layer_norm(pooled, width, w.scale, w.shift)
    return torch.einsum("ijd,id->ij", normalize(pooled, dim=-1), normalize(text.pooled, dim=-1))


def local_global(batch: int) -> Iterator[Row]:
    """20 words, 32 frames, D = 512."""
    scorer = build_scorer("lgmm", 512)
    text, audio = sequence(batch, 20, 512), sequence(batch, 32, 512)
    naive = partial(naive_local_global, scorer)
    name = f"LGMM, {batch} x {batch}, 20 words, 32 frames"
    other = "a vector a frame and text [i, j, f, D]"
    yield from compare(name, scorer, naive, other, text, audio, time=0.7, memory=1 / 15)


def naive_local_global(scorer: Any, text: TokenSequence, audio: TokenSequence) -> Tensor:
    words, frames = (normalize(x.tokens, dim=-1) for x in (text, audio))
    weight = (scorer.lambda1 * torch.einsum("ind,jfd->ijfn", words, frames)).softmax(-1)
    attended = weight @ words.unsqueeze(1)  # [i, j, f, D]
    found = scorer.lambda2 * cosine_similarity(attended, frames, dim=-1)
    scores: Tensor = (found.logsumexp(-1) - math.log(frames.shape[1])) / scorer.lambda2
    return scores


def co_attention(batch: int, tiles_a_side: int) -> Iterator[Row]:
    """MCAN's small model on 20 words and 32 frames; the graph of one tile is kept, all others are computed again."""
    scorer = build_scorer("coattention", 768, dropout=0.0, pairs_per_tile=(batch // tiles_a_side) ** 2)
    text, audio = sequence(batch, 20, 768), sequence(batch, 32, 768)

    def kept(text: TokenSequence, audio: TokenSequence) -> Tensor:
        with patch.object(tiles, "recomputed", lambda function, *arguments: function(*arguments)):
            return scorer.scores(text, audio)

    name = f"Co-attention, {batch} x {batch} in {tiles_a_side**2} tiles"
    yield from compare(name, scorer, kept, "all activations kept", text, audio)


def compare(
    name: str,
    scorer: Scorer,
    other: Scores,
    other_name: str,
    text: TokenSequence,
    audio: TokenSequence,
    time: float | None = None,
    memory: float | None = None,
) -> Iterator[Row]:
    """Rows of time and memory of a training step's part, after a check that both sides compute the same."""
    with torch.no_grad():
        torch.testing.assert_close(scorer.scores(text, audio), other(text, audio), rtol=0, atol=1e-4)
    leaves = [text.pooled, text.tokens, audio.tokens, *scorer.parameters()]

    def step(scores: Scores) -> Function:
        def forward_and_backward() -> None:
            scores(text, audio).square().sum().backward()
            for leaf in leaves:
                leaf.grad = None

        return forward_and_backward

    ours, theirs = step(scorer.scores), step(other)
    our_time, their_time = seconds(ours, theirs, repeats=2)
    yield Row(f"{name}: time", our_time, their_time, other_name, "s", time)
    yield Row(f"{name}: memory", peak_mib(ours), peak_mib(theirs), other_name, "MiB", memory)


def sequence(rows: int, tokens: int, dim: int) -> TokenSequence:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mask = torch.ones(rows, tokens, dtype=torch.bool, device=device)
    values = torch.randn(rows, tokens, dim, device=device, requires_grad=True)
    return TokenSequence(values, mask, torch.randn(rows, dim, device=device, requires_grad=True))


if __name__ == "__main__":
    run(__doc__, rows)
