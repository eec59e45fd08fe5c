"""What a checkpoint says without the places of the machine that it was trained on.

Paths, hosts, buckets and users of a training machine are nobody else's business, and mean nothing elsewhere. Names that
mean the same everywhere stay: of models on a hub, of published weights, of corpora and splits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from atr_scale.config import RunConfig
from atr_scale.encoders.pretrained.weights import WEIGHTS as PUBLISHED
from atr_scale.encoders.text_encoders import TEXT_ENCODERS

NOT_EXPORTED = "not-exported"  # stands for a file or folder that only the training machine has
OWN_TEXT_ENCODER = "text_encoder"  # stands for one that was a folder there; its files are in the export
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FOLDER_FINGERPRINT = re.compile(r"[0-9a-f]{64}")  # that of a model on a hub is its revision, of 40 digits
_STATE_KEYS = (
    "step", "samples_seen", "best", "best_metric", "skipped_steps", "fp16_overflows", "dropped", "world_size",
)  # fmt: skip
_JSON_OF_TRANSFORMERS = ("config.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")


@dataclass(frozen=True)
class PublicNames:
    """Names in the place of places.

    model: of the exported model. shards: by the place of the shards, for example "clotho/development". inputs: of the
    checkpoint's state, its fingerprints of what training has read.
    """

    model: str
    shards: Mapping[str, str]
    inputs: Mapping[str, Any]

    def text_encoder(self, name: str) -> str:
        """The name of a text encoder of a plug-in or of a hub; a folder is called OWN_TEXT_ENCODER."""
        if name in TEXT_ENCODERS:
            return name
        fingerprint = self._fingerprint("model.text.name")
        is_folder = bool(_FOLDER_FINGERPRINT.fullmatch(fingerprint)) or (not fingerprint and Path(name).is_dir())
        return name if _HUB_NAME.fullmatch(name) and not is_folder else OWN_TEXT_ENCODER

    def audio_checkpoint(self, checkpoint: str | None) -> str | None:
        """The name of published weights. Own weights are NOT_EXPORTED, random ones None."""
        if checkpoint is None or checkpoint in PUBLISHED:
            return checkpoint
        fingerprint, file = self._fingerprint("model.audio.checkpoint"), Path(checkpoint).name
        for name, weights in PUBLISHED.items():
            if weights.checksum == f"sha256:{fingerprint}" or weights.file == file:
                return name
        return NOT_EXPORTED

    def of(self, key: str, value: str) -> str | None:
        """What stands for the text `value` of the configuration. key: for example "data.train[0].shards"."""
        if key == "run.dir":
            return f"runs/{self.model}"
        if key.startswith(("data.train", "data.validation")) or key == "data.test":
            return self.shards.get(value, NOT_EXPORTED)
        if key == "model.text.name":
            return self.text_encoder(value)
        if key == "model.audio.checkpoint":
            return self.audio_checkpoint(value)
        if key == "train.initial_checkpoint.from" or key == "objective.distillation.relevance":
            return NOT_EXPORTED
        if re.fullmatch(r"objective\.distillation\.tables\[\d+\]\.path", key):
            return f"{NOT_EXPORTED}-{re.findall(r'[0-9]+', key)[0]}"
        return NOT_EXPORTED if _is_place(value) else value  # of an option of a plug-in

    def _fingerprint(self, key: str) -> str:
        entry = self.inputs.get(key)
        return str(entry.get("fingerprint") or "") if isinstance(entry, dict) else ""


def public_config(config: RunConfig, names: PublicNames) -> str:
    """The configuration as YAML, with `names` for all places."""
    text: str = yaml.safe_dump(_renamed(yaml.safe_load(config.to_yaml()), "", names), sort_keys=False)
    return text


def public_state(state: Mapping[str, Any], config: RunConfig, names: PublicNames) -> dict[str, Any]:
    """The state of a checkpoint with the fingerprints of what training has read, and names for the places of it."""
    kept = {key: state[key] for key in _STATE_KEYS if key in state}
    fingerprints = {
        key: {"place": _of_input(key, config, names), "fingerprint": entry.get("fingerprint")}
        for key, entry in names.inputs.items()
        if isinstance(entry, dict)
    }
    return {**kept, "inputs": fingerprints}


def remove_local_paths(text_encoder: Path) -> None:
    """Remove the keys whose value is a local path from the JSON files of transformers in the folder."""
    for path in (text_encoder / name for name in _JSON_OF_TRANSFORMERS):
        if not path.is_file():
            continue
        table = json.loads(path.read_text(encoding="utf-8"))
        kept = {
            key: value
            for key, value in table.items()
            if key not in ("_name_or_path", "name_or_path") and not (isinstance(value, str) and _is_place(value))
        }
        if kept != table:
            path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _renamed(value: Any, key: str, names: PublicNames) -> Any:
    if isinstance(value, dict):
        return {name: _renamed(each, f"{key}.{name}" if key else name, names) for name, each in value.items()}
    if isinstance(value, list):
        return [_renamed(each, f"{key}[{number}]", names) for number, each in enumerate(value)]
    return names.of(key, value) if isinstance(value, str) else value


def _of_input(key: str, config: RunConfig, names: PublicNames) -> str | None:
    """What stands for the place of an input, by its key in the state."""
    if match := re.match(r"data\.train\[(\d+)\]", key):
        number = int(match[1])
        return names.of(key, config.data.train[number].shards) if number < len(config.data.train) else NOT_EXPORTED
    if key.startswith("data.validation."):
        place = config.data.validation_sets.get(key.removeprefix("data.validation."))
        return names.of(key, place) if place else NOT_EXPORTED
    if key == "model.text.name":
        return names.text_encoder(config.model.text.name)
    if key == "model.audio.checkpoint":
        return names.audio_checkpoint(config.model.audio.checkpoint)
    return NOT_EXPORTED


def _is_place(value: str) -> bool:
    return value.startswith(("/", "~", "./", "../", "\\")) or bool(re.match(r"\w+:(//|[\\/])", value))
