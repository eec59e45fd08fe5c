"""Text-aware attention pooling: a caption attends over the frames of a clip and is compared with the pooled vector.

Shape suffixes: i texts, j clips, f frames, D width, K attention width.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Annotated

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import dropout as drop
from torch.nn.functional import layer_norm, linear, normalize, pad

from atr_scale.batch import TokenSequence
from atr_scale.score_block import at_least_fp32
from atr_scale.scorers.gram_pooling import EPS, SHORTEST, GramScores, attention, keys_and_values, metrics_of
from atr_scale.scorers.scorer import Scorer, without_autocast
from atr_scale.scorers.tiles import Tensors, for_device, recomputed, split
from atr_scale.sections import Count, Section

Linear = tuple[Tensor, Tensor]  # weight and bias
TEXTS_PER_TILE = 1024
EXTRA = 8  # numbers that X-Pool's values have beside the attention's width
# Numbers in the largest tensor of a tile: as many as a processor's caches hold, or enough to keep a GPU busy.
TILE_NUMBERS = {"cpu": 2**19, "cuda": 2**24}


class TextAwarePoolingOptions(Section):
    """Options of `tap`."""

    attention_dim: Count = Field(512, description="width of queries, keys and values")
    residual: bool = Field(False, description="whether X-Pool's residual block follows the attention")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="dropout in the residual block; X-Pool: 0.3")

    @model_validator(mode="after")
    def dropout_has_its_block(self) -> TextAwarePoolingOptions:
        if self.dropout and not self.residual:
            raise ValueError("dropout is part of the residual block: set residual to true, or dropout to 0")
        return self


class TextAwarePoolingScorer(Scorer):
    """TAP (arXiv 2303.05681, eq. 2-4); with `residual` the pooling block of X-Pool (arXiv 2203.15086).

    w = softmax_f(LN(c_t) W_Q . LN(c_f) W_K / sqrt(K)),  a = LN(sum_f w_f LN(c_f) W_V W_O),  s = cos(c_t, z),
    with z = a, or z = LN(a + Dropout(Linear(a))) in X-Pool, where W_Q, W_K, W_V and W_O come with biases. c_t is the
    caption's pooled embedding and c_f a frame; they share one LayerNorm, as in X-Pool. A clip without frames scores 0.

    Scores are computed from Gram matrices (see gram_pooling). In two cases the pooled vector of every pair is computed
    instead, tile by tile, which costs many times more: for clips with so many frames that Gram matrices do not pay off,
    and in training with dropout, which draws a random number for every element of every pair's vector. Dropout is
    therefore 0 by default. `repr` names the form in use. Products are fp32 even under autocast: with bf16 operands in
    the projections alone, gradients change by 2e-3 to 3e-3.
    """

    Options = TextAwarePoolingOptions
    largest = 1.0

    def __init__(self, dim: int, attention_dim: int, residual: bool, dropout: float) -> None:
        super().__init__()
        self.weights = _Weights(dim, attention_dim, residual)
        self.dropout = dropout

    def scores(self, text: TokenSequence, audio: TokenSequence) -> Tensor:
        dropping = self.dropout if self.training else 0.0
        with without_autocast(audio.tokens):
            sentence = at_least_fp32(text.pooled)
            unit = normalize(sentence, dim=-1, eps=SHORTEST)
            if dropping or audio.tokens.shape[1] > self.weights.most_frames:
                scores = self._from_vectors(sentence, unit, audio, dropping)
            else:
                scores = self._from_grams(sentence, unit, audio)
            return scores.masked_fill(~audio.mask.any(1), 0)

    def extra_repr(self) -> str:
        form = f"Gram matrices up to {self.weights.most_frames} frames, beyond them a vector for each pair"
        if self.dropout and self.training:
            form = f"a vector for each pair because of dropout {self.dropout}"
        return f"residual={self.weights.residual}, {form}"

    def _from_grams(self, sentence: Tensor, unit: Tensor, audio: TokenSequence) -> Tensor:
        query, key, value, behind = self.weights()
        matching, offsets, *metrics = metrics_of(*behind)
        asked = _projected(sentence, *query)
        few = len(asked) < self.weights.attention_dim
        if few:
            asked, projection = asked @ key[0], value  # the keys' bias adds the same to the logits of all frames
        else:
            projection = _stacked(key, value)
        tile = _tile_size(len(asked), audio.tokens.shape[1], asked.device)
        texts = (asked, unit @ matching.T, unit @ offsets.T)
        scores: Tensor = GramScores.apply(
            *texts, audio.tokens, audio.mask, *projection, *metrics, self.weights.dim, tile, few
        )
        return scores

    def _from_vectors(self, sentence: Tensor, unit: Tensor, audio: TokenSequence, dropout: float) -> Tensor:
        query, key, value, behind = self.weights()
        projection = _stacked(key, value)
        texts = (_projected(sentence, *query), unit)
        rows, columns = _tile_size(len(unit), max(audio.tokens.shape[1], self.weights.dim), unit.device)
        tile = partial(_vector_scores, behind=behind, dropout=dropout)
        stripes = []
        for tokens, mask in split((audio.tokens, audio.mask), columns):
            # Kept for the backward pass: keys and values; computed again: normalised frames, tiles.
            audios = (*keys_and_values(recomputed(_projected, tokens, *projection), len(key[0])), mask)
            stripes.append(torch.cat([recomputed(tile, part, audios) for part in split(texts, rows)]))
        return torch.cat(stripes, 1)


class _Weights(nn.Module):
    """All parameters. Tiles run outside of any module, where ZeRO stage 3 has released them: forward returns copies.

    The query, key and value projections and the transposed W_O are initialised as one random orthonormal projection.
    For K = D this is X-Pool's initialisation, the identity, up to a rotation; for K < D a clip still starts as a
    weighted mean of its projected frames. Biases start at zero. Keys have none: it would add the same to the logits of
    all frames.
    """

    def __init__(self, dim: int, attention_dim: int, residual: bool) -> None:
        super().__init__()
        self.dim, self.attention_dim, self.residual = dim, attention_dim, residual
        self.norm_scale, self.norm_shift = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
        projection = nn.init.orthogonal_(torch.empty(attention_dim, dim))
        self.query, self.key, self.value, self.out = (nn.Parameter(projection.clone()) for _ in range(4))
        self.scale, self.shift = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
        if residual:
            self.inner_scale, self.inner_shift = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
            self.linear_weight, self.linear_bias = nn.Parameter(torch.eye(dim)), nn.Parameter(torch.zeros(dim))
            self.query_bias, self.value_bias = (nn.Parameter(torch.zeros(attention_dim)) for _ in range(2))
            self.out_bias = nn.Parameter(torch.zeros(dim))

    @property
    def most_frames(self) -> int:
        """The largest number of frames for which Gram matrices take fewer operations a pair than its vector [D]."""
        vector = self.dim * (self.attention_dim + (self.dim if self.residual else 0))
        return math.isqrt((vector - 1) // (3 if self.residual else 2))

    def forward(self) -> tuple[Linear, Linear, Linear, Tensors]:
        """W_Q / sqrt(K), W_K and W_V, each with the LayerNorm's parameters, and the parameters behind the attention.

        With biases the values get a number that is 1 for every frame, and so after any attention: its row of W_O, the
        bias, is added to every pooled vector. Zeros follow it, because products of odd widths take a quarter longer.
        """
        query, key, value = (
            (weight * self.norm_scale, weight @ self.norm_shift) for weight in (self.query, self.key, self.value)
        )
        out, block = self.out.clone(), []
        if self.residual:
            query = query[0], query[1] + self.query_bias
            one = pad(torch.ones_like(self.value_bias[:1]), (0, EXTRA - 1))
            value = pad(value[0], (0, 0, 0, EXTRA)), torch.cat([value[1] + self.value_bias, one])
            out = torch.cat([out, pad(self.out_bias[None], (0, 0, 0, EXTRA - 1))])
            block = [self.inner_scale, self.inner_shift, self.linear_weight, self.linear_bias]
        root = math.sqrt(self.attention_dim)
        behind = (out, *(parameter.clone() for parameter in (self.scale, self.shift, *block)))
        return (query[0] / root, query[1] / root), key, value, behind


def with_zero_biases(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a model, completed by the biases of X-Pool's block, which version 0.2 did not have."""
    place = "scorer.weights."
    if f"{place}inner_scale" not in weights or f"{place}out_bias" in weights:
        return weights
    zeros = weights[f"{place}query"].new_zeros
    width, dim = weights[f"{place}query"].shape
    biases = {"query_bias": zeros(width), "value_bias": zeros(width), "out_bias": zeros(dim)}
    return {**weights, **{place + name: bias for name, bias in biases.items()}}


def _vector_scores(texts: Tensors, audios: Tensors, behind: Tensors, dropout: float) -> Tensor:
    """Scores [i, j] of a tile by the formula of the paper, with the pooled vectors [j, i, D] of all pairs."""
    (query, unit), (key, value, mask), (out, scale, shift, *block) = texts, audios, behind
    pooled = attention(query, key, mask).mT @ value @ out
    if block:
        inner_scale, inner_shift, weight, bias = block
        pooled = layer_norm(pooled, scale.shape, inner_scale, inner_shift, EPS)
        pooled = pooled + drop(linear(pooled, weight, bias), dropout)
    pooled = normalize(layer_norm(pooled, scale.shape, scale, shift, EPS), dim=-1, eps=SHORTEST)
    return torch.einsum("jid,id->ij", pooled, unit)


def _projected(vectors: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return linear(layer_norm(at_least_fp32(vectors), vectors.shape[-1:], eps=EPS), weight, bias)


def _stacked(key: Linear, value: Linear) -> Linear:
    return torch.cat([key[0], value[0]]), torch.cat([key[1], value[1]])


def _tile_size(texts: int, numbers_per_pair: int, device: torch.device) -> tuple[int, int]:
    """(texts, audios) of a tile."""
    rows = min(texts, TEXTS_PER_TILE)
    return rows, max(1, for_device(TILE_NUMBERS, device) // (rows * numbers_per_pair))
