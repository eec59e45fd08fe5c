"""Checkpoints: written whole or not at all, and verified before they are read.

    RUN/checkpoints/step-N/
        model.safetensors       the full fp32 weights
        config.resolved.yaml    the configuration of the run
        text_encoder/           configuration and tokenizer of the text encoder, no weights
        optimizer/              moments of the optimizer by parameter name, for any number of ranks
        state.json              step and samples seen
        manifest.json           size and sha256 of every file above
    RUN/latest, RUN/best        links to one of the checkpoints; `run_checkpoints` says to which

`checkpoint_writer` writes it to a temporary folder, which is synced, renamed, and only then linked. It is enough to
load the model: the text encoder and the audio checkpoint that training started from are not needed, and no network is.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from atr_scale.checkpoint_writer import HostCopies, Trained, Writing, take
from atr_scale.config import RunConfig, load_config
from atr_scale.distributed.world import World
from atr_scale.encoders.text import TextEncoder
from atr_scale.encoders.text_encoders import build_text_encoder, load_text_encoder
from atr_scale.errors import UserError
from atr_scale.model import Retriever
from atr_scale.precision import Precision, Products
from atr_scale.remote.fetch import bring_model
from atr_scale.remote.nodes import SharedBy
from atr_scale.remote.places import address_of
from atr_scale.run_checkpoints import (
    CONFIG,
    STATE,
    TEXT_ENCODER,
    WEIGHTS,
    best_of,
    check_checksums,
    newest_first,
)
from atr_scale.scorers.tap import with_zero_biases

logger = logging.getLogger(__name__)


def save(run: Path, trained: Trained, world: World, config_yaml: str, state: dict[str, Any]) -> Path:
    """Write checkpoint step-`state["step"]`, link it as latest, and return its folder. All ranks call this.

    Raises DiskFull or Failure as `Writing` does.
    """
    return start_saving(run, trained, world, config_yaml, state).result()


def start_saving(
    run: Path,
    trained: Trained,
    world: World,
    config_yaml: str,
    state: dict[str, Any],
    copies: HostCopies | None = None,
    shared: SharedBy | None = None,
    **calls: Callable[..., object],
) -> Writing:
    """`save` that waits for a copy of the state alone; the files are written behind.

    copies: see `take`. shared: see `Writing`. calls: `before`, `afterwards` and `failed` of `Writing`.
    """
    snapshot = take(trained, world, config_yaml, state, copies)
    return Writing(run, folder_of(run, state["step"]), snapshot, world, shared, **calls)


def folder_of(run: Path, step: int) -> Path:
    """The folder of a run's checkpoint."""
    return run / "checkpoints" / f"step-{step}"


def build_retriever(config: RunConfig, folder: Path, **options: Any) -> Retriever:
    """Build the model of `config` with the weights of the checkpoint in `folder`. Pretrained weights are not read.

    options: of `Retriever`. Raises UserError if the weights belong to another model, or if the text encoder of a
    checkpoint of version 0.1, which holds no files of it, is not found.
    """
    config = config.model_copy(deep=True)
    config.model.audio.checkpoint = None
    name, settings = config.model.text.name, config.model.text.model_dump(exclude={"name"})
    place = folder / TEXT_ENCODER
    if not place.is_dir() and Path(name).is_dir():
        place = Path(name)
    if place.is_dir():
        text_encoder = load_text_encoder(place, name, **settings)
    else:
        text_encoder = _text_encoder_of_version_0_1(folder, name, settings)
    model = Retriever(config.model, config.objective, text_encoder=text_encoder, **options)
    load_weights(model, read_weights(folder), str(folder))
    return model


def _text_encoder_of_version_0_1(folder: Path, name: str, settings: dict[str, Any]) -> TextEncoder:
    """The text encoder by its name on a hub, because checkpoints of version 0.1 hold no files of it."""
    try:
        return build_text_encoder(name, **settings)
    except UserError as error:
        raise UserError(
            f"{folder} is of version 0.1, which left out the text encoder's files, and {name!r} is not found from "
            f"here: load it from the folder that it was trained in ({error})"
        ) from None


def load_retriever(
    location: str | Path, plugins: Sequence[str] = (), precision: Products | None = None
) -> tuple[Retriever, RunConfig, Path]:
    """Load a trained model. Returns it with its configuration and the folder of its checkpoint.

    plugins: as for `read_config`. precision: of its encoders, default that of its run. Raises UserError if the model
    cannot be loaded.
    """
    folder = find_checkpoint(location)
    check_checksums(folder)
    config = read_config(folder, plugins)
    chosen = Precision(config.train.precision, config.train.tf32).instead(precision)
    options: dict[str, Any] = {
        "precision": chosen.autocast,
        "tf32": chosen.tf32,
        "head_products": config.train.head_products,
    }
    return build_retriever(config, folder, **options), config, folder


def read_config(folder: Path, plugins: Sequence[str] = ()) -> RunConfig:
    """Read the configuration of the checkpoint in `folder`.

    plugins: the modules that are imported for it. A checkpoint may come from an untrusted source, so no module is
    imported because the checkpoint names it. Raises UserError that lists the modules that it needs beyond these.
    """
    return load_config(folder / CONFIG, plugins=plugins, trusted=False)


def find_checkpoint(location: str | Path) -> Path:
    """Find the checkpoint of a run: the one with the best score, else the links best or latest, else the newest one.

    The folder of a checkpoint is found as itself. What is on S3 is downloaded, without the optimizer's state.

    Raises UserError if there is none.
    """
    if not isinstance(location, str | os.PathLike):
        raise UserError(f"no checkpoint at {location!r}: give the path of a run folder or of one of its checkpoints")
    if address := address_of(location):
        return bring_model(address).resolve()
    location = Path(location)
    try:
        found = (location, best_of(location), location / "best", location / "latest", *newest_first(location))
        for folder in found:
            if folder is not None and (folder / WEIGHTS).is_file():
                return folder.resolve()
    except OSError as error:  # for example a name that is too long
        raise UserError(f"no checkpoint at {location!s:.200} ({error.strerror}): give a run folder") from None
    raise UserError(f"no checkpoint at {location}: give a run folder or one of its checkpoints/step-N")


def name_of(location: str | Path, folder: Path) -> str:
    """What to call the checkpoint that `find_checkpoint` has found: its address on S3, or its folder."""
    address = address_of(location)
    if address is None or address.endswith(f"/{folder.name}"):
        return address or str(folder)
    return f"{address.removesuffix('/best').removesuffix('/latest')}/checkpoints/{folder.name}"


def read_weights(location: str | Path) -> dict[str, Tensor]:
    """Read the weights of a run folder or a checkpoint folder. Raises UserError if they are damaged."""
    path = find_checkpoint(location) / WEIGHTS
    try:
        return with_zero_biases(load_file(path))
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}): give another checkpoint") from None


def load_weights(model: nn.Module, weights: dict[str, Tensor], place: str) -> None:
    """Load `weights` strictly. Raises UserError that names the first keys that do not fit.

    place: source of the weights, for the message.
    """
    wrong = misfits(model.state_dict(), weights)
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(
            f"{place} is a checkpoint of another model ({'; '.join(wrong[:3])}{more}): "
            "use the configuration it was trained with"
        )
    model.load_state_dict(weights)


def misfits(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> list[str]:
    """One clause for each key of `weights` that differs from `own`, the state dict that it is meant for."""
    wrong = [f"missing {key}" for key in own if key not in weights]
    wrong += [f"unexpected {key}" for key in weights if key not in own]
    return wrong + [
        f"{key} is {list(weights[key].shape)}, this model has {list(value.shape)}"
        for key, value in own.items()
        if key in weights and weights[key].shape != value.shape
    ]


def read_state(folder: Path) -> dict[str, Any]:
    """The `state` that `save` was called with; it holds at least the step. Raises UserError if it is not readable."""
    try:
        state = dict(json.loads((folder / STATE).read_text(encoding="utf-8")))
        return {**state, "step": int(state["step"])}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"no readable {STATE} in {folder} ({error}): copy it anew, or give another checkpoint"
        ) from None
