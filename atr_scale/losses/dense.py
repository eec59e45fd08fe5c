"""The losses as formulas on whole matrices: the reference that the tiled losses are tested against.

`scores` is [texts, audios] (rows i, columns j) in any float dtype; narrower ones than fp32 are widened. In "t2a" a text
is the query and the softmax is over audios, along a row; in "a2t" an audio is the query and the softmax is over texts,
along a column. Every function returns a scalar, t2a_share * t2a + (1 - t2a_share) * a2t: by default the mean of the two
directions.

The targets are the positives mask [texts, audios], normalised per row for t2a and per column for a2t. A query without a
positive adds zero to the mean over queries. With positives_mean "pairs" a direction is the mean over all positive pairs
instead, so that a query counts as often as it has positives (the code of arXiv 2408.11641).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from atr_scale.errors import UserError
from atr_scale.losses.directions import tell
from atr_scale.losses.targets import PositivesMean
from atr_scale.score_block import at_least_fp32


def nt_xent(
    scores: Tensor,
    temperature: float | Tensor,
    positives: Tensor | None = None,
    t2a_share: float = 0.5,
    positives_mean: PositivesMean = "queries",
) -> Tensor:
    """NT-Xent / InfoNCE (van den Oord et al. 2018; as used in arXiv 2303.05681, eq. 3), logits scores / temperature.

    positives: [texts, audios] bool, by default the diagonal. Raises UserError if shapes do not fit.
    """
    logits, targets = at_least_fp32(scores) / temperature, _targets(scores, positives)
    t2a, a2t = (_cross_entropy(logits, targets, dim, positives_mean) for dim in (1, 0))
    return _two_way(t2a, a2t, t2a_share)


def pmr(
    scores: Tensor,
    temperature: float | Tensor,
    omega: float,
    positives: Tensor | None = None,
    detach_prior: bool = False,
    scale_by_batch: bool = False,
    t2a_share: float = 0.5,
    positives_mean: PositivesMean = "queries",
) -> Tensor:
    """Prior-matrix-revised loss (arXiv 2303.05681, eq. 12-14): logits scores * prior / temperature.

    The prior of t2a is the softmax over *texts* of omega * scores, that of a2t the softmax over audios, so that a pair
    counts only if both directions agree. Equations 13 and 14 as printed index the prior along the axis of the loss,
    which makes it constant there; section 3.2 of the paper and CAMoE's dual softmax (arXiv 2109.04290) state the axis
    that is used here.
    detach_prior: no gradient through the prior. scale_by_batch: the prior times its number of candidates, as in CAMoE,
    so that a uniform prior leaves the scores unchanged. Raises UserError if shapes do not fit.
    """
    scores = at_least_fp32(scores)
    over_texts, over_audios = (omega * scores).softmax(0), (omega * scores).softmax(1)
    if detach_prior:
        over_texts, over_audios = over_texts.detach(), over_audios.detach()
    if scale_by_batch:
        over_texts, over_audios = over_texts * scores.shape[0], over_audios * scores.shape[1]
    targets = _targets(scores, positives)
    t2a = _cross_entropy(scores * over_texts / temperature, targets, 1, positives_mean)
    a2t = _cross_entropy(scores * over_audios / temperature, targets, 0, positives_mean)
    return _two_way(t2a, a2t, t2a_share)


def distillation(
    scores: Tensor,
    teacher_scores: Tensor,
    temperature: float | Tensor,
    teacher_temperature: float | Tensor | None = None,
    teacher_scores_a2t: Tensor | None = None,
    t2a_share: float = 0.5,
) -> Tensor:
    """Soft cross-entropy against estimated correspondences (L_dist of arXiv 2408.11641).

    The soft labels are softmax(teacher_scores / teacher_temperature), without a gradient.
    teacher_scores: [texts, audios]; for an ensemble the weighted mean of its members' cosines. teacher_temperature:
    default, the student's. teacher_scores_a2t: [texts, audios], those of a2t if they differ from those of t2a.
    """
    logits = at_least_fp32(scores) / temperature
    teacher_temperature = temperature if teacher_temperature is None else teacher_temperature
    t2a, a2t = (
        at_least_fp32(own.detach()) / _constant(teacher_temperature)
        for own in (teacher_scores, teacher_scores if teacher_scores_a2t is None else teacher_scores_a2t)
    )
    both = _soft_cross_entropy(logits, t2a.softmax(1), 1), _soft_cross_entropy(logits, a2t.softmax(0), 0)
    return _two_way(*both, t2a_share)


def cmsc(
    scores: Tensor,
    text_scores: Tensor,
    audio_scores: Tensor,
    temperature: float | Tensor,
    beta: float,
    target_temperature: float | Tensor,
    positives: Tensor | None = None,
    mode: Literal["each", "add"] = "each",
    t2a_share: float = 0.5,
) -> Tensor:
    """Cross-modal similarity consistency: the joint soft-supervision term of arXiv 2403.10146, a KL divergence.

    The targets are (1 - beta) * positives + beta * softmax(intra-modal cosines / target_temperature), without a
    gradient. mode "each": the cosines of texts for t2a and those of audios for a2t; "add": their mean for both. The
    targets are one distribution for each query, so a direction is always a mean over queries.
    text_scores [texts, texts], audio_scores [audios, audios]: cosines inside a modality.
    Raises UserError if there are not as many texts as audios, and if shapes do not fit.
    """
    if scores.shape[0] != scores.shape[1]:
        raise UserError(f"cmsc needs as many texts as audios, got scores {list(scores.shape)}")
    logits = at_least_fp32(scores) / temperature
    hard = _targets(scores, positives).to(logits.dtype)
    text_scores, audio_scores = (at_least_fp32(x.detach()) for x in (text_scores, audio_scores))
    if mode == "add":
        text_scores = audio_scores = (text_scores + audio_scores) / 2

    def divergence(intra: Tensor, dim: int) -> Tensor:
        soft = (intra / _constant(target_temperature)).softmax(dim)
        target = (1 - beta) * _shares(hard, dim) + beta * soft
        entropy = -torch.xlogy(target, target).sum(dim).mean()
        return _soft_cross_entropy(logits, target, dim) - entropy

    return _two_way(divergence(text_scores, 1), divergence(audio_scores, 0), t2a_share)


def intra_modal(scores: Tensor, temperature: float | Tensor, same: Tensor | None = None) -> Tensor:
    """Contrast inside one modality (L_IntraC of arXiv 2403.10146): the only positive of a sample is the sample itself.

    scores: [N, N] cosines of one modality. same: [N, N] bool, pairs of one clip, which are no negatives.
    """
    logits = at_least_fp32(scores) / temperature
    itself = torch.eye(scores.shape[0], dtype=torch.bool, device=scores.device)
    if same is not None:
        logits = logits.masked_fill(same & ~itself, -torch.inf)
    return (_cross_entropy(logits, itself, 1) + _cross_entropy(logits, itself, 0)) / 2


def _targets(scores: Tensor, positives: Tensor | None) -> Tensor:
    if positives is None:
        if scores.shape[0] != scores.shape[1]:
            raise UserError(f"scores {list(scores.shape)} do not pair by position: give positives=...")
        return torch.eye(scores.shape[0], dtype=torch.bool, device=scores.device)
    if positives.shape != scores.shape:
        raise UserError(f"positives {list(positives.shape)} and scores {list(scores.shape)} differ in shape")
    return positives.bool()


def _shares(mask: Tensor, dim: int, mean: PositivesMean = "queries") -> Tensor:
    """Targets of the queries, which are rows (dim 1) or columns (dim 0), for a mean over queries.

    They sum to one, or to zero if there is no positive. With mean "pairs" all have the same value, and they sum to the
    number of queries.
    """
    if mean == "pairs":
        return mask * (mask.shape[1 - dim] / mask.sum().clamp(min=1))
    return mask / mask.sum(dim, keepdim=True).clamp(min=1)


def _cross_entropy(logits: Tensor, positives: Tensor, dim: int, mean: PositivesMean = "queries") -> Tensor:
    """Cross-entropy against hard targets."""
    # where() and not a product: logits of masked-out pairs are -inf, and 0 * -inf is not 0.
    log_probability = torch.where(positives, logits.log_softmax(dim), 0)
    return -(_shares(positives.to(logits.dtype), dim, mean) * log_probability).sum(dim).mean()


def _soft_cross_entropy(logits: Tensor, target: Tensor, dim: int) -> Tensor:
    return -(target * logits.log_softmax(dim)).sum(dim).mean()


def _two_way(t2a: Tensor, a2t: Tensor, t2a_share: float) -> Tensor:
    tell(t2a, a2t, t2a_share)
    return t2a_share * t2a + (1 - t2a_share) * a2t


def _constant(value: float | Tensor) -> float | Tensor:
    return value.detach() if isinstance(value, Tensor) else value
