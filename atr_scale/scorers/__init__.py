"""Scorers: text and audio token sequences -> scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from atr_scale.errors import UserError
from atr_scale.scorers import cosine
from atr_scale.scorers.co_attention import CoAttentionScorer
from atr_scale.scorers.cosine import CosineScorer
from atr_scale.scorers.local_global import LocalGlobalScorer
from atr_scale.scorers.scorer import Scorer
from atr_scale.scorers.tap import TextAwarePoolingScorer

SCORERS: dict[str, Callable[..., Scorer]] = {
    "pooled": lambda dim: CosineScorer(cosine.pooled),
    "mean": lambda dim: CosineScorer(cosine.mean),
    "max": lambda dim: CosineScorer(cosine.maximum),
    "meanmax": lambda dim: CosineScorer(cosine.mean_plus_max),
    "netrvlad": lambda dim, **options: CosineScorer(cosine.NetRVLAD(dim, **options)),
    "attention": lambda dim, **options: CosineScorer(cosine.AttentionPooling(dim, **options)),
    "tap": TextAwarePoolingScorer,
    "lgmm": LocalGlobalScorer,
    "coattention": CoAttentionScorer,
}


def build_scorer(name: str, dim: int, **options: Any) -> Scorer:
    """The scorer `name` for token sequences of width `dim`, its options as its class takes them.

    Raises UserError for an unknown name, an option that the scorer does not have, or a value that it cannot take.
    """
    if name not in SCORERS:
        raise UserError(f"unknown scorer {name!r}: known are {', '.join(SCORERS)}")
    try:
        return SCORERS[name](dim=dim, **options)
    except TypeError:
        if not options:
            raise
        given = ", ".join(f"{key}={value!r}" for key, value in options.items())
        raise UserError(f"scorer {name!r} does not take these options: {given}; correct model.scorer.options") from None
