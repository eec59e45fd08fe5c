"""Scorers whose score is the cosine of one vector a caption and one vector a clip.

Shape suffixes: B texts, b audios, T frames, D width. The caption's vector is its encoder's `pooled`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from atr_scale.parallel.blocks import EmbeddingScores, ScoreBlock, at_least_fp32
from atr_scale.parallel.world import World
from atr_scale.scorers.scorer import Scorer
from atr_scale.sequence import TokenSequence


def pooled(audio: TokenSequence) -> Tensor:
    """The audio encoder's own summary, [B, D]."""
    return audio.pooled


def mean(audio: TokenSequence) -> Tensor:
    """Mean over real frames, [B, D]."""
    weight = audio.mask.to(audio.tokens.dtype).unsqueeze(-1)
    return (audio.tokens * weight).sum(1) / weight.sum(1).clamp(min=1)


def maximum(audio: TokenSequence) -> Tensor:
    """Largest value over real frames, [B, D]."""
    return audio.tokens.masked_fill(~audio.mask.unsqueeze(-1), -torch.inf).amax(1)


def mean_plus_max(audio: TokenSequence) -> Tensor:
    """Mean plus maximum over real frames (PANNs; the MeanMax of arXiv 2303.05681), [B, D]."""
    return mean(audio) + maximum(audio)


class CosineScorer(Scorer):
    """Cosine between the caption's pooled vector and the clip's frames pooled by `pool`."""

    factorised = True

    def __init__(self, pool: Callable[[TokenSequence], Tensor]) -> None:
        super().__init__()
        self.pool = pool
        self.reads_frames = pool is not pooled

    def embed_text(self, text: TokenSequence) -> Tensor:
        """Unit vectors [B, D], at least fp32 whatever the autocast."""
        return _unit(text.pooled)

    def embed_audio(self, audio: TokenSequence) -> Tensor:
        """Unit vectors [b, D], at least fp32 whatever the autocast."""
        return _unit(self.pool(audio))

    def block(self, text: TokenSequence, audio: TokenSequence, world: World | None = None) -> ScoreBlock:
        world = world or World.current()
        return EmbeddingScores(world.gather(self.embed_text(text)), self.embed_audio(audio), world)

    def scores(self, text: TokenSequence, audio: TokenSequence) -> Tensor:
        """[texts, audios] for any two sets in one process."""
        return self.embed_text(text) @ self.embed_audio(audio).T


def _unit(value: Tensor) -> Tensor:
    return normalize(at_least_fp32(value), dim=-1)
