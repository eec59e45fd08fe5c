"""Scorers: text and audio token sequences -> scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from atr_scale.errors import UserError
from atr_scale.scorers import cosine
from atr_scale.scorers.cosine import CosineScorer
from atr_scale.scorers.local_global import LocalGlobalScorer
from atr_scale.scorers.scorer import Scorer
from atr_scale.scorers.tap import TextAwarePooling

SCORERS: dict[str, Callable[..., Scorer]] = {
    "pooled": lambda dim: CosineScorer(cosine.pooled),
    "mean": lambda dim: CosineScorer(cosine.mean),
    "max": lambda dim: CosineScorer(cosine.maximum),
    "meanmax": lambda dim: CosineScorer(cosine.mean_plus_max),
    "tap": TextAwarePooling,
    "lgmm": LocalGlobalScorer,
}


def build_scorer(name: str, dim: int, **options: Any) -> Scorer:
    """The scorer `name` for token sequences of width `dim`. Raises UserError for an unknown name or option."""
    if name not in SCORERS:
        raise UserError(f"unknown scorer {name!r}: known are {', '.join(SCORERS)}")
    try:
        return SCORERS[name](dim=dim, **options)
    except TypeError:
        raise UserError(f"scorer {name!r} does not take these options: {', '.join(options)}") from None
