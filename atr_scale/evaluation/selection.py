"""`evaluation.select`: the metric of a set of `data.validation`, or sum of metrics, that makes a checkpoint the best.

Published code sums recalls: "t2a/R@1 + a2t/R@1".
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from atr_scale.data.sample import BadSample
from atr_scale.data.shard_reader import ShardSet
from atr_scale.errors import UserError

# In a labelled set clips share captions, so its default is a metric of classes.
DEFAULTS = ("class/mAP@10", "t2a/mAP@10")
KNOWN = re.compile(
    r"(t2a|a2t)/(R@1|R@5|R@10|mAP@10|mAP@16|mAP|median_rank)|class/(R@1|mAP@10|mAP)|zero_shot/(accuracy|R@5|mAP)"
)
OF_CLASSES = ("class/", "zero_shot/")
LOWER_IS_BETTER = "median_rank"


def check_selection(select: str | None, sets: Sequence[str]) -> None:
    """Raises UserError if `select` names no metric of a validation set; sets: names of the validation sets."""
    if select is None or not sets:
        return
    for name, metric in _terms(select, sets):
        if not KNOWN.fullmatch(metric):
            prefix = f"{name}/" if len(sets) > 1 else ""
            raise UserError(
                f"evaluation.select = {select!r} names no validation metric: give, for example, {prefix}t2a/mAP@10 or "
                f"{prefix}a2t/R@1" + (f"; the sets are {', '.join(sets)}" if len(sets) > 1 else "")
            )


def check_labels(select: str | None, sets: Mapping[str, ShardSet]) -> None:
    """Raises UserError if `select` is a metric of classes, but the first clip of its set has no label.

    It is called before training starts. sets: the opened validation sets by name, as in `check_selection`.
    """
    if select is None or not sets:
        return
    for name, metric in _terms(select, list(sets)):
        if metric.startswith(OF_CLASSES) and not _may_have_labels(sets[name]):
            raise UserError(
                f"evaluation.select = {select!r}: the clips of {sets[name].location} have no labels: give t2a/mAP@10 "
                "or a2t/R@1, or a labelled set"
            )


def _may_have_labels(shards: ShardSet) -> bool:
    """Whether the first clip has a label. A set without a readable first clip is not judged."""
    try:
        return not len(shards) or shards.read(0).label is not None
    except BadSample:
        return True


def selection_score(found: Mapping[str, Mapping[str, float]], select: str | None) -> float:
    """The selected metric, negated if lower is better, or the sum of several.

    found: metrics of each validation set by its name, in the order of the configuration. If `select` names no set, it
    is a metric of the first set. If it is None, the metric is class/mAP@10 of a labelled set, else t2a/mAP@10. Raises
    UserError if the set has no such metric (for example zero-shot accuracy without labels).
    """
    sets = list(found)
    if select is None:
        metrics = found[sets[0]]
        return next(metrics[key] for key in DEFAULTS if key in metrics)
    return sum(_value(found, name, metric, select) for name, metric in _terms(select, sets))


def _value(found: Mapping[str, Mapping[str, float]], name: str, metric: str, select: str) -> float:
    if metric not in found[name]:
        raise UserError(
            f"evaluation.select = {select!r}: the set {name} gives no {metric}; it gives {', '.join(found[name])}"
        )
    value = found[name][metric]
    return -value if metric.endswith(LOWER_IS_BETTER) else value


def _terms(select: str, sets: Sequence[str]) -> list[tuple[str, str]]:
    """(set, metric) of each term of the sum."""
    return [_split(term.strip(), sets) for term in select.split("+")]


def _split(select: str, sets: Sequence[str]) -> tuple[str, str]:
    first, _, rest = select.partition("/")
    return (first, rest) if first in sets else (sets[0], select)
