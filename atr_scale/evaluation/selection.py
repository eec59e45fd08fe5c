"""The one number that makes a checkpoint the best: `evaluation.select` over the sets of `data.validation`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from atr_scale.data.sample import BadSample
from atr_scale.data.shard_reader import ShardSet
from atr_scale.errors import UserError

# In a labelled set captions are shared, so classes are what is asked for.
DEFAULTS = ("class/mAP@10", "t2a/mAP@10")
KNOWN = re.compile(r"(t2a|a2t)/(R@1|R@5|R@10|mAP@10|median_rank)|class/(R@1|mAP@10|mAP)|zero_shot/(accuracy|R@5|mAP)")
OF_CLASSES = ("class/", "zero_shot/")
LOWER_IS_BETTER = "median_rank"


def check_selection(select: str | None, sets: Sequence[str]) -> None:
    """UserError if `select` names no metric that validation can give on one of the sets."""
    if select is None or not sets:
        return
    name, metric = _split(select, sets)
    if not KNOWN.fullmatch(metric):
        prefix = f"{name}/" if len(sets) > 1 else ""
        raise UserError(
            f"evaluation.select = {select!r} names no validation metric: give, for example, {prefix}t2a/mAP@10 or "
            f"{prefix}a2t/R@1" + (f"; the sets are {', '.join(sets)}" if len(sets) > 1 else "")
        )


def check_labels(select: str | None, sets: Mapping[str, ShardSet]) -> None:
    """UserError if `select` is about classes and the first clip of its set has no label: before training, not after the
    first epoch of it. sets: those of `check_selection`, opened."""
    if select is None or not sets:
        return
    name, metric = _split(select, list(sets))
    if not metric.startswith(OF_CLASSES) or not len(sets[name]):
        return
    try:
        label = sets[name].read(0).label
    except BadSample:
        return
    if label is None:
        raise UserError(
            f"evaluation.select = {select!r}: the clips of {sets[name].location} have no labels: give t2a/mAP@10 or "
            "a2t/R@1, or a labelled set"
        )


def selection_score(found: Mapping[str, Mapping[str, float]], select: str | None) -> float:
    """The selected metric, higher is better; found: metrics of each set by its name, in the configuration's order.

    Without a set's name `select` is about the first set; None is mAP@10 of classes in a labelled set, else t2a/mAP@10.
    Raises UserError if the set did not give that metric (zero-shot accuracy without labels, say).
    """
    sets = list(found)
    if select is None:
        metrics = found[sets[0]]
        return next(metrics[key] for key in DEFAULTS if key in metrics)
    name, metric = _split(select, sets)
    if metric not in found[name]:
        raise UserError(
            f"evaluation.select = {select!r}: the set {name} gives no {metric}; it gives {', '.join(found[name])}"
        )
    value = found[name][metric]
    return -value if metric.endswith(LOWER_IS_BETTER) else value


def _split(select: str, sets: Sequence[str]) -> tuple[str, str]:
    first, _, rest = select.partition("/")
    return (first, rest) if first in sets else (sets[0], select)
