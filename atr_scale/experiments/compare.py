"""`atr-scale compare`: what differs between experiments, in their configuration and in their results.

Intervals are of a paired bootstrap over clips (Efron and Tibshirani 1993): both experiments answer the same queries, so
their difference varies less than either. Clips are resampled with all their captions, whose ranks are correlated. With
several seeds a query's value is the mean over the seeds.

Shape suffixes: Q queries of a direction, C captioned clips, K metrics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atr_scale.evaluation.metrics import resamples
from atr_scale.experiments.evaluated import Evaluated, Experiment, differing_values, read_experiments

SAMPLES, LEVEL = 1000, 0.95
BINS = 4  # of a number with more than DISTINCT values
DISTINCT = 6
CATEGORIES = 12  # of a text; the rarer ones are one bin
OTHER, UNKNOWN = "(other)", "(unknown)"  # in brackets: a field may have such a value
ALL = ""  # the bin of all queries
DIRECTIONS = ("t2a", "a2t")


@dataclass(frozen=True)
class Measured:
    """A metric of an experiment: mean and standard deviation (None of one run) over its seeds.

    difference, low, high: to the first experiment, with the bounds of its interval; None for the first one, and for a
    metric that is no mean over queries.
    """

    mean: float
    deviation: float | None
    each: tuple[float, ...]  # of every run
    difference: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class ComparedRuns:
    """Experiments on one split. measured: by bin (ALL first), metric and experiment. queries: number in each bin, by
    direction."""

    split: str
    experiments: list[Experiment]
    differing: dict[str, list[str]]
    by: str | None
    measured: dict[str, dict[str, list[Measured]]]
    queries: dict[str, dict[str, int]]

    @property
    def metrics(self) -> list[str]:
        return list(self.measured[ALL])


def compare_runs(locations: Sequence[str | Path], split: str | None = None, by: str | None = None) -> ComparedRuns:
    """Compare runs, those of several seeds together; arguments as those of `read_experiments`.

    by: "duration", "caption_words" or a field of the samples' JSON, for the results of each of its bins: quarters of
    the queries for numbers, categories for texts. Raises UserError like `read_experiments` and `Evaluated.field`.
    """
    experiments = read_experiments(locations, split)
    first = experiments[0].runs[0]
    values = [[run.values() for run in one.runs] for one in experiments]
    every = {direction: np.ones(len(first.clips(direction)), dtype=bool) for direction in DIRECTIONS}
    bins = {ALL: every} | ({} if by is None else split_by(first.field(by)))
    measured = {name: _measure(first, values, chosen) for name, chosen in bins.items()}
    for direction in DIRECTIONS:
        key = f"{direction}/median_rank"
        ranks = [tuple(run.result.metrics[key] for run in one.runs) for one in experiments]
        measured[ALL][key] = [Measured(float(np.mean(each)), _deviation(each), each) for each in ranks]
    return ComparedRuns(
        split=first.entry["split"],
        experiments=experiments,
        differing=differing_values(experiments),
        by=by,
        measured=measured,
        queries={name: {d: int(chosen[d].sum()) for d in DIRECTIONS} for name, chosen in bins.items()},
    )


def split_by(field: dict[str, NDArray[Any]]) -> dict[str, dict[str, NDArray[np.bool_]]]:
    """Bins by name, each with the queries that are in it, [Q] of each direction. field: the values of the queries."""
    reference = field["t2a"]
    if reference.dtype.kind == "f":
        return _split_numbers(field, reference[~np.isnan(reference)])
    names, counts = np.unique(reference[reference != ""], return_counts=True)
    kept = names[np.argsort(-counts, kind="stable")][:CATEGORIES]
    bins = {str(name): {d: values == name for d, values in field.items()} for name in kept}
    bins[OTHER] = {d: ~np.isin(values, [*kept, ""]) for d, values in field.items()}
    bins[UNKNOWN] = {d: values == "" for d, values in field.items()}
    return _filled(bins)


def _split_numbers(field: dict[str, NDArray[Any]], known: NDArray[Any]) -> dict[str, dict[str, NDArray[np.bool_]]]:
    distinct = np.unique(known)
    few = len(distinct) <= DISTINCT
    edges = distinct if few else np.unique(np.quantile(known, np.linspace(0, 1, BINS + 1)[:-1]))
    tops = [*edges[1:], np.inf]
    bins = {}
    for low, top in zip(edges, tops, strict=True):
        name = f"{low:g}" if few else f"{low:g} to {known.max():g}" if np.isinf(top) else f"{low:g} to below {top:g}"
        bins[name] = {
            d: (values >= (-np.inf if low == edges[0] else low)) & (values < top) for d, values in field.items()
        }
    bins[UNKNOWN] = {d: np.isnan(values) for d, values in field.items()}
    return _filled(bins)


def _filled(bins: dict[str, dict[str, NDArray[np.bool_]]]) -> dict[str, dict[str, NDArray[np.bool_]]]:
    return {name: chosen for name, chosen in bins.items() if chosen["t2a"].any()}


def _measure(
    first: Evaluated, values: list[list[dict[str, NDArray[np.float64]]]], chosen: dict[str, NDArray[np.bool_]]
) -> dict[str, list[Measured]]:
    """The metrics of the chosen queries, for every experiment. values: of every run of every experiment."""
    measured: dict[str, list[Measured]] = {}
    for direction in DIRECTIONS:
        keys = [key for key in values[0][0] if key.startswith(f"{direction}/")]
        clips, inside = first.clips(direction)[chosen[direction]], chosen[direction]
        # [runs, Q, K] of every experiment
        tables = [np.stack([np.stack([run[key][inside] for key in keys], 1) for run in runs]) for runs in values]
        each = [_means(table.transpose(1, 0, 2)) for table in tables]
        pooled = [table.mean(0) for table in tables]
        differences = [(_means(own - pooled[0]), *bootstrap_means(own - pooled[0], clips)) for own in pooled[1:]]
        for k, key in enumerate(keys):
            rows = [Measured(float(one[:, k].mean()), _deviation(one[:, k]), tuple(one[:, k].tolist())) for one in each]
            for number, (mean, low, high) in enumerate(differences, start=1):
                bounds = float(mean[k]), float(low[k]), float(high[k])
                rows[number] = Measured(rows[number].mean, rows[number].deviation, rows[number].each, *bounds)
            measured[key] = rows
    return measured


def bootstrap_means(
    values: NDArray[np.float64], clips: NDArray[np.int64], samples: int = SAMPLES, seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Bounds [K] of the 95 % bootstrap intervals of the means of values [Q, K]; NaN is no query of its metric.

    Clips are resampled; clips [Q] says which clip a query belongs to.
    """
    if len(values) == 0:  # a bin without a query of this direction
        return np.zeros(values.shape[1]), np.zeros(values.shape[1])
    _, group = np.unique(clips, return_inverse=True)
    counts = np.stack([np.bincount(group, ~np.isnan(column)) for column in values.T], 1)
    totals = np.stack([np.bincount(group, np.nan_to_num(column)) for column in values.T], 1)
    generator = np.random.default_rng(seed)
    drawn = [
        weights @ totals / np.maximum(weights @ counts, 1)
        for weights in resamples(len(counts), samples, generator, len(counts))
    ]
    low, high = np.quantile(np.concatenate(drawn), [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return low, high


def _means(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means over the first axis without NaN; 0 of nothing."""
    counted = ~np.isnan(values)
    means: NDArray[np.float64] = np.nan_to_num(values).sum(0) / np.maximum(counted.sum(0), 1)
    return means


def _deviation(each: Sequence[float] | NDArray[np.float64]) -> float | None:
    """Standard deviation of a sample (n - 1); None of one value."""
    return float(np.std(each, ddof=1)) if len(each) > 1 else None
