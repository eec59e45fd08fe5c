"""The first weights of a run that starts from another one: train.initial_checkpoint.

Weights are taken over, settings never. A part of the model is taken whole or not at all. Without a list of parts these
are both encoders, which must fit, and whichever of the projections and the scorer fits by its names and shapes; the
temperature and the parameters of loss terms belong to the objective of a run and are only taken if they are named.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from atr_scale.checkpoint import find_checkpoint, misfits, name_of, read_weights
from atr_scale.config import RunConfig
from atr_scale.config_train import MODEL_PARTS, InitialCheckpoint
from atr_scale.encoders.text_encoders import load_text_encoder
from atr_scale.errors import UserError
from atr_scale.model import Retriever
from atr_scale.run_checkpoints import CONFIG, TEXT_ENCODER, check_checksums

FILE = "initial_weights.json"
ENCODERS = ("audio_encoder", "text_encoder")
NEVER_UNNAMED = ("temperature", "objective")


@dataclass(frozen=True)
class InitialWeights:
    """What a run has taken over. Parts without weights are not listed.

    taken: number of values by part. new: by part of this run's model that was not taken, what it starts from.
    left_out: parts of the checkpoint that were not taken.
    """

    checkpoint: str
    taken: dict[str, int]
    new: dict[str, str]
    left_out: list[str]

    def __str__(self) -> str:
        taken = ", ".join(f"{part} ({values / 1e6:.2f} M)" for part, values in self.taken.items())
        new = ", ".join(f"{part} ({origin})" for part, origin in self.new.items())
        return (
            f"from {self.checkpoint}: taken {taken or 'nothing'}; new {new or 'nothing'}; "
            f"left out {', '.join(self.left_out) or 'nothing'}"
        )

    def write(self, run_dir: Path) -> None:
        """Write run_dir/initial_weights.json."""
        (run_dir / FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def start_from(initial: InitialCheckpoint, config: RunConfig, **options: Any) -> tuple[Retriever, InitialWeights]:
    """The model of `config` with weights of another run. Pretrained weights are read only for encoders not taken.

    options: of `Retriever`. Raises UserError if a part that must fit does not, naming the first tensor and both shapes.
    """
    folder = find_checkpoint(initial.from_)
    check_checksums(folder)
    asked = ENCODERS if initial.parts is None else initial.parts
    saved = _saved_names(folder)
    section, text = config.model, config.model.text
    if "audio_encoder" in asked:
        section = section.model_copy(update={"audio": section.audio.model_copy(update={"checkpoint": None})})
    text_encoder = None
    if "text_encoder" in asked and saved.get("text") == text.name and (folder / TEXT_ENCODER).is_dir():
        text_encoder = load_text_encoder(folder / TEXT_ENCODER, text.name, **text.model_dump(exclude={"name"}))
    model = Retriever(section, config.objective, text_encoder=text_encoder, **options)
    given, own = _by_part(read_weights(folder)), _by_part(model.state_dict())
    taken = []
    for part in MODEL_PARTS:
        faults = misfits(own[part], given[part])
        if part in asked and faults:
            raise UserError(_refusal(part, faults, initial, folder))
        fits = initial.parts is None and part not in NEVER_UNNAMED and not faults
        if part == "scorer" and saved.get("scorer", config.model.scorer.name) != config.model.scorer.name:
            fits = False  # equal shapes are a coincidence
        if part in asked or fits:
            model.load_state_dict(given[part], strict=False)
            taken.append(part)
    return model, InitialWeights(
        checkpoint=name_of(initial.from_, folder),
        taken={part: sum(value.numel() for value in own[part].values()) for part in taken if own[part]},
        new={part: _origin(part, config) for part in MODEL_PARTS if own[part] and part not in taken},
        left_out=[part for part in MODEL_PARTS if given[part] and part not in taken],
    )


def _by_part(weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    return {part: {key: value for key, value in weights.items() if key.startswith(f"{part}.")} for part in MODEL_PARTS}


def _saved_names(folder: Path) -> dict[str, str]:
    """The names of text encoder and scorer in the configuration of a checkpoint, as far as it tells them.

    It is not checked: it may need plug-ins of the other run, of which no setting is taken.
    """
    try:
        model = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))["model"]
        return {part: model[part]["name"] for part in ("text", "scorer")}
    except (OSError, yaml.YAMLError, UnicodeDecodeError, LookupError, TypeError):
        return {}


def _origin(part: str, config: RunConfig) -> str:
    if part == "audio_encoder":
        return config.model.audio.checkpoint or "random weights"
    if part == "text_encoder":
        return config.model.text.name
    if part == "temperature":
        return f"{config.objective.temperature.initial}"
    return "random weights"


def _refusal(part: str, faults: list[str], initial: InitialCheckpoint, folder: Path) -> str:
    more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
    others = [name for name in initial.parts or ENCODERS if name != part]
    remedy = f"train.initial_checkpoint={{from: {initial.from_}, parts: [{', '.join(others)}]}} leaves it out"
    if not others:
        remedy = f"give a run with the same {part}, or name other parts in train.initial_checkpoint.parts"
    return f"the {part} of {folder} does not fit this model ({faults[0]}{more}): {remedy}"
