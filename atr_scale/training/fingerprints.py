"""Fingerprints of what a run reads. Its checkpoints hold them, so that a resume on other data is refused by name.

A fingerprint is the sha256 of content, so the same data in another folder are the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from atr_scale.checkpoint import find_checkpoint, read_state
from atr_scale.config import RunConfig
from atr_scale.data import storage
from atr_scale.data.manifest import MANIFEST
from atr_scale.data.paraphrases.stored import FILE
from atr_scale.data.shard_reader import ShardSet
from atr_scale.distributed.world import World
from atr_scale.errors import UserError
from atr_scale.files import sha256_of
from atr_scale.run_checkpoints import WEIGHTS
from atr_scale.run_files import CHANGED_DATA, append_json_lines
from atr_scale.teachers.tables import CHECKSUM

logger = logging.getLogger(__name__)

INPUTS = "inputs"  # key of a checkpoint's state
MAY_BE_OTHERS = ("data.validation", "train.initial_checkpoint")  # a resumed run may name another place
READ_AT_THE_START = ("model.", "train.initial_checkpoint")  # a resumed run goes on without them
MODEL_FILES = (".json", ".txt", ".model", ".safetensors", ".bin")


class Input(NamedTuple):
    """Something that a run reads. place: as the configuration names it. fingerprint: None if it is not known."""

    place: str
    fingerprint: str | None


def same_inputs(
    config: RunConfig,
    sources: Sequence[ShardSet],
    validation: Mapping[str, ShardSet],
    world: World,
    resume_from: Path | None,
) -> dict[str, Any]:
    """The inputs of a run by their keys of the configuration, as its checkpoints hold them. All ranks call this.

    resume_from: the checkpoint that the run continues. Raises UserError that names the inputs that are not those of the
    checkpoint; with run.allow_changed_data they are logged and recorded in the run folder instead.
    """
    return world.from_main(lambda: _compared(config, dict(_inputs(config, sources, validation)), resume_from))


def _compared(config: RunConfig, found: dict[str, Input], resume_from: Path | None) -> dict[str, Any]:
    state = read_state(resume_from) if resume_from else {}
    saved = {name: Input(**entry) for name, entry in state.get(INPUTS, {}).items()}
    if resume_from and not saved:
        logger.warning("%s has no fingerprints of its data: whether they have changed is not known", resume_from)
    changed = []
    for name, before in saved.items():
        now = found.get(name)
        if now is None:
            continue
        if now.fingerprint is None and name.startswith(READ_AT_THE_START):  # gone; the checkpoint holds what is needed
            found[name] = before
        elif now.place != before.place and name.startswith(MAY_BE_OTHERS):
            continue
        elif now.fingerprint != before.fingerprint or (now.fingerprint is None and now.place != before.place):
            changed.append(name)
    if changed:
        places = ", ".join(f"{name} ({found[name].place})" for name in changed)
        if not config.run.allow_changed_data:
            raise UserError(
                f"not what {config.run.dir} was trained on up to step {state['step']}: {places}: restore it, give "
                "another run.dir, or set run.allow_changed_data=true to go on with what is there now"
            )
        logger.warning("from step %d on the run reads other data than before: %s", state["step"], places)
        changes = {name: {"was": saved[name]._asdict(), "now": found[name]._asdict()} for name in changed}
        append_json_lines(
            config.run.folder / CHANGED_DATA, [{"time": time.time(), "step": state["step"], "changed": changes}]
        )
    return {name: each._asdict() for name, each in found.items()}


def of_validation(inputs: Mapping[str, Any]) -> str:
    """Fingerprint of all validation sets together, of what `same_inputs` has returned."""
    return _of_json({name: each["fingerprint"] for name, each in inputs.items() if name.startswith("data.validation.")})


def without_places(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration, as nested dicts, that says of each input with a fingerprint only whether there is one."""
    data, model, distillation = config["data"], config["model"], config["objective"]["distillation"]
    return {
        **config,
        "data": {**data, "train": [_hidden(source, "shards") for source in data["train"]]},
        "model": {**model, "text": _hidden(model["text"], "name"), "audio": _hidden(model["audio"], "checkpoint")},
        "objective": {
            **config["objective"],
            "distillation": {
                **_hidden(distillation, "relevance"),
                "tables": [_hidden(table, "path") for table in distillation["tables"]],
            },
        },
    }


def _hidden(section: dict[str, Any], key: str) -> dict[str, Any]:
    return {**section, key: None if section[key] is None else "given"}


def _inputs(
    config: RunConfig, sources: Sequence[ShardSet], validation: Mapping[str, ShardSet]
) -> Iterator[tuple[str, Input]]:
    for number, shards in enumerate(sources):
        name, place = f"data.train[{number}]", shards.location
        yield f"{name}.shards", Input(place, of_shards(shards))
        lists = [[each.get("name"), each.get("sha256")] for each in shards.manifest.get("exclusions", [])]
        yield f"{name}.exclusions", Input(storage.join(place, MANIFEST), _of_json(lists))
        if config.data.augmented_captions:
            yield f"{name}.paraphrases", _file(storage.join(place, FILE))
    for name, shards in validation.items():
        yield f"data.validation.{name}", Input(shards.location, of_shards(shards))
    text, audio, initial = config.model.text.name, config.model.audio.checkpoint, config.train.initial_checkpoint
    yield "model.text.name", Input(text, _of_text_encoder(text))
    if audio is not None:
        yield "model.audio.checkpoint", _file(audio)
    if initial is not None:
        yield "train.initial_checkpoint", Input(initial.from_, _of_weights(initial.from_))
    distillation = config.objective.distillation
    if distillation.weight > 0:
        for number, table in enumerate(distillation.tables):
            yield f"objective.distillation.tables[{number}].path", Input(table.path, _of_table(table.path))
        if distillation.relevance is not None:
            yield "objective.distillation.relevance", _file(distillation.relevance)


def of_shards(shards: ShardSet) -> str:
    """Fingerprint of a shard set: names, bytes and checksums of its shards, or without a manifest its index."""
    if shards.manifest:
        return _of_json([[shard["name"], shard["bytes"], shard.get("sha256")] for shard in shards.manifest["shards"]])
    digest = hashlib.sha256(json.dumps(shards.names).encode())
    for key in shards.keys:
        digest.update(key.encode() + b"\0")
    for positions in (shards.shard_of, shards.start, shards.stop):
        digest.update(positions.tobytes())
    return digest.hexdigest()


def _of_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _file(place: str) -> Input:
    try:
        if storage.is_remote(place):
            return Input(place, hashlib.sha256(storage.read_bytes(place)).hexdigest())
        return Input(place, sha256_of(Path(place)))
    except OSError:
        return Input(place, None)


def _of_text_encoder(name: str) -> str | None:
    """Of a folder its files, of a model from a hub its revision in the local cache."""
    folder = Path(name)
    if folder.is_dir():
        files = sorted(path for path in folder.rglob("*") if path.suffix in MODEL_FILES and path.is_file())
        return _of_json([[str(path.relative_to(folder)), sha256_of(path)] for path in files])
    try:
        from huggingface_hub import try_to_load_from_cache  # only models with a name on a hub need it

        cached = try_to_load_from_cache(name, "config.json")
    except (ImportError, ValueError):  # an encoder of a plug-in has no name that a hub could have
        return None
    return Path(cached).parent.name if isinstance(cached, str) else None


def _of_weights(place: str) -> str | None:
    try:
        return sha256_of(find_checkpoint(place) / WEIGHTS)
    except (UserError, OSError):
        return None


def _of_table(path: str) -> str | None:
    """The checksum that a teacher table carries, and that is verified when the table is read."""
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get(CHECKSUM)
    except (OSError, SafetensorError):
        return None
