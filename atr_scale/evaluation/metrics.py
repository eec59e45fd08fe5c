"""Retrieval metrics from ranks. A rank is a count of higher scores, so nothing is sorted.

Shape suffixes: T texts, A clips, Q queries, C clips that have a caption.
Conventions, as in WavCaps, salsa and the DCASE baselines: every caption is a query with one relevant clip. A clip is a
query, and all its captions are relevant; the best ranked of them decides R@k.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atr_scale.errors import UserError

RECALL_AT = (1, 5, 10)
PRECISION_AT = 10
GRADED_AT = 16
# mAP@10 is the measure of DCASE up to 2024, mAP@16 that of 2025; mAP reads the whole list.
CUTOFFS = {f"mAP@{PRECISION_AT}": PRECISION_AT, f"mAP@{GRADED_AT}": GRADED_AT, "mAP": None}
TILE = 1 << 20  # scores compared at once: temporaries of any matrix take a few MB

Scores = Tensor | NDArray[np.floating]
Ids = Tensor | NDArray[np.integer]


@dataclass(frozen=True)
class Ranks:
    """Ranks of every text in both directions, from which all metrics follow; 1 is the first rank.

    t2a [T]: rank of the text's own clip among all clips. a2t [T]: rank of the text among all texts, for its own clip.
    clip [T]: index of the text's clip in audio_ids. audio_ids [A]: every candidate clip. All int64.
    graded: if there is a relevance file, `graded_values`; they stand for the text's own metrics of the same name.
    """

    t2a: NDArray[np.int64]
    a2t: NDArray[np.int64]
    clip: NDArray[np.int64]
    audio_ids: NDArray[np.int64]
    graded: dict[str, NDArray[np.float64]] = field(default_factory=dict)

    def best_a2t(self) -> NDArray[np.int64]:
        """Rank of the best ranked caption of every captioned clip, [C]."""
        return self.queries()["a2t"].rank

    def metrics(self) -> dict[str, float]:
        """`t2a/` and `a2t/` R@1, R@5, R@10, mAP@10, mAP@16, mAP (fractions) and median_rank."""
        return {f"{name}/{key}": value for name, queries in self.queries().items() for key, value in queries.metrics()}

    def queries(self) -> dict[str, Queries]:
        """The queries of "t2a", in the order of the texts, and of "a2t", in the order of the captioned clips."""
        clips, group = np.unique(self.clip, return_inverse=True)
        best = np.full(len(clips), np.iinfo(np.int64).max)
        np.minimum.at(best, group, self.a2t)
        each = np.arange(len(self.t2a))  # every caption has one relevant clip
        graded = {key.removeprefix("t2a/"): value for key, value in self.graded.items()}
        return {
            "t2a": Queries(self.t2a, _average_precision(self.t2a, each) | graded, group),
            "a2t": Queries(best, _average_precision(self.a2t, group), np.arange(len(clips))),
        }


@dataclass(frozen=True)
class Queries:
    """Queries of one direction.

    rank [Q]: of the first relevant item. precision: average precision up to each of CUTOFFS, and other graded values
    [Q]. clip [Q]: index of the query's clip among the captioned clips, in the order of `Ranks.audio_ids`.
    """

    rank: NDArray[np.int64]
    precision: dict[str, NDArray[np.float64]]
    clip: NDArray[np.int64]

    def values(self) -> dict[str, NDArray[np.float64]]:
        """The metrics that are means over queries, each [Q]; NaN is no query of this metric."""
        return {f"R@{k}": (self.rank <= k).astype(np.float64) for k in RECALL_AT} | self.precision

    def sums(self) -> tuple[list[str], NDArray[np.float64], NDArray[np.float64]]:
        """(keys of `values` [K], number of queries of each clip [C, K], sums of their values [C, K])."""
        values = self.values()
        counts = [np.bincount(self.clip, ~np.isnan(value)) for value in values.values()]
        totals = [np.bincount(self.clip, np.nan_to_num(value)) for value in values.values()]
        return list(values), np.stack(counts, 1), np.stack(totals, 1)

    def metrics(self) -> list[tuple[str, float]]:
        return [
            *((key, _mean(value)) for key, value in self.values().items()),
            ("median_rank", float(np.median(self.rank))),
        ]


def retrieval_metrics(scores: Scores, text_audio_ids: Ids, audio_ids: Ids) -> dict[str, float]:
    """Metrics of both directions of a score matrix [T, A]; ids as in `ranks`, keys as in `Ranks.metrics`."""
    return ranks(scores, text_audio_ids, audio_ids).metrics()


def ranks(scores: Scores, text_audio_ids: Ids, audio_ids: Ids) -> Ranks:
    """Rank of every relevant pair.

    scores [T, A] (any float dtype, any device), text_audio_ids [T]: the clip each text describes, audio_ids [A]:
    distinct. rank = 1 + number of greater scores + number of equal scores at a lower index. A clip without a caption
    is a candidate, but not a query. Raises UserError if a clip is repeated, if the clip of a text is absent, or if a
    score is NaN (every comparison with NaN is false, so a diverged model would rank everything first).
    """
    matrix = torch.as_tensor(scores)
    owner, clips = as_int64(text_audio_ids), as_int64(audio_ids)
    if tuple(matrix.shape) != (len(owner), len(clips)):
        raise UserError(
            f"retrieval scores: shape {tuple(matrix.shape)} for {len(owner)} texts and {len(clips)} clips;"
            " give scores as [texts, audios]"
        )
    clip = positions(owner, clips)
    t2a, a2t = _count_ranks(matrix, clip)
    return Ranks(t2a=t2a, a2t=a2t, clip=clip, audio_ids=clips)


def bootstrap(ranks: Ranks, samples: int = 1000, seed: int = 0, level: float = 0.95) -> dict[str, tuple[float, float]]:
    """Percentile bootstrap interval of every metric.

    In both directions CLIPS are resampled, because the ranks of the captions of one clip are correlated: resampling
    captions would give intervals that are too narrow. samples: number of resamples. level: of confidence. Returns the
    lower and upper bound of every key of `Ranks.metrics`.
    """
    generator = np.random.default_rng(seed)
    directions = ranks.queries()
    num_clips = len(directions["a2t"].rank)
    sums = {name: queries.sums() for name, queries in directions.items()}
    drawn: dict[str, list[NDArray[np.float64]]] = {}
    for weights in resamples(num_clips, samples, generator, len(ranks.t2a)):
        for name, queries in directions.items():
            keys, counts, totals = sums[name]
            number = weights @ np.bincount(queries.clip)
            means = weights @ totals / np.maximum(weights @ counts, 1)
            for key, column in zip(keys, means.T, strict=True):
                drawn.setdefault(f"{name}/{key}", []).append(column)
            drawn.setdefault(f"{name}/median_rank", []).append(_weighted_median(queries, weights, number))
    bounds = [(1 - level) / 2, (1 + level) / 2]
    return {
        key: (float(low), float(high))
        for key, parts in drawn.items()
        for low, high in [np.quantile(np.concatenate(parts), bounds)]
    }


def resamples(
    num_clips: int, samples: int, generator: np.random.Generator, width: int
) -> Iterator[NDArray[np.float64]]:
    """Resamples of clips in tiles [s, clips]: how many times each clip is drawn. width: values computed for each."""
    chunk = max(1, TILE // max(width, num_clips))
    for start in range(0, samples, chunk):
        size = min(chunk, samples - start)
        yield generator.multinomial(num_clips, np.full(num_clips, 1 / num_clips), size=size).astype(np.float64)


def classification(scores: Scores, labels: Ids) -> dict[str, float]:
    """Zero-shot classification and class retrieval on a labelled set.

    scores [classes, audios]: of one caption for each class; labels [audios]: class index of each clip. Of equal scores
    the lower index comes first. Raises UserError like `label_ranks`.

    zero_shot/accuracy: fraction of the clips whose class is ranked first.
    zero_shot/R@5: fraction of the clips whose class is among the first five.
    zero_shot/mAP: mean over clips of 1 / rank of the class.
    class/R@1: fraction of the classes whose caption retrieves a clip of the class first (precision at 1).
    class/mAP, class/mAP@10: all clips of the class are relevant; class/mAP@10 is divided by min(10, clips of the
    class), so that a perfect list scores 1.
    A class without clips is a candidate, but not a query.
    """
    table = label_ranks(scores, labels)
    _, group = np.unique(table.clip, return_inverse=True)
    size = np.bincount(group)
    return {
        "zero_shot/accuracy": float((table.t2a == 1).mean()),
        "zero_shot/R@5": float((table.t2a <= 5).mean()),
        "zero_shot/mAP": float((1 / table.t2a).mean()),
        "class/R@1": float(np.bincount(group, table.a2t == 1).mean()),
        f"class/mAP@{PRECISION_AT}": float(
            (_precision_sum(table.a2t, group, PRECISION_AT) / np.minimum(size, PRECISION_AT)).mean()
        ),
        "class/mAP": float((_precision_sum(table.a2t, group) / size).mean()),
    }


def graded(lists: Ids, grades: NDArray[np.floating]) -> dict[str, float]:
    """Text to audio retrieval with several relevant clips: `t2a/mAP@16` and `t2a/nDCG@16`.

    The means of `graded_values` over the captions with a relevant clip; its arguments.
    """
    return {key: _mean(value) for key, value in graded_values(lists, grades).items()}


def graded_values(lists: Ids, grades: NDArray[np.floating]) -> dict[str, NDArray[np.float64]]:
    """`t2a/mAP@16` and `t2a/nDCG@16` of every caption [T], NaN for a caption without a relevant clip.

    lists [T, k]: indices of the best clips of every text, best first, k = GRADED_AT or all clips. grades [T, A]: graded
    relevance, 0 to 1.
    mAP@16 (DCASE 2025 task 6): clips of grade 1 are relevant; the sum of the precisions at their ranks up to 16,
    divided by their number.
    nDCG@16 (Jarvelin and Kekalainen 2002): the gain is the grade, its discount is log2(1 + rank).
    """
    gains = np.take_along_axis(grades, as_int64(lists)[:, :GRADED_AT], 1)
    hits = gains >= 1
    places = np.arange(1, hits.shape[1] + 1)
    relevant = (grades >= 1).sum(1)
    precision = (hits * np.cumsum(hits, 1) / places).sum(1)
    discount = 1 / np.log2(1 + places)
    ideal = (-np.sort(-grades, axis=1)[:, :GRADED_AT] * discount).sum(1)
    gained = (gains * discount).sum(1)
    return {
        f"t2a/mAP@{GRADED_AT}": np.where(relevant > 0, precision / np.maximum(relevant, 1), np.nan),
        f"t2a/nDCG@{GRADED_AT}": np.where(ideal > 0, gained / np.maximum(ideal, np.finfo(np.float64).tiny), np.nan),
    }


def label_ranks(scores: Scores, labels: Ids) -> Ranks:
    """Ranks of a labelled set: t2a [audios] is the rank of each clip's class, a2t the clip's rank for its class, clip
    the class.

    scores [classes, audios], labels [audios]: class indices. Raises UserError if a label is no class, and like `ranks`.
    """
    matrix, wanted = torch.as_tensor(scores), as_int64(labels)
    num_classes = matrix.shape[0]
    wrong = np.flatnonzero((wanted < 0) | (wanted >= num_classes))
    if len(wrong):
        raise UserError(
            f"labelled evaluation: label {wanted[wrong[0]]} of clip {wrong[0]} is not one of the {num_classes} classes;"
            " give one caption for every class"
        )
    return ranks(matrix.T, wanted, np.arange(num_classes))


def _mean(values: NDArray[np.float64]) -> float:
    """Mean without NaN; 0 of nothing."""
    queries = values[~np.isnan(values)]
    return float(queries.mean()) if len(queries) else 0.0


def _average_precision(rank: NDArray[np.int64], group: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
    """[groups] for each of CUTOFFS: sum of the precisions at the relevant ranks, divided by their number."""
    return {key: _precision_sum(rank, group, cutoff) / np.bincount(group) for key, cutoff in CUTOFFS.items()}


def _precision_sum(rank: NDArray[np.int64], group: NDArray[np.int64], cutoff: int | None = None) -> NDArray[np.float64]:
    """[groups]: sum of the precisions at the ranks of the members of each group, up to the cutoff."""
    order = np.lexsort((rank, group))
    first = np.searchsorted(group[order], group[order])
    found = np.arange(len(order)) - first + 1
    precision = found / rank[order]
    if cutoff is not None:
        precision[rank[order] > cutoff] = 0.0
    return np.bincount(group[order], precision).astype(np.float64)


def _weighted_median(queries: Queries, weights: NDArray[np.float64], total: NDArray[np.float64]) -> NDArray[np.float64]:
    """numpy's median (the mean of the two middle values) of each resample: weights [S, C], total [S] -> [S]."""
    order = np.argsort(queries.rank)
    upto = np.cumsum(weights[:, queries.clip[order]], axis=1)
    sorted_rank = queries.rank[order]
    low, high = (
        sorted_rank[(upto < position[:, None]).sum(axis=1)]
        for position in (np.floor((total + 1) / 2), np.floor(total / 2) + 1)
    )
    median: NDArray[np.float64] = (low + high) / 2
    return median


def _count_ranks(scores: Tensor, clip: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ranks of the pairs (text, its clip) in their rows and in their columns, in one pass over tiles of rows."""
    num_texts, num_clips = scores.shape
    own = _numpy(scores[torch.arange(num_texts), torch.from_numpy(clip)])
    captions = rounds(clip)
    t2a, a2t = np.ones(num_texts, dtype=np.int64), np.ones(num_texts, dtype=np.int64)
    step = max(1, TILE // num_clips)
    for start in range(0, num_texts, step):
        tile = _numpy(scores[start : start + step])
        if np.isnan(tile).any():
            raise UserError("retrieval scores: some are NaN, the model has diverged; evaluate an earlier checkpoint")
        rows = np.arange(start, start + len(tile))
        t2a[rows] += _ahead(tile, own[rows, None], np.arange(num_clips) < clip[rows, None], axis=1)
        for texts in captions:
            columns = tile if len(texts) == num_clips else tile[:, clip[texts]]
            a2t[texts] += _ahead(columns, own[texts], rows[:, None] < texts, axis=0)
    return t2a, a2t


def _ahead(
    scores: NDArray[np.floating], own: NDArray[np.floating], lower_index: NDArray[np.bool_], axis: int
) -> NDArray[np.int64]:
    """Number of scores that come before the own one: greater ones, and equal ones at a lower index."""
    ahead = scores == own
    ahead &= lower_index
    ahead |= scores > own
    count: NDArray[np.int64] = np.count_nonzero(ahead, axis=axis)
    return count


def rounds(clip: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Indices of the texts: first captions of all clips, in the order of the clips, then second captions, and so on."""
    order = np.argsort(clip, kind="stable")
    place = np.arange(len(clip)) - np.searchsorted(clip[order], clip[order])
    return [order[place == number] for number in range(place.max() + 1)]


def _numpy(scores: Tensor) -> NDArray[np.floating]:
    # On a CPU numpy compares several times faster than torch. It has no bfloat16.
    wide = scores if scores.dtype == torch.float64 else scores.float()
    return wide.detach().cpu().numpy()


def positions(owner: NDArray[np.int64], clips: NDArray[np.int64]) -> NDArray[np.int64]:
    """Index in `clips` of every text's clip. Raises UserError like `ranks`."""
    if len(owner) == 0:
        raise UserError("retrieval evaluation: no captions; evaluate a split that has captions")
    order = np.argsort(clips, kind="stable")
    ordered = clips[order]
    repeated = np.flatnonzero(ordered[1:] == ordered[:-1])
    if len(repeated):
        raise UserError(
            f"retrieval evaluation: clip id {ordered[repeated[0]]} occurs more than once in audio_ids;"
            " give every clip once"
        )
    place = np.searchsorted(ordered, owner).clip(max=len(clips) - 1)
    missing = np.flatnonzero(ordered[place] != owner) if len(clips) else np.arange(len(owner))
    if len(missing):
        raise UserError(
            f"retrieval evaluation: text {missing[0]} describes clip id {owner[missing[0]]}, which is not in audio_ids;"
            " embed every clip of the split or drop its captions"
        )
    found: NDArray[np.int64] = order[place]
    return found


def as_int64(ids: Ids) -> NDArray[np.int64]:
    """Ids as an array on the CPU."""
    return torch.as_tensor(ids).detach().cpu().numpy().astype(np.int64)
