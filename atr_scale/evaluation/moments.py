"""How well a model finds the moment that a query describes: files of moments, metrics, chance level, and the result.

A file of moments has JSON lines with the field names of QVHighlights (arXiv 2107.09609), which Clotho-Moment (arXiv
2409.15672) and CASTELLA (arXiv 2511.15131) use too:

    {"qid": 7, "query": "a dog barks", "vid": "yard", "duration": 10, "relevant_windows": [[2.5, 4], [7, 8.2]]}

Metrics are those of QVHighlights: the best span of a query is compared with the window of the query with which it has
the highest IoU. R@1 counts an IoU that reaches the threshold. mIoU is the mean of these IoUs.

Shape suffixes: Q queries, N windows of a query, P places of a span.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atr_scale.errors import UserError
from atr_scale.evaluation.metrics import resamples
from atr_scale.files import atomic_write
from atr_scale.moments import Moment

THRESHOLDS = (0.5, 0.7)
PLACES = 101  # of a span of a given length, evenly over the clip, for its chance level
FORMAT = 1
NAMES = ("path", "id", "vid")  # fields that name the clip of a row, in the order in which they are tried

Floats = NDArray[np.float64]
Interval = dict[str, float]  # value, low and high


@dataclass(frozen=True)
class MomentQuery:
    """A row of a file of moments. line: its number. clip: the names of its clip. windows [N, 2]: in seconds."""

    line: int
    qid: str | int
    query: str
    clip: tuple[str, ...]
    windows: Floats


@dataclass(frozen=True)
class LocatedQuery:
    """A query with what the model has found, best first, and the length of its clip in seconds."""

    row: MomentQuery
    spans: list[Moment]
    seconds: float


@dataclass(frozen=True)
class MomentResult:
    """Metrics of a file of moments, each with `value`, `low` and `high`: a 95 % interval, bootstrapped over clips.

    metrics: `R1@0.5`, `R1@0.7` and `mIoU` of the model. chance: the same of spans that know nothing of the query.
    """

    metrics: dict[str, Interval]
    chance: dict[str, dict[str, Interval]]
    clips: int
    queries: int

    @classmethod
    def of(cls, located: Sequence[LocatedQuery]) -> MomentResult:
        """Of all queries of a file; those of one clip stand anywhere."""
        clips = {clip: number for number, clip in enumerate(dict.fromkeys(one.row.clip for one in located))}
        clip = np.array([clips[one.row.clip] for one in located])
        return cls(
            metrics=_intervals(_values([best_iou(one) for one in located]), clip),
            chance={name: _intervals(_values(ious), clip) for name, ious in _chance(located).items()},
            clips=len(clips),
            queries=len(located),
        )

    def table(self) -> str:
        """A line for the model and for every chance level, under the number of queries."""
        rows = {"the model": self.metrics, **self.chance}
        count = f"{self.queries} queries"
        lines = [f"{count:<22}" + "".join(f"{key:<24}" for key in self.metrics)]
        for name, row in rows.items():
            cells = (f"{one['value']:.4f} ({one['low']:.4f}-{one['high']:.4f})" for one in row.values())
            lines.append(f"{name:<22}" + "".join(f"{cell:<24}" for cell in cells))
        return "\n".join(line.rstrip() for line in lines)

    def by_name(self) -> dict[str, Interval]:
        """All of them for results.json: `moments/R1@0.5` of the model, `whole_clip/R1@0.5` and so on."""
        rows = {"moments": self.metrics, **{name.replace(" ", "_"): row for name, row in self.chance.items()}}
        return {f"{name}/{key}": one for name, row in rows.items() for key, one in row.items()}

    def save(self, folder: Path, name: str, located: Sequence[LocatedQuery], options: dict[str, Any]) -> Path:
        """Write moments-NAME.json, with the options, and the spans of all queries as moments-NAME.jsonl.

        Its lines are predictions as QVHighlights' evaluation reads them, with the windows and the IoU of the best span.
        Returns the path of the JSON file.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"moments-{name}.json"
        with atomic_write(path.with_suffix(".jsonl")) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(_prediction(one), ensure_ascii=False) + "\n" for one in located)
        with atomic_write(path) as temporary:
            table = {"format": FORMAT, **options, **asdict(self)}
            temporary.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return path


def read_moments(path: str | Path) -> list[MomentQuery]:
    """The rows of a file of moments: `query`, `relevant_windows` in seconds, and one of `path`, `id` and `vid`.

    Without `qid` a row gets its line number. Other fields are ignored. Raises UserError if the file cannot be read, and
    names the line of the first row that is not such an object.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give a file of JSON lines") from None
    except UnicodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error}): give a file of JSON lines") from None
    rows = [_row(f"{path}, line {number}", number, line) for number, line in _lines(text)]
    if not rows:
        raise UserError(f"{path} has no rows: give a file of JSON lines with query, vid and relevant_windows")
    return rows


def _lines(text: str) -> Iterator[tuple[int, str]]:
    return ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())


def _row(place: str, number: int, line: str) -> MomentQuery:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: no JSON ({error}); each line is one object") from None
    if not isinstance(row, dict):
        raise UserError(f"{place}: {line.strip()[:40]} is no object; each line is one, with query and relevant_windows")
    query, qid = row.get("query"), row.get("qid", number)
    if not isinstance(query, str) or not query.strip():
        raise UserError(f"{place}: query is {query!r}; give a text")
    if isinstance(qid, bool) or not isinstance(qid, str | int):
        raise UserError(f"{place}: qid is {qid!r}; give a number or a text, or leave it out")
    clip = tuple(str(row[name]) for name in NAMES if isinstance(row.get(name), str | int) and str(row[name]))
    if not clip:
        raise UserError(f"{place}: it names no clip; give its vid, id or path")
    return MomentQuery(number, qid, query, clip, _windows(place, row.get("relevant_windows")))


def _windows(place: str, given: Any) -> Floats:
    wanted = "give [[start, stop], ...] in seconds, with 0 <= start < stop"
    if not isinstance(given, list) or not given:
        raise UserError(f"{place}: relevant_windows is {given!r}; {wanted}")
    for window in given:
        numbers = isinstance(window, list) and all(
            isinstance(time, int | float) and not isinstance(time, bool) for time in window
        )
        if not numbers or len(window) != 2 or not 0 <= window[0] < window[1] < 1e9:
            raise UserError(f"{place}: a window is {window!r}; {wanted}")
    return np.array(given, np.float64)


def window_ious(spans: Floats, windows: Floats) -> Floats:
    """[P, N]: intersection over union of spans [P, 2] and windows [N, 2]; 0 if they do not overlap."""
    start, stop = (spans[:, None, side] for side in (0, 1))
    overlap = np.clip(np.minimum(stop, windows[:, 1]) - np.maximum(start, windows[:, 0]), 0, None)
    union = (stop - start) + (windows[:, 1] - windows[:, 0]) - overlap
    ious: Floats = overlap / np.maximum(union, np.finfo(np.float64).tiny)
    return ious


def best_iou(one: LocatedQuery) -> Floats:
    """[1]: IoU of the best span with the window that fits best; 0 if no span was found."""
    if not one.spans:
        return np.zeros(1)
    return _best_of_windows(one, [[one.spans[0].start, one.spans[0].stop]])


def _best_of_windows(one: LocatedQuery, spans: Any) -> Floats:
    best: Floats = window_ious(np.asarray(spans, np.float64), one.row.windows).max(1)
    return best


def _chance(located: Sequence[LocatedQuery]) -> dict[str, list[Floats]]:
    """IoUs of spans that know nothing of the query; of several possible places each counts the same."""
    anywhere = []
    for one in located:
        length = min(one.spans[0].stop - one.spans[0].start, one.seconds) if one.spans else 0.0
        starts = np.linspace(0, one.seconds - length, PLACES)
        anywhere.append(_best_of_windows(one, np.stack([starts, starts + length], 1)))
    return {
        "whole clip": [_best_of_windows(one, [[0, one.seconds]]) for one in located],
        "middle third": [_best_of_windows(one, [[one.seconds / 3, one.seconds * 2 / 3]]) for one in located],
        "same length anywhere": anywhere,
    }


def _values(ious: Sequence[Floats]) -> dict[str, Floats]:
    """The metrics of every query [Q], each the mean over the places of its span."""
    recalls = {f"R1@{least}": np.array([(iou >= least).mean() for iou in ious]) for least in THRESHOLDS}
    return recalls | {"mIoU": np.array([iou.mean() for iou in ious])}


def _intervals(values: dict[str, Floats], clip: NDArray[np.int64], samples: int = 1000) -> dict[str, Interval]:
    """Means over queries with 95 % percentile intervals of resampled clips, as `metrics.bootstrap` has them."""
    counts = np.bincount(clip).astype(np.float64)
    totals = np.stack([np.bincount(clip, value) for value in values.values()], 1)
    draws = resamples(len(counts), samples, np.random.default_rng(0), len(clip))
    means = np.concatenate([weights @ totals / (weights @ counts)[:, None] for weights in draws])
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    return {
        key: {"value": float(value.mean()), "low": float(low[k]), "high": float(high[k])}
        for k, (key, value) in enumerate(values.items())
    }


def _prediction(one: LocatedQuery) -> dict[str, Any]:
    return {
        "qid": one.row.qid,
        "query": one.row.query,
        "vid": one.row.clip[-1],
        "pred_relevant_windows": [[round(s.start, 4), round(s.stop, 4), round(s.score, 6)] for s in one.spans],
        "relevant_windows": one.row.windows.tolist(),
        "iou": round(float(best_iou(one)[0]), 4),
    }
