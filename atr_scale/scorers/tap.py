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
from torch.nn.functional import layer_norm, normalize, pad

from atr_scale.batch import TokenSequence
from atr_scale.products import HeadProducts, product
from atr_scale.score_block import at_least_fp32
from atr_scale.scorers.gram_pooling import GramScores, Tables, metrics_of
from atr_scale.scorers.pooled_cosine import EPS, SHORTEST
from atr_scale.scorers.scorer import Scorer, exact_products
from atr_scale.scorers.tiles import Tensors, kept_bytes, pair_tiles, recomputed, split, tile_numbers
from atr_scale.sections import Count, Section

# Numbers of a frame, and of its key and value, beside their width. Eight, because odd widths multiply slowly.
EXTRA = 8
GROUP = 4  # numbers of the frames that are projected at once, in tensors of a tile
ONE, BARRIER = 0, 1  # places among them: 1; and 0, or if the frame is padding a number that no softmax survives


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

    Scores are computed from Gram matrices (docs/math/text_aware_pooling.md). In two cases the pooled vector of every
    pair is computed instead, tile by tile, which costs many times more: for clips with so many frames that Gram
    matrices do not pay off, and in training with dropout, which draws a random number for every element of every pair's
    vector. Dropout is therefore 0 by default. `repr` names the form in use. Products have the precision `products`,
    even under autocast: with bf16 operands in the projections alone, gradients change by 2e-3 to 3e-3.
    """

    Options = TextAwarePoolingOptions
    largest = 1.0

    def __init__(self, dim: int, attention_dim: int, residual: bool, dropout: float) -> None:
        super().__init__()
        self.weights = _Weights(dim, attention_dim, residual)
        self.dropout = dropout

    def scores(self, text: TokenSequence, audio: TokenSequence) -> Tensor:
        dropping = self.dropout if self.training else 0.0
        with exact_products(audio.tokens):
            query, key, value, behind = self.weights()
            sentence = at_least_fp32(text.pooled)
            unit = normalize(sentence, dim=-1, eps=SHORTEST)
            asked = self._asked(sentence, query)
            if dropping or audio.tokens.shape[1] > self.weights.most_frames:
                scores = self._from_vectors(asked, unit, audio, key, value, behind, dropping)
            else:
                scores = self._from_grams(asked, unit, audio, key, value, behind)
            return scores.masked_fill(~audio.mask.any(1), 0)

    def attention(self, text: TokenSequence, audio: TokenSequence) -> Tensor:
        """See `Scorer`: the attention w of a score, with each word in the place of the caption."""
        with exact_products(audio.tokens):
            query, key, _, _ = self.weights()
            asked = self._asked(at_least_fp32(text.tokens[0]), query)
            keys = product(_frames(audio.tokens, audio.mask)[0], key, self.products)
            return product(asked, keys.T, self.products).softmax(-1)

    def extra_repr(self) -> str:
        form = f"Gram matrices up to {self.weights.most_frames} frames, beyond them a vector for each pair"
        if self.dropout and self.training:
            form = f"a vector for each pair because of dropout {self.dropout}"
        return f"residual={self.weights.residual}, {form}"

    def _asked(self, sentence: Tensor, query: Tensor) -> Tensor:
        """[n, K + EXTRA]: queries of pooled embeddings [n, D]; with that of a key their product is a logit."""
        normal = layer_norm(sentence, sentence.shape[-1:], eps=EPS)
        asked = product(pad(normal, (0, 1), value=1), query, self.products)
        return pad(pad(asked, (0, 1 + BARRIER), value=1), (0, EXTRA - 1 - BARRIER))

    def _from_grams(
        self, asked: Tensor, unit: Tensor, audio: TokenSequence, key: Tensor, value: Tensor, behind: Tensors
    ) -> Tensor:
        metrics, kind, dim = metrics_of(*behind), self.products, self.weights.dim
        few = len(asked) < self.weights.attention_dim
        if few:  # then captions are mapped to the frames, and not frames to the keys
            asked = product(asked, key.T, kind)
        texts = (asked, product(unit, metrics.matching.T, kind), product(unit, metrics.offsets.T))
        groups = split((audio.tokens, audio.mask), max(1, GROUP * tile_numbers(unit) // (audio.tokens.shape[1] * dim)))
        kept, stripes = kept_bytes(unit.device) // len(groups), []
        for tokens, mask in groups:
            frames = _frames(tokens, mask)
            values = product(frames, value, kind)
            clips = (frames if few else product(frames, key, kind), values, Tables.apply(values, metrics.forms))
            stripes.append(GramScores.apply(*texts, *clips, metrics.constants, dim, kind, kept))
        return torch.cat(stripes, 1)

    def _from_vectors(
        self,
        asked: Tensor,
        unit: Tensor,
        audio: TokenSequence,
        key: Tensor,
        value: Tensor,
        behind: Tensors,
        dropout: float,
    ) -> Tensor:
        def key_and_value(tokens: Tensor, mask: Tensor) -> Tensors:
            frames = _frames(tokens, mask)
            return product(frames, key, self.products), product(frames, value, self.products)

        tile = partial(_vector_scores, behind=behind, dropout=dropout, kind=self.products)
        size = max(audio.tokens.shape[1], self.weights.dim)
        stripes: dict[int, list[Tensor]] = {}
        for texts, clips in pair_tiles(len(unit), len(audio.mask), size, unit):
            if texts.start == 0:  # kept for the backward pass: keys and values; computed again: frames, tiles
                clip = recomputed(key_and_value, audio.tokens[clips], audio.mask[clips])
            stripes.setdefault(clips.start, []).append(recomputed(tile, asked[texts], unit[texts], *clip))
        return torch.cat([torch.cat(parts) for parts in stripes.values()], 1)


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

    def forward(self) -> tuple[Tensor, Tensor, Tensor, Tensors]:
        """Matrices for rows with EXTRA numbers behind: of queries [D + 1, K], keys [D + 8, K + 8], values [D + 8, K].

        They contain the LayerNorm's parameters, 1 / sqrt(K) and the biases. The fourth: parameters behind the
        attention, see `metrics_of`. With the residual block values too have EXTRA numbers: the first is 1 for every
        frame, and so after any attention. Its row of W_O, the bias, is added to every pooled vector.
        """
        query, key, value = (weight * self.norm_scale for weight in (self.query, self.key, self.value))
        query_bias, value_bias = self.query @ self.norm_shift, self.value @ self.norm_shift
        out, block = self.out.clone(), []
        if self.residual:
            query_bias = query_bias + self.query_bias
            one = pad(torch.ones_like(self.value_bias[:1]), (0, EXTRA - 1))
            value, value_bias = pad(value, (0, 0, 0, EXTRA)), torch.cat([value_bias + self.value_bias, one])
            out = torch.cat([out, pad(self.out_bias[None], (0, 0, 0, EXTRA - 1))])
            block = [self.inner_scale, self.inner_shift, self.linear_weight, self.linear_bias]
        query = torch.cat([query, query_bias[:, None]], 1) / math.sqrt(self.attention_dim)
        key = torch.block_diag(key, torch.eye(EXTRA, dtype=key.dtype, device=key.device))
        value = torch.cat([value, pad(value_bias[:, None], (ONE, EXTRA - 1 - ONE))], 1)
        behind = (out, *(parameter.clone() for parameter in (self.scale, self.shift, *block)))
        return query.T, key.T, value.T, behind


def with_zero_biases(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a model, completed by the biases of X-Pool's block, which version 0.2 did not have."""
    place = "scorer.weights."
    if f"{place}inner_scale" not in weights or f"{place}out_bias" in weights:
        return weights
    zeros = weights[f"{place}query"].new_zeros
    width, dim = weights[f"{place}query"].shape
    biases = {"query_bias": zeros(width), "value_bias": zeros(width), "out_bias": zeros(dim)}
    return {**weights, **{place + name: bias for name, bias in biases.items()}}


def _vector_scores(
    asked: Tensor,
    unit: Tensor,
    key: Tensor,
    value: Tensor,
    behind: Tensors,
    dropout: float,
    kind: HeadProducts,
) -> Tensor:
    """Scores [i, j] of a tile by the formula of the paper, with the pooled vectors [j, i, D] of all pairs."""
    out, scale, shift, *block = behind
    weight = product(asked, key.mT, kind).softmax(-1)  # [j, i, f]
    pooled = product(product(weight, value, kind), out, kind)
    if block:
        inner_scale, inner_shift, linear, bias = block
        pooled = layer_norm(pooled, scale.shape, inner_scale, inner_shift, EPS)
        pooled = pooled + drop(product(pooled, linear.T, kind) + bias, dropout)
    pooled = normalize(layer_norm(pooled, scale.shape, scale, shift, EPS), dim=-1, eps=SHORTEST)
    return (pooled * unit).sum(-1).T


def _frames(tokens: Tensor, mask: Tensor) -> Tensor:
    """[j, f, D + 8]: frames without mean and deviation, and their EXTRA numbers."""
    frames = layer_norm(at_least_fp32(tokens), tokens.shape[-1:], eps=EPS)
    extra = frames.new_zeros(*mask.shape, EXTRA)
    extra[..., ONE] = 1
    extra[..., BARRIER].masked_fill_(~mask, torch.finfo(extra.dtype).min / 4)
    return torch.cat([frames, extra], -1)
