"""Text-aware attention pooling: a caption attends over a clip's frames, the score is a cosine with what it finds.

Shape suffixes: i texts, j audios, f frames, D width, K attention width, m metrics.

All that follows the attention is affine in its weights w, up to the factors of LayerNorm. Hence no vector of width D is
built for a pair: with the clip's values X [f, K], the variances and the length of the pooled vector are quadratic forms
w (X M X') w. A metric M [K, K] comes from the parameters alone, a Gram matrix X M X' [f, f] from one clip; the product
with the caption's vector is w . X n, with n [K] from the caption alone.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as drop
from torch.nn.functional import layer_norm, linear, normalize

from atr_scale.errors import UserError
from atr_scale.parallel.blocks import at_least_fp32
from atr_scale.scorers.scorer import Scorer, without_autocast
from atr_scale.scorers.tiles import Tensors, recomputed, split
from atr_scale.sequence import TokenSequence

EPS = 1e-5  # inside every LayerNorm
SHORTEST = 1e-12  # lower bound of a vector's length, as in torch.nn.functional.normalize
TILE_ROWS = 1024
# Numbers in a tile's largest tensor: what a processor's caches hold, or enough to keep a GPU busy.
TILE_NUMBERS = {"cpu": 2**19, "cuda": 2**24}


class TextAwarePoolingScorer(Scorer):
    """TAP (arXiv 2303.05681, eq. 2-4); with `residual` the pooling block of X-Pool (arXiv 2203.15086).

    w = softmax_f(LN(c_t) W_Q . LN(c_f) W_K / sqrt(K)),  a = LN(sum_f w_f LN(c_f) W_V W_O),  s = cos(c_t, z),
    with z = a, or z = LN(a + Dropout(Linear(a))) in X-Pool. c_t is the caption's pooled vector, c_f a frame; their
    LayerNorm is one, as in X-Pool. A clip without frames scores 0.

    Where dropout is active it draws anew for every number of every pair's vector, so these vectors are built, tile by
    tile, at many times the cost; hence it is 0 unless asked for (X-Pool: 0.3). They are also built for clips so long
    that Gram matrices cost more than they save. Raises UserError for options out of range.
    """

    def __init__(self, dim: int, attention_dim: int = 512, residual: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        if attention_dim < 1 or not 0 <= dropout < 1:
            raise UserError(f"tap: attention_dim is {attention_dim}, dropout {dropout}: give >= 1, and one in [0, 1)")
        if dropout and not residual:
            raise UserError("tap: dropout is part of the residual block: set residual to true, or dropout to 0")
        self.weights = _Weights(dim, attention_dim, residual)
        self.dropout = dropout

    def scores(self, text: TokenSequence, audio: TokenSequence) -> Tensor:
        frames = audio.tokens.shape[1]
        dropping = self.dropout if self.training else 0.0
        dense = dropping > 0 or not self.weights.grams_pay(frames)
        with without_autocast(audio.tokens):
            norm, query, key_value, behind = self.weights(dense)
            pooling = _DensePooling(*behind, dropout=dropping) if dense else _GramPooling(*behind)
            sentence = at_least_fp32(text.pooled)
            asked = _projected(sentence, norm, query) / math.sqrt(len(query))
            texts = (asked, *pooling.of_texts(normalize(sentence, dim=-1, eps=SHORTEST)))
            rows, columns = _tile_size(len(asked), pooling.numbers_per_pair(frames), asked.device)
            stripes = []
            for tokens, mask in split((audio.tokens, audio.mask), columns):
                # Kept for the backward pass: keys, values, Gram matrices; computed again: normalised frames, tiles.
                key, value = recomputed(_projected, tokens, norm, key_value).chunk(2, dim=-1)
                audios = (key, mask, *pooling.of_audios(value))
                stripes.append(torch.cat([recomputed(pooling.tile, part, audios) for part in split(texts, rows)]))
            return torch.cat(stripes, 1).masked_fill(~audio.mask.any(1), 0)


class _Weights(nn.Module):
    """All parameters. Tiles run outside of any module, where ZeRO-3 has let go of them: forward hands out copies.

    The query, key and value projections and the transposed W_O start as one random orthonormal projection: at K = D
    that is X-Pool's start, the identity, up to a rotation; at K < D a clip still starts as a weighted mean of frames.
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

    def grams_pay(self, frames: int) -> bool:
        """Whether Gram matrices cost a pair fewer operations than its vector of width D."""
        with_grams = (3 if self.residual else 2) * frames**2
        return with_grams < self.dim * (self.attention_dim + (self.dim if self.residual else 0))

    def forward(self, dense: bool) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor, Tensors]:
        """The inputs' LayerNorm, W_Q [K, D], W_K over W_V [2K, D], and what `_DensePooling` or `_GramPooling` takes."""
        norm = (self.norm_scale.clone(), self.norm_shift.clone())
        behind = self._behind() if dense else self._maps()
        return norm, self.query.clone(), torch.cat([self.key, self.value]), behind

    def _behind(self) -> Tensors:
        last = (self.out, self.scale, self.shift)
        block = (self.inner_scale, self.inner_shift, self.linear_weight, self.linear_bias) if self.residual else ()
        return tuple(parameter.clone() for parameter in last + block)

    def _maps(self) -> Tensors:
        """What the last LayerNorm gets is, centred, r o A + u for o = sum_f w_f x_f, with one factor r a pair."""
        a = out = _centred(self.out)
        u = torch.zeros_like(self.shift)
        if self.residual:
            scaled = out * self.inner_scale
            a = _centred(scaled + linear(scaled, self.linear_weight))
            u = _centred(self.inner_shift + linear(self.inner_shift, self.linear_weight, self.linear_bias))
        scaled_a, scaled_u = a * self.scale, u * self.scale
        metrics = [a @ a.T, scaled_a @ scaled_a.T] + ([out @ out.T] if self.residual else [])
        forms = torch.stack([a @ u, scaled_a @ scaled_u, scaled_a @ self.shift])
        constants = torch.stack([u @ u, scaled_u @ scaled_u, scaled_u @ self.shift, self.shift @ self.shift])
        return scaled_a, torch.stack([scaled_u, self.shift]), torch.stack(metrics), forms, constants


class _DensePooling:
    """Every pair's vector, [j, i, D] in a tile: the formula as it stands."""

    def __init__(self, out: Tensor, scale: Tensor, shift: Tensor, *block: Tensor, dropout: float) -> None:
        self.out, self.scale, self.shift, self.block, self.dropout = out, scale, shift, block, dropout

    def numbers_per_pair(self, frames: int) -> int:
        return max(frames, len(self.scale))

    def of_texts(self, unit: Tensor) -> Tensors:
        return (unit,)

    def of_audios(self, value: Tensor) -> Tensors:
        return (value,)

    def tile(self, texts: Tensors, audios: Tensors) -> Tensor:
        """Scores [i, j]."""
        (query, unit), (key, mask, value) = texts, audios
        width = self.scale.shape
        pooled = _attention(query, key, mask).mT @ value @ self.out
        if self.block:
            inner_scale, inner_shift, weight, bias = self.block
            pooled = layer_norm(pooled, width, inner_scale, inner_shift, EPS)
            pooled = pooled + drop(linear(pooled, weight, bias), self.dropout)
        pooled = normalize(layer_norm(pooled, width, self.scale, self.shift, EPS), dim=-1, eps=SHORTEST)
        return torch.einsum("jid,id->ij", pooled, unit)


class _GramPooling:
    """The same scores from Gram matrices, exactly: every EPS is in them. Takes what `_Weights._maps` returns."""

    def __init__(self, a: Tensor, offsets: Tensor, metrics: Tensor, forms: Tensor, constants: Tensor) -> None:
        self.a, self.offsets, self.metrics, self.forms, self.constants = a, offsets, metrics, forms, constants

    def numbers_per_pair(self, frames: int) -> int:
        return frames

    def of_texts(self, unit: Tensor) -> Tensors:
        return unit @ self.a.T, unit @ self.offsets.T

    def of_audios(self, value: Tensor) -> Tensors:
        return value, _GramMatrices.apply(value, self.metrics), self.forms @ value.mT

    def tile(self, texts: Tensors, audios: Tensors) -> Tensor:
        """Scores [i, j]."""
        (query, matched, offsets), (key, mask, value, grams, forms) = texts, audios
        weight = _attention(query, key, mask)
        dot = (_products(value, matched) * weight).sum(1)
        quadratics = ((grams.flatten(1, 2) @ weight).unflatten(1, grams.shape[1:3]) * weight.unsqueeze(1)).sum(2)
        spread, length, *inner = quadratics.unbind(1)
        along_u, along_scaled_u, along_shift = (forms @ weight).unbind(1)
        uu, scaled_uu, u_shift, shift_shift = self.constants
        dim = self.a.shape[1]
        r = (inner[0] / dim + EPS).rsqrt() if inner else 1.0
        r_last = ((r * r * spread + 2 * r * along_u + uu) / dim + EPS).rsqrt()
        dot = r_last * (r * dot + offsets[:, 0]) + offsets[:, 1]
        squared = r_last.square() * (r * r * length + 2 * r * along_scaled_u + scaled_uu)
        squared = squared + 2 * r_last * (r * along_shift + u_shift) + shift_shift
        return (dot * squared.clamp(min=SHORTEST**2).rsqrt()).T


class _GramMatrices(torch.autograd.Function):
    """X M X' [j, m, f, f] of values X [j, f, K] and symmetric metrics M [m, K, K]; the symmetry spares a product."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, metrics: Tensor) -> Tensor:
        mapped = [value @ metric for metric in metrics]
        ctx.save_for_backward(value, *mapped)
        return torch.stack([rows @ value.mT for rows in mapped], 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        value, *mapped = ctx.saved_tensors
        by_value, by_metrics = torch.zeros_like(value), []
        for rows, grad in zip(mapped, grads[0].unbind(1), strict=True):
            grad = grad + grad.mT
            by_value.baddbmm_(grad, rows)
            by_metrics.append(value.flatten(0, 1).T @ (grad @ value).flatten(0, 1) / 2)
        return by_value, torch.stack(by_metrics)


def _projected(vectors: Tensor, norm: tuple[Tensor, Tensor], weight: Tensor) -> Tensor:
    return linear(layer_norm(at_least_fp32(vectors), norm[0].shape, *norm, EPS), weight)


def _attention(query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
    """Weights [j, f, i] over real frames; texts come last, so that sums over frames run along memory."""
    lowest = torch.finfo(query.dtype).min  # not -inf, which makes NaN of a clip without frames
    return _products(key, query).masked_fill(~mask.unsqueeze(-1), lowest).softmax(1)


def _products(frames: Tensor, texts: Tensor) -> Tensor:
    """[j, f, K] and [i, K] -> [j, f, i], as one matrix product."""
    return (frames.flatten(0, 1) @ texts.T).unflatten(0, frames.shape[:2])


def _centred(rows: Tensor) -> Tensor:
    return rows - rows.mean(-1, keepdim=True)


def _tile_size(texts: int, numbers_per_pair: int, device: torch.device) -> tuple[int, int]:
    """(texts, audios) of a tile."""
    rows = min(texts, TILE_ROWS)
    return rows, max(1, TILE_NUMBERS[device.type] // (rows * numbers_per_pair))
