"""Evaluated runs as `compare` needs them: configuration, and the metrics of every query, in one order for all runs.

Shape suffixes: Q queries of a direction, C captioned clips.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atr_scale.errors import UserError
from atr_scale.evaluation.facts import Facts
from atr_scale.evaluation.metrics import Queries
from atr_scale.evaluation.result import EvaluationResult
from atr_scale.evaluation.results import WATCHING, read_results
from atr_scale.experiments.sweep_file import read_sweep
from atr_scale.remote.fetch import bring_files
from atr_scale.remote.places import address_of
from atr_scale.sections import flat

logger = logging.getLogger(__name__)

TEST = "test"
PREFERRED = ("best", "last")  # checkpoints, whose results are compared first
SEED_PART = re.compile(r",?seed=\d+$")


@dataclass(frozen=True)
class Evaluated:
    """A run's result on one split."""

    folder: Path
    name: str
    digest: str  # equal for runs that differ in run.seed and run.dir alone
    config: dict[str, Any]
    entry: dict[str, Any]  # of results.json
    result: EvaluationResult
    facts: Facts

    @cached_property
    def order(self) -> dict[str, NDArray[np.int64]]:
        """Places of the queries of each direction, sorted by clip id and caption, whatever the order of the shards."""
        clips = self.facts.clip_ids
        texts = np.lexsort((self.facts.caption_ids, clips[self.result.ranks.clip]))
        return {"t2a": texts, "a2t": np.argsort(clips[self.captioned])}

    @cached_property
    def captioned(self) -> NDArray[np.int64]:
        """[C] index of the clips that have a caption."""
        return np.unique(self.result.ranks.clip)

    def values(self) -> dict[str, NDArray[np.float64]]:
        """The metrics of each query, [Q] by name, in the shared order."""
        return {
            f"{direction}/{key}": value[self.order[direction]]
            for direction, queries in self._queries.items()
            for key, value in queries.values().items()
        }

    def clips(self, direction: str) -> NDArray[np.int64]:
        """[Q] place of each query's clip among the captioned clips sorted by id, in the shared order."""
        place = np.argsort(self.order["a2t"])
        return place[self._queries[direction].clip[self.order[direction]]]

    def field(self, name: str) -> dict[str, NDArray[Any]]:
        """A field of the queries of each direction [Q], in the shared order.

        A clip has the mean number of words of its captions.
        Raises UserError, which names the known fields, if there is no such field.
        """
        clip, words = self.result.ranks.clip, self.facts.caption_words
        if name == "caption_words":
            means = np.bincount(clip, words)[self.captioned] / np.bincount(clip)[self.captioned]
            found: dict[str, NDArray[Any]] = {"t2a": words.astype(np.float64), "a2t": means}
        elif name in self.facts.fields:
            column = self.facts.fields[name]
            found = {"t2a": column[clip], "a2t": column[self.captioned]}
        else:
            known = ", ".join(("caption_words", *self.facts.fields))
            raise UserError(f"--by {name}: the clips of {self.name} have no such field; give one of {known}")
        return {direction: values[self.order[direction]] for direction, values in found.items()}

    @cached_property
    def _queries(self) -> dict[str, Queries]:
        return self.result.ranks.queries()


@dataclass(frozen=True)
class Experiment:
    """Runs that differ in their seed alone, evaluated in one way."""

    name: str
    runs: tuple[Evaluated, ...]


def read_experiments(locations: Sequence[str | Path], split: str | None = None) -> list[Experiment]:
    """The evaluated runs in the order given, those of several seeds together.

    locations: run folders, or folders of sweeps for all their runs that have results. split: default test, else the
    first validation set that all runs have. Raises UserError if a run has no results, or if they are of different test
    sets or relevance.
    """
    folders = list(dict.fromkeys(folder for place in locations for folder in _runs_of(_local(place), split)))
    tables = {folder: _read(folder) for folder in folders}
    split = split or _common_split(tables)
    runs = [_evaluated(folder, table, split) for folder, table in tables.items()]
    for run in runs[1:]:
        _check_same_set(runs[0], run)
    groups: dict[tuple[str, ...], list[Evaluated]] = {}
    for run in runs:
        groups.setdefault((run.digest, run.entry["method"], run.entry["checkpoint"]), []).append(run)
    names = _names(list(groups.values()))
    return [Experiment(name, tuple(group)) for name, group in zip(names, groups.values(), strict=True)]


def _local(place: str | Path) -> Path:
    address = address_of(place)
    return bring_files(address) if address else Path(place)


def _runs_of(place: Path, split: str | None) -> list[Path]:
    """A run folder, or those of a sweep that have results of the split; a warning names the others."""
    runs = [place / run["name"] for run in read_sweep(place).get("runs", [])]
    if not runs:
        return [place]
    splits = {run: _splits(read_results(run) or {"results": []}) for run in runs}
    wanted = split or (TEST if any(TEST in own for own in splits.values()) else None)
    kept = [run for run in runs if (wanted in splits[run] if wanted else splits[run])]
    what = f"results of the split {wanted}" if wanted else "results"
    if not kept:
        known = ", ".join(dict.fromkeys(name for own in splits.values() for name in own))
        remedy = f"they have {known}" if known else "the sweep's own command goes on with it"
        raise UserError(f"no run of the sweep {place} has {what}: {remedy}")
    if left := [run.name for run in runs if run not in kept]:
        logger.warning("%d of %d runs of %s have no %s: %s", len(left), len(runs), place, what, ", ".join(left))
    return kept


def _splits(table: dict[str, Any]) -> list[str]:
    """Splits of captions with a file of results."""
    return [entry["split"] for entry in table["results"] if entry["kind"] == "retrieval" and entry["file"]]


def _read(folder: Path) -> dict[str, Any]:
    table = read_results(folder)
    if table is None and not folder.is_dir():
        raise UserError(f"no folder {folder}: give run folders or folders of sweeps")
    if table is None:
        raise UserError(f"no results.json in {folder}: evaluate the run first, atr-scale evaluate {folder}")
    return table


def _common_split(tables: dict[Path, dict[str, Any]]) -> str:
    splits = [_splits(table) for table in tables.values()]
    common = [name for name in splits[0] if all(name in other for other in splits)]
    if not common:
        held = "; ".join(f"{folder}: {', '.join(own) or 'none'}" for folder, own in zip(tables, splits, strict=True))
        raise UserError(f"the runs have no evaluated split in common ({held}): evaluate them with --split NAME")
    return TEST if TEST in common else common[0]


def _evaluated(folder: Path, table: dict[str, Any], split: str) -> Evaluated:
    found = [entry for entry in table["results"] if entry["split"] == split and entry["file"]]
    if not found:
        have = ", ".join(dict.fromkeys(entry["split"] for entry in table["results"])) or "none"
        raise UserError(
            f"{folder} has no results of the split {split} (it has {have}): evaluate it with --split {split}"
        )
    if found[0]["kind"] == "moments":
        raise UserError(f"{folder}: {split} holds moments, in {found[0]['file']}; compare needs a split of captions")
    entry = min(found, key=lambda one: (*PREFERRED, one["checkpoint"]).index(one["checkpoint"]))
    result = EvaluationResult.load(folder / entry["file"])
    if result.facts is None:
        raise UserError(f"{folder}: {split} holds classes or is of an old version; compare needs a split of captions")
    return Evaluated(
        folder, folder.resolve().name, table["config_digest"], table["config"], entry, result, result.facts
    )


def _check_same_set(first: Evaluated, other: Evaluated) -> None:
    """UserError that names what differs between the test sets of two runs."""
    one, two = first.entry["test_set"], other.entry["test_set"]
    differing = next((part for part in ("clips", "captions", "relevance") if one[part] != two[part]), None)
    if differing is None:
        return
    if differing == "relevance":
        said = [f"{run.folder} {'with' if run.entry['test_set']['relevance'] else 'without'}" for run in (first, other)]
        how = (
            "different relevance files"
            if one[differing] and two[differing]
            else f"a relevance file: {said[0]}, {said[1]}"
        )
        raise UserError(
            f"{first.folder} and {other.folder} cannot be compared, measured with {how}: evaluate them alike"
        )
    sets = [set(run.facts.clip_ids.tolist()) for run in (first, other)]
    counts = [run.entry["counts"][differing] for run in (first, other)]
    only = sorted(sets[0] ^ sets[1])
    example = f", for example {only[0]} only in {(first if only[0] in sets[0] else other).folder}" if only else ""
    raise UserError(
        f"{first.folder} and {other.folder} were evaluated on different {differing} "
        f"({counts[0]} and {counts[1]}{example}): give both the same --shards"
    )


def _names(groups: list[list[Evaluated]]) -> list[str]:
    """The folder's name without its seed; with the folder above it if several groups share the name."""
    names = [SEED_PART.sub("", group[0].name) or group[0].folder.resolve().parent.name for group in groups]
    counts = Counter(names)
    longer = [f"{group[0].folder.resolve().parent.name}/{group[0].name}" for group in groups]
    return [name if counts[name] == 1 else long for name, long in zip(names, longer, strict=True)]


def differing_values(experiments: Sequence[Experiment]) -> dict[str, list[str]]:
    """Keys whose values differ between the experiments, each with the value of every experiment; "" if it has none.

    Beside the keys of the configuration: which checkpoint was evaluated, and how its pairs were scored. A section that
    one experiment leaves empty and another fills is shown by its keys alone.
    """
    configs = [
        {"evaluated": one.runs[0].entry["method"], "checkpoint": one.runs[0].entry["checkpoint"]}
        | {key: str(value) for key, value in flat(one.runs[0].config) if not _is_of_the_run(key)}
        for one in experiments
    ]
    keys = dict.fromkeys(key for config in configs for key in config)
    table = {key: [config.get(key, "") for config in configs] for key in keys}
    filled = {key: values for key, values in table.items() if len(set(values)) > 1}
    return {key: values for key, values in filled.items() if not (_is_empty(values) and _has_keys(key, filled))}


def _is_of_the_run(key: str) -> bool:
    """Whether a key tells nothing of the experiment, but of one of its runs."""
    return any(key == name or key.startswith(f"{name}.") for name in ("run.dir", "run.seed", *WATCHING))


def _is_empty(values: list[str]) -> bool:
    return set(values) <= {"", "None", "{}", "[]"}


def _has_keys(section: str, keys: Iterable[str]) -> bool:
    return any(key.startswith(f"{section}.") for key in keys)
