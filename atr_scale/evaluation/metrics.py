"""Retrieval metrics from ranks. A rank is a count of higher scores, so nothing is sorted.

Shape suffixes: T texts, A clips, Q queries, C clips that have a caption.
Conventions, as in WavCaps, salsa and the DCASE baselines: every caption is a query with one relevant clip. A clip is a
query, and all its captions are relevant; the best ranked of them decides R@k.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atr_scale.errors import UserError

RECALL_AT = (1, 5, 10)
PRECISION_AT = 10
GRADED_AT = 16
TILE = 1 << 20  # scores compared at once: temporaries of any matrix take a few MB

Scores = Tensor | NDArray[np.floating]
Ids = Tensor | NDArray[np.integer]


@dataclass(frozen=True)
class Ranks:
    """Ranks of every text in both directions, from which all metrics follow; 1 is the first rank.

    t2a [T]: rank of the text's own clip among all clips. a2t [T]: rank of the text among all texts, for its own clip.
    clip [T]: index of the text's clip in audio_ids. audio_ids [A]: every candidate clip. All int64.
    """

    t2a: NDArray[np.int64]
    a2t: NDArray[np.int64]
    clip: NDArray[np.int64]
    audio_ids: NDArray[np.int64]

    def best_a2t(self) -> NDArray[np.int64]:
        """Rank of the best ranked caption of every captioned clip, [C]."""
        return _queries(self)["a2t"].rank

    def metrics(self) -> dict[str, float]:
        """`t2a/` and `a2t/` R@1, R@5, R@10, mAP@10 (fractions) and median_rank."""
        return {f"{name}/{key}": value for name, queries in _queries(self).items() for key, value in queries.metrics()}


@dataclass(frozen=True)
class _Queries:
    """Queries of one direction: rank of the first relevant item [Q], average precision [Q], captioned clip [Q]."""

    rank: NDArray[np.int64]
    precision: NDArray[np.float64]
    clip: NDArray[np.int64]

    def values(self) -> dict[str, NDArray[np.float64]]:
        """The metrics that are means over queries, each [Q]."""
        hits = {f"R@{k}": (self.rank <= k).astype(np.float64) for k in RECALL_AT}
        return hits | {f"mAP@{PRECISION_AT}": self.precision}

    def metrics(self) -> list[tuple[str, float]]:
        means = [(key, float(value.mean())) for key, value in self.values().items()]
        return [*means, ("median_rank", float(np.median(self.rank)))]


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
    directions = _queries(ranks)
    num_clips = len(directions["a2t"].rank)
    drawn: dict[str, list[NDArray[np.float64]]] = {}
    chunk = max(1, TILE // len(ranks.t2a))
    for start in range(0, samples, chunk):
        size = min(chunk, samples - start)
        # A resample is the number of times that each clip is drawn.
        weights = generator.multinomial(num_clips, np.full(num_clips, 1 / num_clips), size=size).astype(np.float64)
        for name, queries in directions.items():
            captions = np.bincount(queries.clip, minlength=num_clips)
            total = weights @ captions
            for key, value in queries.values().items():
                sums = weights @ np.bincount(queries.clip, value, minlength=num_clips)
                drawn.setdefault(f"{name}/{key}", []).append(sums / total)
            drawn.setdefault(f"{name}/median_rank", []).append(_weighted_median(queries, weights, total))
    bounds = [(1 - level) / 2, (1 + level) / 2]
    return {
        key: (float(low), float(high))
        for key, parts in drawn.items()
        for low, high in [np.quantile(np.concatenate(parts), bounds)]
    }


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

    lists [T, k]: indices of the best clips of every text, best first, k = GRADED_AT or all clips. grades [T, A]: graded
    relevance, 0 to 1. Both metrics are means over the captions with a relevant clip.
    mAP@16 (DCASE 2025 task 6): clips of grade 1 are relevant; the sum of the precisions at their ranks up to 16,
    divided by their number.
    nDCG@16 (Jarvelin and Kekalainen 2002): the gain is the grade, its discount is log2(1 + rank).
    """
    gains = np.take_along_axis(grades, as_int64(lists)[:, :GRADED_AT], 1)
    hits = gains >= 1
    places = np.arange(1, hits.shape[1] + 1)
    relevant = (grades >= 1).sum(1)
    precision = (hits * np.cumsum(hits, 1) / places).sum(1) / np.maximum(relevant, 1)
    discount = 1 / np.log2(1 + places)
    ideal = (-np.sort(-grades, axis=1)[:, :GRADED_AT] * discount).sum(1)
    gained = (gains * discount).sum(1) / np.maximum(ideal, np.finfo(np.float64).tiny)
    return {
        f"t2a/mAP@{GRADED_AT}": float(precision[relevant > 0].mean()) if (relevant > 0).any() else 0.0,
        f"t2a/nDCG@{GRADED_AT}": float(gained[ideal > 0].mean()) if (ideal > 0).any() else 0.0,
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


def _queries(ranks: Ranks) -> dict[str, _Queries]:
    clips, group = np.unique(ranks.clip, return_inverse=True)
    best = np.full(len(clips), np.iinfo(np.int64).max)
    np.minimum.at(best, group, ranks.a2t)
    single = np.where(ranks.t2a <= PRECISION_AT, 1 / ranks.t2a, 0.0)
    several = _precision_sum(ranks.a2t, group, PRECISION_AT) / np.bincount(group)
    return {
        "t2a": _Queries(rank=ranks.t2a, precision=single, clip=group),
        "a2t": _Queries(rank=best, precision=several, clip=np.arange(len(clips))),
    }


def _precision_sum(rank: NDArray[np.int64], group: NDArray[np.int64], cutoff: int | None = None) -> NDArray[np.float64]:
    """[groups]: sum of the precisions at the ranks of the members of each group, up to the cutoff."""
    order = np.lexsort((rank, group))
    first = np.searchsorted(group[order], group[order])
    found = np.arange(len(order)) - first + 1
    precision = found / rank[order]
    if cutoff is not None:
        precision[rank[order] > cutoff] = 0.0
    return np.bincount(group[order], precision).astype(np.float64)


def _weighted_median(
    queries: _Queries, weights: NDArray[np.float64], total: NDArray[np.float64]
) -> NDArray[np.float64]:
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
