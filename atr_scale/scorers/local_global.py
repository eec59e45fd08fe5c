"""Local-to-global matching of frames and tokens (LGMM): Wang, Gu, Ling, ICASSP 2024, arXiv 2403.10146.

Shape suffixes: B texts, b audios, M frames, N text tokens, D width. One side holds the queries (Q sequences of q
tokens), the other the contexts (C sequences of c tokens); in "frames over words" audios are the queries.

Every query token attends over the tokens of the context and is compared with the attended vector; the comparisons are
pooled. With tokens of unit length the attended vector is never computed: its product with the query is a weighted mean
of similarities, and its squared norm is a quadratic form of the context's Gram matrix.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import leaky_relu, normalize

from atr_scale.batch import TokenSequence
from atr_scale.products import product
from atr_scale.scorers.scorer import Scorer, exact_products
from atr_scale.scorers.tiles import Tensors, real_tokens, score_tiles, tile_numbers
from atr_scale.sections import Positive, Section

# Of the LeakyReLU before the norm, by `normalise`; 0 clips.
SLOPES = {"none": None, "clipped_l2": 0.0, "clipped_l2_leaky": 0.1}


class LocalGlobalOptions(Section):
    """Options of `lgmm`. The paper does not give the inverse temperatures: the defaults are those of SCAN (Lee et al.,
    ECCV 2018, arXiv 1803.08024)."""

    lambda1: Positive = Field(4.0, description="inverse temperature of the attention")
    lambda2: Positive = Field(5.0, description="inverse temperature of the pooling")
    direction: Literal["frames_over_words", "words_over_frames", "both"] = Field(
        "frames_over_words", description="queries over contexts; both: the mean of the two"
    )
    normalise: Literal["none", "clipped_l2", "clipped_l2_leaky"] = Field(
        "none",
        description="similarities before the attention, divided by their norm over the queries: clipped_l2 clips them "
        "at 0 (SCAN's paper), clipped_l2_leaky multiplies negative ones by 0.1 (SCAN's code)",
    )
    pooling: Literal["log_mean_exp", "log_sum_exp"] = Field(
        "log_mean_exp", description="log_sum_exp is SCAN's; with it a clip of twice as many equal frames scores higher"
    )


class LocalGlobalScorer(Scorer):
    """Log-mean-exp over query tokens of cos(token, attended vector). It has no parameters.

    s_mn = cos(f_m, w_n), alpha_m = softmax_n(lambda1 s_mn), r_m = cos(f_m, sum_n alpha_mn w_n),
    score = 1/lambda2 log mean_m exp(lambda2 r_m), for frames f as queries over tokens w. The mean replaces the paper's
    sum (`pooling` = log_sum_exp), with which long clips score higher; it changes no result if all clips have equally
    many frames. `normalise` = clipped_l2 is equation 1 of SCAN: s_mn becomes max(s_mn, 0) / norm over m. SCAN's code
    takes LeakyReLU of slope 0.1 in its place: clipped_l2_leaky.
    """

    Options = LocalGlobalOptions
    reads_text_tokens = True

    def __init__(self, dim: int, lambda1: float, lambda2: float, direction: str, normalise: str, pooling: str) -> None:
        super().__init__()
        self.lambda1, self.lambda2, self.direction = lambda1, lambda2, direction
        self.slope = SLOPES[normalise]
        self.pool = _log_mean_exp if pooling == "log_mean_exp" else _log_sum_exp
        self.largest = 1.0 if pooling == "log_mean_exp" else None

    def scores(self, text: TokenSequence, audio: TokenSequence) -> Tensor:
        words, frames = _unit_tokens(text), _unit_tokens(audio)
        if self.direction == "frames_over_words":
            return self._attend(frames, words).T
        if self.direction == "words_over_frames":
            return self._attend(words, frames)
        return (self._attend(frames, words).T + self._attend(words, frames)) / 2

    def attention(self, text: TokenSequence, audio: TokenSequence) -> Tensor:
        """See `Scorer`: that of words over frames, also if the score is the one of frames over words."""
        words, frames = _unit_tokens(text), _unit_tokens(audio)
        with exact_products(frames[0]):
            return self._compare(words, _context(*frames))[0][:, 0].softmax(-1)

    def _attend(self, query: Tensors, context: Tensors) -> Tensor:
        """[Q, C]."""
        pairs = tile_numbers(context[0]) // (query[0].shape[1] * context[0].shape[1])
        side = max(1, math.isqrt(pairs))
        with exact_products(context[0]):
            return score_tiles(self._tile, query, _context(*context), (side, side))

    def _tile(self, query: Tensors, context: Tensors) -> Tensor:
        cosine = self._compare(query, context)[1]
        return self.pool(self.lambda2 * cosine, query[1].unsqueeze(1)) / self.lambda2

    def _compare(self, query: Tensors, context: Tensors) -> tuple[Tensor, Tensor]:
        """Logits of the attention [Q q, C, c], and cosines of query tokens and attended vectors [Q, C, q]."""
        (asking, asking_mask), (tokens, barrier, gram) = query, context
        similarity = product(asking.flatten(0, 1), tokens.flatten(0, 1).T, self.products).view(-1, *barrier.shape)
        logits = similarity if self.slope is None else _clipped(similarity, asking_mask.shape, self.slope)
        logits = torch.add(barrier, logits, alpha=self.lambda1)
        cosine: Tensor = AttendedCosine.apply(similarity, logits, gram)  # [Q q, C]
        return logits, cosine.unflatten(0, asking_mask.shape).transpose(1, 2)


class AttendedCosine(torch.autograd.Function):
    """cos(query token, attended vector) [n, C] for n query tokens and C contexts of c tokens, all of unit length.

    similarity, logits: [n, C, c], cosines and logits of the attention. gram: [C, c, c], products of the tokens.

    With w = softmax(logits) the cosine is (w . s) / sqrt(w' G w). docs/math/text_aware_pooling.md, section 5, derives
    the gradients for m = 1 quadratic form and no linear ones.
    """

    @staticmethod
    def forward(ctx: Any, similarity: Tensor, logits: Tensor, gram: Tensor) -> Tensor:
        weight = logits.softmax(-1)
        dot = (similarity * weight).sum(-1)
        along = torch.empty_like(weight)
        with exact_products(gram):  # here, because a tile that is computed again is outside of `scores`
            torch.bmm(weight.transpose(0, 1), gram, out=along.transpose(0, 1))
        quadratic = along.mul_(weight).sum(-1)
        # If tokens cancel out, the norm consists of rounding errors.
        shortest = torch.finfo(gram.dtype).eps
        ctx.save_for_backward(similarity, weight, gram, dot, quadratic)
        ctx.shortest = shortest
        return dot * quadratic.clamp(min=shortest).rsqrt()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensors:
        similarity, weight, gram, dot, quadratic = ctx.saved_tensors
        with exact_products(gram):
            by_dot = grads[0] * quadratic.clamp(min=ctx.shortest).rsqrt()
            rho = torch.where(quadratic > ctx.shortest, -0.5 * dot / quadratic, 0)
            scaled = weight * rho.unsqueeze(-1)
            by_similarity = weight * by_dot.unsqueeze(-1)
            by_weight = similarity - torch.addcmul(dot, rho, quadratic, value=2).unsqueeze(-1)
            by_weight.transpose(0, 1).baddbmm_(scaled.transpose(0, 1), gram, alpha=2)
            by_gram = by_similarity.permute(1, 2, 0) @ scaled.transpose(0, 1)
        return by_similarity, by_weight.mul_(by_similarity), by_gram


def _unit_tokens(sequence: TokenSequence) -> Tensors:
    tokens, mask = real_tokens(sequence)
    return normalize(tokens, dim=-1), mask


def _context(tokens: Tensor, mask: Tensor) -> Tensors:
    """Tokens [C, c, D], a barrier [C, c] and the Gram matrices [C, c, c]."""
    # 0, or for padding a number that no softmax survives.
    barrier = torch.zeros_like(tokens[..., 0]).masked_fill_(~mask, torch.finfo(tokens.dtype).min / 4)
    return tokens, barrier, product(tokens, tokens.mT)


def _clipped(similarity: Tensor, queries: torch.Size, slope: float) -> Tensor:
    """LeakyReLU of [Q q, C, c], divided by its norm over the q tokens of a query. Padded ones are zero."""
    clipped = leaky_relu(similarity.unflatten(0, queries), slope)
    squared_norm = clipped.square().sum(1, keepdim=True).clamp(min=torch.finfo(clipped.dtype).eps)
    return (clipped * squared_norm.rsqrt()).flatten(0, 1)


def _log_sum_exp(values: Tensor, mask: Tensor) -> Tensor:
    return values.masked_fill(~mask, -torch.inf).logsumexp(-1)


def _log_mean_exp(values: Tensor, mask: Tensor) -> Tensor:
    return _log_sum_exp(values, mask) - mask.sum(-1).to(values.dtype).log()
