"""`results.json`: all results of a run in one schema, which `atr-scale compare` reads. docs/experiments.md explains it.

Training writes it at its start, at every validation and at its end; `atr-scale evaluate` adds the split it measures.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from atr_scale.config import RunConfig
from atr_scale.errors import UserError
from atr_scale.evaluation.result import EvaluationResult, file_stem
from atr_scale.files import atomic_write
from atr_scale.remote.places import address_of
from atr_scale.run_checkpoints import WEIGHTS

SCHEMA = 1
RESULTS = "results.json"
# Keys of `run` in which repetitions of one experiment differ.
NOT_OF_AN_EXPERIMENT = ("dir", "seed", "allow_changed_data")
# Keys that say how a run is watched: its result does not depend on them.
WATCHING = ("monitor", "train.profile")


def config_digest(config: dict[str, Any]) -> str:
    """Equal for repetitions of one experiment: of all values except run.dir, run.seed and those of WATCHING."""
    run = {key: value for key, value in config["run"].items() if key not in NOT_OF_AN_EXPERIMENT}
    train = {key: value for key, value in config["train"].items() if f"train.{key}" not in WATCHING}
    others = {key: value for key, value in config.items() if key not in WATCHING}
    text = json.dumps({**others, "run": run, "train": train}, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def read_results(folder: Path) -> dict[str, Any] | None:
    """The content of the folder's results.json; None if there is none. Raises UserError if it is not readable."""
    path = folder / RESULTS
    if not path.is_file():
        return None
    try:
        table = dict(json.loads(path.read_text(encoding="utf-8")))
        schema = table["schema"]
        if schema == SCHEMA and not all(isinstance(entry["step"], int) for entry in table["results"]):
            raise TypeError("results without steps")
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error!r}): remove it and evaluate the run again") from None
    if schema != SCHEMA:
        raise UserError(f"{path}: schema {schema} instead of {SCHEMA}; evaluate the run again with this version")
    return table


def record_training(run_dir: Path, config: RunConfig, step: int, steps: int) -> None:
    """Note that training has reached `step` of `steps`. Results of later steps are removed: they will come again."""
    table = _table(run_dir, run_dir.resolve().name, config)
    table["training"] = {"step": step, "steps": steps}
    table["results"] = [entry for entry in table["results"] if entry["step"] <= step]
    _write(run_dir, table)


def record_results(
    folder: Path,
    run: str,
    config: RunConfig,
    results: Sequence[EvaluationResult],
    *,
    checkpoint: str,
    saved: bool,
) -> None:
    """Add results to the folder's results.json. A result replaces an older one of its split and checkpoint.

    run: name of the run. checkpoint: "best", "last" or "step-N". saved: the results' own files are in the folder too.
    """
    record_entries(folder, run, config, [_entry(result, checkpoint, saved) for result in results])


def record_entries(folder: Path, run: str, config: RunConfig, entries: Sequence[dict[str, Any]]) -> None:
    """The same for entries as docs/experiments.md describes them: with `split`, `checkpoint`, `step` and so on."""
    table = _table(folder, run, config)
    for entry in entries:
        table["results"] = [old for old in table["results"] if not _replaces(entry, old)] + [entry]
    _write(folder, table)


def run_folder(location: str | Path, checkpoint: Path) -> Path:
    """The run folder of a run or a checkpoint that was given as `location`; checkpoint: the folder found there."""
    # A copied run folder may have lost its links, or have folders in their place.
    if not address_of(location) and not (Path(location) / WEIGHTS).is_file():
        return Path(location)
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint  # an exported one


def checkpoint_name(run_dir: Path, checkpoint: Path) -> str:
    """What results.json calls a checkpoint of a run: best, last or step-N."""
    links = {"best": run_dir / "best", "last": run_dir / "latest"}
    return next((name for name, link in links.items() if link.resolve() == checkpoint), checkpoint.name)


def _table(folder: Path, run: str, config: RunConfig) -> dict[str, Any]:
    old = read_results(folder) or {}
    values = config.model_dump(mode="json")
    return {
        "schema": SCHEMA,
        "run": run,
        "config_digest": config_digest(values),
        "seed": config.run.seed,
        **({"training": old["training"]} if "training" in old else {}),
        "results": old.get("results", []),
        "config": values,
    }


def _entry(result: EvaluationResult, checkpoint: str, saved: bool) -> dict[str, Any]:
    low_high = {key: dict(zip(("low", "high"), bounds, strict=True)) for key, bounds in result.intervals.items()}
    return {
        "split": result.split,
        "checkpoint": checkpoint,
        "step": result.step,
        "kind": "classification" if result.labelled else "retrieval",
        "method": result.method,
        "precision": result.precision,
        "counts": {"clips": result.num_clips, "classes" if result.labelled else "captions": result.num_texts},
        "test_set": result.test_set,
        "metrics": {key: {"value": value, **low_high.get(key, {})} for key, value in result.metrics.items()},
        "file": f"evaluation-{file_stem(result.split)}.json" if saved else None,
    }


def _replaces(new: dict[str, Any], old: dict[str, Any]) -> bool:
    if new["split"] != old["split"]:
        return False
    return new["checkpoint"] == old["checkpoint"] or (new["file"] is not None and new["file"] == old["file"])


def _write(folder: Path, table: dict[str, Any]) -> None:
    with atomic_write(folder / RESULTS) as temporary:
        temporary.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
