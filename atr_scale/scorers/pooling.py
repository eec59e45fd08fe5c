"""Dual encoders: the score is the cosine of an embedding of the caption and an embedding of the clip.

Shape suffixes: B texts, b audios, T frames, D width, C clusters. The caption's embedding is `pooled` of its
encoder.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import normalize

from atr_scale.batch import TokenSequence
from atr_scale.distributed.world import World
from atr_scale.products import product
from atr_scale.score_block import EmbeddingScores, ScoreBlock, at_least_fp32
from atr_scale.scorers.scorer import Scorer, exact_products
from atr_scale.sections import Count, Section


def pooled(audio: TokenSequence) -> Tensor:
    """The audio encoder's own summary, [b, D]."""
    return audio.pooled


def mean(sequence: TokenSequence) -> Tensor:
    """Mean over real tokens, [b, D]; zero if there are none."""
    weight = sequence.mask.to(sequence.tokens.dtype).unsqueeze(-1)
    return (sequence.tokens * weight).sum(1) / weight.sum(1).clamp(min=1)


def maximum(audio: TokenSequence) -> Tensor:
    """Largest value over real frames, [b, D]; zero if there are none."""
    largest = audio.tokens.masked_fill(~audio.mask.unsqueeze(-1), -torch.inf).amax(1)
    return largest.masked_fill(~audio.mask.any(1, keepdim=True), 0)


def mean_plus_max(audio: TokenSequence) -> Tensor:
    """Mean plus maximum over real frames, [b, D] (PANNs, arXiv 1912.10211; MeanMax of arXiv 2303.05681)."""
    return mean(audio) + maximum(audio)


class ExactLinear(nn.Linear):
    """A linear map whose products are fp32 or wider in the backward pass too, whatever the encoders' precision."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        # In this order the gradient of the weight has its layout, and is not copied.
        mapped: Tensor = product(self.weight, x.flatten(0, -2).T).T.unflatten(0, x.shape[:-1])
        return mapped if self.bias is None else mapped + self.bias


class AttentionPooling(nn.Module):
    """sum_f w_f c_f, w = softmax_f(MLP(c_f)) with one hidden layer in the MLP (AttFlat of MCAN, arXiv 1906.10770)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.weigh = nn.Sequential(ExactLinear(dim, hidden_dim), nn.ReLU(), ExactLinear(hidden_dim, 1))

    def forward(self, audio: TokenSequence) -> Tensor:
        """[b, D]; zero if there are no real frames."""
        tokens, mask = at_least_fp32(audio.tokens), audio.mask.unsqueeze(-1)
        logits = self.weigh(tokens)
        weight: Tensor = logits.masked_fill(~mask, torch.finfo(logits.dtype).min).softmax(1) * mask
        return (weight * tokens).sum(1)


class NetRVLAD(nn.Module):
    """Sums of frames softly assigned to clusters, without the residuals of NetVLAD (Miech et al., arXiv 1706.06905).

    v_c = sum_f softmax_c(c_f W + bias) c_f. Every v_c is scaled to unit length, then their concatenation, and a linear
    map leads back to width D. A bias replaces the batch normalisation of the original, with which the embedding of a
    clip would depend on its batch.
    """

    def __init__(self, dim: int, num_clusters: int) -> None:
        super().__init__()
        self.assign = ExactLinear(dim, num_clusters)
        self.project = ExactLinear(num_clusters * dim, dim, bias=False)

    def forward(self, audio: TokenSequence) -> Tensor:
        """[b, D]; zero if there are no real frames."""
        tokens = at_least_fp32(audio.tokens)
        weight = self.assign(tokens).softmax(-1) * audio.mask.unsqueeze(-1)
        clusters = normalize(product(weight.mT, tokens), dim=-1)  # [b, C, D]
        pooled: Tensor = self.project(normalize(clusters.flatten(1), dim=-1))
        return pooled


class CosineScorer(Scorer):
    """Cosine of the caption's pooled embedding and the clip's frames pooled by `pool`, a function to [b, D]."""

    is_dual_encoder = True
    largest = 1.0

    def __init__(self, dim: int, pool: Callable[[TokenSequence], Tensor]) -> None:
        super().__init__()
        self.pool = pool
        self.reads_audio_tokens = pool is not pooled

    def embed_text(self, text: TokenSequence) -> Tensor:
        """Embeddings [B, D] of unit length, fp32 or wider even under autocast."""
        return normalize(at_least_fp32(text.pooled), dim=-1)

    def embed_audio(self, audio: TokenSequence) -> Tensor:
        """Embeddings [b, D] of unit length, fp32 or wider even under autocast."""
        with exact_products(audio.tokens):
            return normalize(at_least_fp32(self.pool(audio)), dim=-1)

    def start_gather(self, text: TokenSequence, world: World) -> Callable[[], Tensor]:
        return world.start_gather(self.embed_text(text))

    def block_of(self, texts: Tensor, audio: TokenSequence, world: World) -> ScoreBlock:
        return EmbeddingScores(texts, self.embed_audio(audio), world, self.products, self.largest)

    def scores(self, text: TokenSequence, audio: TokenSequence) -> Tensor:
        with exact_products(audio.tokens):
            return product(self.embed_text(text), self.embed_audio(audio).T, self.products)


class NetRVLADOptions(Section):
    """Options of `netrvlad`. No paper gives the number of clusters."""

    num_clusters: Count = Field(16, description="number of clusters that frames are assigned to")


class NetRVLADScorer(CosineScorer):
    """Cosine with `NetRVLAD` of the frames."""

    Options = NetRVLADOptions

    def __init__(self, dim: int, num_clusters: int) -> None:
        super().__init__(dim, NetRVLAD(dim, num_clusters))


class AttentionOptions(Section):
    """Options of `attention`."""

    hidden_dim: Count = Field(512, description="width of the hidden layer that weights the frames")


class AttentionScorer(CosineScorer):
    """Cosine with `AttentionPooling` of the frames."""

    Options = AttentionOptions

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__(dim, AttentionPooling(dim, hidden_dim))
