"""Scorers map text and audio token sequences to scores. docs/scorers.md lists them.

A plug-in adds its scorer to `SCORERS`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from atr_scale.errors import UserError
from atr_scale.scorers import pooling
from atr_scale.scorers.co_attention import CoAttentionScorer
from atr_scale.scorers.local_global import LocalGlobalScorer
from atr_scale.scorers.pooling import AttentionScorer, CosineScorer, NetRVLADScorer
from atr_scale.scorers.scorer import Scorer
from atr_scale.scorers.tap import TextAwarePoolingScorer
from atr_scale.sections import Section, check_options, options_of

SCORERS: dict[str, Callable[..., Scorer]] = {
    "pooled": partial(CosineScorer, pool=pooling.pooled),
    "mean": partial(CosineScorer, pool=pooling.mean),
    "max": partial(CosineScorer, pool=pooling.maximum),
    "meanmax": partial(CosineScorer, pool=pooling.mean_plus_max),
    "netrvlad": NetRVLADScorer,
    "attention": AttentionScorer,
    "tap": TextAwarePoolingScorer,
    "lgmm": LocalGlobalScorer,
    "coattention": CoAttentionScorer,
}


def scorer_options(name: str) -> type[Section]:
    """The section with the options of the scorer `name`; one without fields if the name is unknown."""
    return options_of(SCORERS.get(name), Section)


def build_scorer(name: str, dim: int, **options: Any) -> Scorer:
    """The scorer `name` for token sequences of width `dim`. options: fields of the scorer's `Options`.

    Raises UserError for an unknown name, an unknown option, or a value that an option cannot have.
    """
    if name not in SCORERS:
        raise UserError(f"unknown scorer {name!r}: known are {', '.join(SCORERS)}")
    chosen = check_options(scorer_options(name), options, f"the scorer {name}")
    return SCORERS[name](dim=dim, **dict(chosen))
