"""Text-aware attention pooling: a caption attends over a clip's frames, the score is a cosine with what it finds.

Shape suffixes: i texts, j audios, f frames, D width, K attention width, m metrics.

All that follows the attention is affine in its weights w, up to the factors of LayerNorm. Hence no vector of width D is
built for a pair: with the clip's values X [f, K], the variances and the length of the pooled vector are quadratic forms
w (X M X') w. A metric M [K, K] comes from the parameters alone, a Gram matrix X M X' [f, f] from one clip; the product
with the caption's vector is w . X n with n [K] from the caption alone.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as drop
from torch.nn.functional import layer_norm, linear, normalize

from atr_scale.errors import UserError
from atr_scale.parallel.blocks import at_least_fp32
from atr_scale.scorers.scorer import Scorer, without_autocast
from atr_scale.scorers.tiles import Tensors, score_tiles
from atr_scale.sequence import TokenSequence

EPS = 1e-5  # inside every LayerNorm
SHORTEST = 1e-12  # lower bound of a vector's length, as in torch.nn.functional.normalize

# Numbers in a tile's largest tensor: what a processor's caches hold, or enough to keep a GPU busy.
TILE_NUMBERS = {"cpu": 2**19, "cuda": 2**24}


class TextAwarePooling(Scorer):
    """TAP (arXiv 2303.05681, eq. 2-4); with `residual` the pooling block of X-Pool (arXiv 2203.15086).

    w = softmax_f(LN(c_t) W_Q . LN(c_f) W_K / sqrt(K)),  a = LN(sum_f w_f LN(c_f) W_V W_O),  s = cos(c_t, z),
    with z = a, or z = LN(a + Dropout(Linear(a))) in X-Pool. c_t is the caption's pooled vector, c_f a frame; their
    LayerNorm is one, as in X-Pool. A clip without frames scores 0.

    W_Q, W_K, W_V and the transposed W_O start as the same random orthonormal projection: at K = D that is X-Pool's
    start, the identity, up to a rotation, and at K < D a clip still starts as a weighted mean of its frames.

    Where dropout is active it draws anew for every number of every pair's vector, so these vectors are built, tile by
    tile, at many times the cost; hence it is 0 unless asked for (X-Pool: 0.3). They are also built for clips so long
    that Gram matrices cost more than they save.
    """

    def __init__(self, dim: int, attention_dim: int = 512, residual: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        if attention_dim < 1 or not 0 <= dropout < 1:
            raise UserError(f"tap got attention_dim {attention_dim}, dropout {dropout}: give >= 1 and one in [0, 1)")
        if dropout and not residual:
            raise UserError("tap has dropout inside its residual block alone: set residual to true, or dropout to 0")
        self.norm = nn.LayerNorm(dim, EPS)
        self.query, self.key, self.value = (nn.Linear(dim, attention_dim, bias=False) for _ in range(3))
        self.head = _Head(dim, attention_dim, residual)
        self.dropout = dropout
        projection = nn.init.orthogonal_(torch.empty(attention_dim, dim))
        with torch.no_grad():
            for weight in (self.query.weight, self.key.weight, self.value.weight, self.head.out):
                weight.copy_(projection)

    def scores(self, text: TokenSequence, audio: TokenSequence) -> Tensor:
        with without_autocast(audio.tokens):
            sentence = at_least_fp32(text.pooled)
            unit = normalize(sentence, dim=-1, eps=SHORTEST)
            query = self.query(self.norm(sentence)) / math.sqrt(self.query.out_features)
            frames = self.norm(at_least_fp32(audio.tokens))
            key, value = self.key(frames), self.value(frames)
            dropping = self.dropout if self.training else 0.0
            dense = dropping > 0 or not self.head.grams_pay(frames.shape[1])
            of_texts, of_audios, shared = self.head(unit, value, dense)
            scores = score_tiles(
                partial(_dense_tile, shared, dropping) if dense else partial(_gram_tile, self.head.dim, *shared),
                (query, *of_texts),
                (key, audio.mask, *of_audios),
                _tile_size(len(query), self.head.dim if dense else frames.shape[1], query.device),
            )
            return scores.masked_fill(~audio.mask.any(1), 0)


class _Head(nn.Module):
    """The parameters behind the attention, and what tiles need of them."""

    def __init__(self, dim: int, attention_dim: int, residual: bool) -> None:
        super().__init__()
        self.dim, self.attention_dim, self.residual = dim, attention_dim, residual
        self.out = nn.Parameter(torch.empty(attention_dim, dim))
        self.scale, self.shift = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
        if residual:
            self.inner_scale, self.inner_shift = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
            self.linear_weight, self.linear_bias = nn.Parameter(torch.eye(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, unit: Tensor, value: Tensor, dense: bool) -> tuple[Tensors, Tensors, Tensors]:
        """Unit vectors of texts [i, D], values of audios [j, f, K] -> arguments of `_dense_tile` or `_gram_tile`."""
        if dense:
            # Copies: a tile runs outside this module, where ZeRO-3 has let go of the parameters.
            return (unit,), (value,), tuple(p.clone() for p in self.parameters(recurse=False))
        return self._grams(unit, value)

    def _grams(self, unit: Tensor, value: Tensor) -> tuple[Tensors, Tensors, Tensors]:
        """The pooled vector before the last LayerNorm, centred, is  r sum_f w_f x_f A + u  with one factor r a pair."""
        out = _centred(self.out)
        if self.residual:
            scaled = out * self.inner_scale
            a = _centred(scaled + scaled @ self.linear_weight.T)
            u = _centred(self.inner_shift + linear(self.inner_shift, self.linear_weight, self.linear_bias))
        else:
            a, u = out, torch.zeros_like(self.shift)
        scaled_a, scaled_u = a * self.scale, u * self.scale
        metrics = [a @ a.T, scaled_a @ scaled_a.T] + ([out @ out.T] if self.residual else [])
        grams = [(value @ metric) @ value.mT for metric in metrics]
        forms = torch.stack([a @ u, scaled_a @ scaled_u, scaled_a @ self.shift])
        constants = torch.stack([u @ u, scaled_u @ scaled_u, scaled_u @ self.shift, self.shift @ self.shift])
        offsets = torch.stack([unit @ scaled_u, unit @ self.shift])
        return (
            (unit @ scaled_a.T, offsets.T),
            (value, torch.stack(grams, 1), forms @ value.mT),
            (constants,),
        )

    def grams_pay(self, frames: int) -> bool:
        """Whether Gram matrices cost a pair fewer operations than its vector of width D."""
        with_grams = (3 if self.residual else 2) * frames**2
        return with_grams < self.dim * (self.attention_dim + (self.dim if self.residual else 0))


def _gram_tile(dim: int, constants: Tensor, texts: Tensors, audios: Tensors) -> Tensor:
    """Scores [i, j] from what `_Head._grams` made of the parameters; exact, the EPS of every LayerNorm included."""
    query, matched, offsets = texts
    key, mask, value, grams, forms = audios
    weight = _attention(query, key, mask)
    dot = (_products(value, matched) * weight).sum(1)
    quadratics = ((grams.flatten(1, 2) @ weight).unflatten(1, grams.shape[1:3]) * weight.unsqueeze(1)).sum(2)
    spread, length, *inner = quadratics.unbind(1)
    along_u, along_scaled_u, along_shift = (forms @ weight).unbind(1)
    uu, scaled_uu, u_shift, shift_shift = constants
    r = (inner[0] / dim + EPS).rsqrt() if inner else 1.0
    r_last = ((r * r * spread + 2 * r * along_u + uu) / dim + EPS).rsqrt()
    dot = r_last * (r * dot + offsets[:, 0]) + offsets[:, 1]
    squared = r_last.square() * (r * r * length + 2 * r * along_scaled_u + scaled_uu)
    squared = squared + 2 * r_last * (r * along_shift + u_shift) + shift_shift
    return (dot * squared.clamp(min=SHORTEST**2).rsqrt()).T


def _dense_tile(parameters: Tensors, dropping: float, texts: Tensors, audios: Tensors) -> Tensor:
    """Scores [i, j] from every pair's vector [j, i, D]: the formula as it stands."""
    query, unit = texts
    key, mask, value = audios
    out, scale, shift, *block = parameters
    pooled = _attention(query, key, mask).mT @ value @ out
    if block:
        inner_scale, inner_shift, weight, bias = block
        pooled = layer_norm(pooled, scale.shape, inner_scale, inner_shift, EPS)
        pooled = pooled + drop(linear(pooled, weight, bias), dropping)
    pooled = normalize(layer_norm(pooled, scale.shape, scale, shift, EPS), dim=-1, eps=SHORTEST)
    return torch.einsum("jid,id->ij", pooled, unit)


def _attention(query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
    """Weights [j, f, i], over real frames; texts come last, so that sums over frames run along memory."""
    lowest = torch.finfo(query.dtype).min  # not -inf: a clip without frames gets some weights, and no NaN
    return _products(key, query).masked_fill(~mask.unsqueeze(-1), lowest).softmax(1)


def _products(frames: Tensor, texts: Tensor) -> Tensor:
    """[j, f, K] and [i, K] -> [j, f, i], as one matrix product."""
    return (frames.flatten(0, 1) @ texts.T).unflatten(0, frames.shape[:2])


def _tile_size(texts: int, numbers_per_pair: int, device: torch.device) -> tuple[int, int]:
    """(texts, audios) of a tile."""
    rows = min(texts, 1024)
    return rows, max(1, TILE_NUMBERS[device.type] // (rows * numbers_per_pair))


def _centred(rows: Tensor) -> Tensor:
    return rows - rows.mean(-1, keepdim=True)
