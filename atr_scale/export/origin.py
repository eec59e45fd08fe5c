"""What is known of where a trained model comes from: data, pretrained weights, results, environment.

Everything is read from the run folder and from the manifests of its shards. What cannot be read is None.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atr_scale.checkpoint import find_checkpoint, read_config, read_state
from atr_scale.config import RunConfig
from atr_scale.data.manifest import read_manifest
from atr_scale.errors import OneLineError
from atr_scale.evaluation.results import read_results
from atr_scale.export.places import PublicNames
from atr_scale.run_checkpoints import STATE
from atr_scale.run_files import read_json_object

ENVIRONMENT = "environment.json"
KINDS = ("retrieval", "classification")  # of results that a card shows
MOST_STAGES = 8  # runs that started from each other


@dataclass(frozen=True)
class ShardFacts:
    """One set of shards. use: "training", "validation", "test", or a name of data.validation.

    The other fields are those of its manifest; corpus is None if that cannot be read. label: its public name.
    """

    use: str
    place: str
    label: str
    corpus: str | None = None
    split: str | None = None
    licence: str | None = None
    clips: int | None = None
    captions: int | None = None
    hours: float | None = None
    exclusions: tuple[str, ...] = ()  # names of the lists, with the number of clips that each has left out


@dataclass(frozen=True)
class Origin:
    """Where a model comes from.

    names: for its places. data: its own shards. earlier: the training shards of the runs that it started from, the
    nearest first; the last item is None if a run cannot be read. results: entries of results.json for its checkpoint.
    environment: content of environment.json.
    """

    config: RunConfig
    state: dict[str, Any]
    names: PublicNames
    data: list[ShardFacts]
    earlier: list[list[ShardFacts] | None]
    results: list[dict[str, Any]] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def training_data(self) -> list[ShardFacts]:
        """The shards of all stages of training."""
        own = [facts for facts in self.data if facts.use == "training"]
        return own + [facts for stage in self.earlier for facts in stage or ()]

    @classmethod
    def of(cls, run: Path, checkpoint: Path, config: RunConfig, name: str, plugins: Sequence[str] = ()) -> Origin:
        """run: folder with the files of the run, which may be the checkpoint itself. name: of the exported model."""
        state = read_state(checkpoint) if (checkpoint / STATE).is_file() else {}
        data = list(_labelled(_shards_of(config)))
        names = PublicNames(name, {facts.place: facts.label for facts in data}, state.get("inputs", {}))
        return cls(
            config,
            state,
            names,
            data,
            list(_earlier(config, plugins)),
            _results(run, state),
            read_json_object(run / ENVIRONMENT) or {},
        )


def _shards_of(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Use and place of the shards in a configuration."""
    yield from (("training", source.shards) for source in config.data.train)
    yield from config.data.validation_sets.items()
    if config.data.test:
        yield "test", config.data.test


def _labelled(shards: Iterator[tuple[str, str]]) -> Iterator[ShardFacts]:
    """The facts of shards under labels that differ if their places do."""
    labels: dict[str, str] = {}
    for number, (use, place) in enumerate(shards, 1):
        facts = _read(use, place)
        label = labels.get(place) or facts.label or f"source-{number}"
        if place not in labels and label in labels.values():
            label = f"{label}-{number}"
        labels[place] = label
        yield ShardFacts(**{**vars(facts), "label": label})


def _read(use: str, place: str) -> ShardFacts:
    try:
        manifest = read_manifest(place)
    except (OneLineError, OSError, ValueError):
        return ShardFacts(use, place, "")
    corpus, split = manifest["corpus"], manifest["split"]
    seconds = manifest.get("seconds")
    return ShardFacts(
        use,
        place,
        re.sub(r"[^\w./-]", "-", f"{corpus}/{split}" if split else corpus).strip("/"),
        corpus,
        split,
        manifest.get("licence"),
        manifest.get("num_samples"),
        manifest.get("num_captions"),
        seconds / 3600 if isinstance(seconds, int | float) else None,
        tuple(f"{Path(each['name']).name} ({each.get('excluded', '?')})" for each in manifest.get("exclusions", [])),
    )


def _earlier(config: RunConfig, plugins: Sequence[str]) -> Iterator[list[ShardFacts] | None]:
    for _ in range(MOST_STAGES):
        if config.train.initial_checkpoint is None:
            return
        try:
            config = read_config(find_checkpoint(config.train.initial_checkpoint.from_), plugins)
        except (OneLineError, OSError):
            yield None
            return
        yield [facts for facts in _labelled(_shards_of(config)) if facts.use == "training"]


def _results(run: Path, state: dict[str, Any]) -> list[dict[str, Any]]:
    """The results of the checkpoint, one for each split."""
    try:
        table = read_results(run) or {}
    except OneLineError:
        return []
    found: dict[str, dict[str, Any]] = {}
    for entry in table.get("results", []):
        if entry["step"] == state.get("step") and entry["kind"] in KINDS:
            found.setdefault(entry["split"], entry)
    return list(found.values())
