"""Local-to-global matching of frames and tokens (LGMM): Wang, Gu, Ling, ICASSP 2024, arXiv 2403.10146.

Shape suffixes: B texts, b audios, M frames, N text tokens, D width. One side holds the queries (Q sequences of q
tokens), the other the contexts (C sequences of c tokens); in "frames over words" audios are the queries.

Every query token attends over the tokens of the context and is compared with the attended vector; the comparisons are
pooled. With tokens of unit length the attended vector is never computed: its product with the query is a weighted mean
of similarities, and its squared norm is a quadratic form of the context's Gram matrix.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import leaky_relu, normalize

from atr_scale.batch import TokenSequence
from atr_scale.score_block import at_least_fp32
from atr_scale.scorers.scorer import Scorer, without_autocast
from atr_scale.scorers.tiles import Tensors, for_device, real_tokens, score_tiles
from atr_scale.sections import Positive, Section

# Token pairs of a tile: as many as a processor's caches hold, or enough to keep a GPU busy.
TILE_SIZES = {"cpu": 2**20, "cuda": 2**26}
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

    def _attend(self, query: Tensors, context: Tensors) -> Tensor:
        """[Q, C]."""
        tokens, mask = context
        pairs = for_device(TILE_SIZES, tokens.device) // (query[0].shape[1] * tokens.shape[1])
        side = max(1, math.isqrt(pairs))
        with without_autocast(tokens):
            gram = tokens @ tokens.transpose(1, 2)
        return score_tiles(self._tile, query, (tokens, mask, gram), (side, side))

    def _tile(self, query: Tensors, context: Tensors) -> Tensor:
        (asking, asking_mask), (tokens, mask, gram) = query, context
        Q, C = len(asking), len(tokens)
        similarity = asking.flatten(0, 1) @ tokens.flatten(0, 1).T
        similarity = at_least_fp32(similarity).unflatten(1, mask.shape).transpose(0, 1)  # [C, Q q, c]
        with without_autocast(tokens):
            logits = similarity if self.slope is None else _clipped(similarity, asking_mask.shape, self.slope)
            weights = (self.lambda1 * logits).masked_fill(~mask.unsqueeze(1), -torch.inf).softmax(-1)
            product = (weights * similarity).sum(-1)
            squared_norm = ((weights @ gram) * weights).sum(-1)
            # If tokens cancel out, the norm consists of rounding errors.
            cosine = product * squared_norm.clamp(min=torch.finfo(gram.dtype).eps).rsqrt()
            cosine = cosine.view(C, Q, -1).transpose(0, 1)
            return self.pool(self.lambda2 * cosine, asking_mask.unsqueeze(1)) / self.lambda2


def _unit_tokens(sequence: TokenSequence) -> Tensors:
    tokens, mask = real_tokens(sequence)
    return normalize(tokens, dim=-1), mask


def _clipped(similarity: Tensor, queries: torch.Size, slope: float) -> Tensor:
    """LeakyReLU of [C, Q q, c], divided by its norm over the q tokens of a query. Padded ones are zero."""
    clipped = leaky_relu(similarity.unflatten(1, queries), slope)
    squared_norm = clipped.square().sum(2, keepdim=True).clamp(min=torch.finfo(clipped.dtype).eps)
    return (clipped * squared_norm.rsqrt()).flatten(1, 2)


def _log_sum_exp(values: Tensor, mask: Tensor) -> Tensor:
    return values.masked_fill(~mask, -torch.inf).logsumexp(-1)


def _log_mean_exp(values: Tensor, mask: Tensor) -> Tensor:
    return _log_sum_exp(values, mask) - mask.sum(-1).to(values.dtype).log()
