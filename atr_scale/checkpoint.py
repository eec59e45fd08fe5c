"""Checkpoints: written whole or not at all, and verified before they are read.

    RUN/checkpoints/step-N/
        model.safetensors       the full fp32 weights
        config.resolved.yaml    the configuration of the run
        text_encoder/           configuration and tokenizer of the text encoder, no weights
        deepspeed/              optimizer state, one file per rank
        state.json              step and samples seen
        manifest.json           size and sha256 of every file above
    RUN/latest, RUN/best        links to one of the checkpoints

A checkpoint is written to a temporary folder, synced, renamed, and only then linked. It is enough to load the model:
the text encoder and the audio checkpoint that training started from are not needed, and no network is.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from atr_scale.config import RunConfig, load_config
from atr_scale.distributed.world import World
from atr_scale.encoders.text import TextEncoder
from atr_scale.encoders.text_encoders import build_text_encoder, load_text_encoder
from atr_scale.errors import UserError
from atr_scale.files import sha256_of, sync
from atr_scale.model import Retriever
from atr_scale.precision import Precision, Products
from atr_scale.scorers.tap import with_zero_biases

logger = logging.getLogger(__name__)

WEIGHTS, CONFIG, TEXT_ENCODER, STATE, MANIFEST = (
    "model.safetensors", "config.resolved.yaml", "text_encoder", "state.json", "manifest.json",
)  # fmt: skip


class Trained(Protocol):
    """A model in training, on all ranks, that a checkpoint can be written from."""

    model: Retriever

    def save(self, folder: Path, state: dict[str, Any]) -> None:
        """Write what resuming needs beside the weights. Every rank writes its own files."""

    def full_weights(self) -> dict[str, Tensor]:
        """The weights on the main rank, {} on the others."""


def save(run: Path, trained: Trained, world: World, config_yaml: str, state: dict[str, Any]) -> Path:
    """Write checkpoint step-`state["step"]`, link it as latest, and return its folder. All ranks call this."""
    final = run / "checkpoints" / f"step-{state['step']}"
    temporary = final.with_name(f".{final.name}.partial")
    if world.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    world.barrier()
    trained.save(temporary, state)
    weights = trained.full_weights()
    if world.is_main:
        save_file(weights, temporary / WEIGHTS)
        (temporary / CONFIG).write_text(config_yaml)
        (temporary / TEXT_ENCODER).mkdir()
        trained.model.text_encoder.save_files(temporary / TEXT_ENCODER)
        (temporary / STATE).write_text(json.dumps(state))
    world.barrier()  # every rank's files are there
    if world.is_main:
        _seal(temporary)
        _rename(temporary, final)
        link(run, "latest", final)
    world.barrier()
    return final


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
    """Find the checkpoint folder of a run (best, else latest, else newest); that of a checkpoint is the folder itself.

    Raises UserError if there is none.
    """
    if not isinstance(location, str | os.PathLike):
        raise UserError(f"no checkpoint at {location!r}: give the path of a run folder or of one of its checkpoints")
    location = Path(location)
    try:
        for folder in (location, location / "best", location / "latest", *newest_first(location)):
            if (folder / WEIGHTS).is_file():
                return folder.resolve()
    except OSError as error:  # for example a name that is too long
        raise UserError(f"no checkpoint at {location!s:.200} ({error.strerror}): give a run folder") from None
    raise UserError(f"no checkpoint at {location}: give a run folder or one of its checkpoints/step-N")


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
        state = dict(json.loads((folder / STATE).read_text()))
        return {**state, "step": int(state["step"])}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"no readable {STATE} in {folder} ({error}): copy it anew, or give another checkpoint"
        ) from None


def link(run: Path, name: str, checkpoint: Path) -> None:
    """Make RUN/`name` a link to a checkpoint, in one atomic step."""
    temporary = run / f".{name}.partial"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(checkpoint.relative_to(run))
    os.replace(temporary, run / name)
    sync(run)


def newest_sound(run: Path) -> Path | None:
    """The newest checkpoint of a run with correct checksums, None if the run has no checkpoint.

    Raises UserError if all checkpoints are broken, because a run must not silently start over.
    """
    checkpoints = newest_first(run)
    for checkpoint in checkpoints:
        faults = verify(checkpoint)
        if not faults:
            return checkpoint
        logger.warning("%s is broken (%s): trying the one before it", checkpoint, "; ".join(faults))
    if checkpoints:
        raise UserError(f"all {len(checkpoints)} checkpoints of {run} are broken: give another run.dir to start over")
    return None


def newest_first(run: Path) -> list[Path]:
    """The checkpoints of the run, sorted by falling step."""
    found = [(int(m[1]), p) for p in run.glob("checkpoints/step-*") if (m := re.fullmatch(r"step-(\d+)", p.name))]
    return [path for _, path in sorted(found, reverse=True)]


def check_checksums(checkpoint: Path) -> None:
    """Raise UserError if the weights or the files of the text encoder do not match the manifest.

    A checkpoint without a manifest is not checked. The configuration may be edited.
    """
    if (checkpoint / MANIFEST).is_file():
        faults = verify(checkpoint, (WEIGHTS, TEXT_ENCODER))
        if faults:
            raise UserError(f"{checkpoint} is damaged ({'; '.join(faults)}): copy it anew, or give another checkpoint")


def verify(checkpoint: Path, only: tuple[str, ...] = ("",)) -> list[str]:
    """Compare a checkpoint with its manifest and return one line per fault.

    only: beginnings of the names of the files to check, by default all files.
    """
    try:
        files = dict(json.loads((checkpoint / MANIFEST).read_text())["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"no readable {MANIFEST}: {error}"]
    faults = []
    for name, expected in files.items():
        if not name.startswith(only):
            continue
        path = checkpoint / name
        if not path.is_file():
            faults.append(f"{name} is missing")
        elif path.stat().st_size != expected["bytes"]:
            faults.append(f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}")
        elif sha256_of(path) != expected["sha256"]:
            faults.append(f"{name} has another checksum")
    return faults


def prune(run: Path, keep: int) -> None:
    """Remove all checkpoints except the newest `keep` and the best one, and the remains of interrupted saving."""
    for partial in run.glob("checkpoints/.step-*.partial"):
        shutil.rmtree(partial)
    best = (run / "best").resolve() if (run / "best").exists() else None
    for checkpoint in newest_first(run)[keep:]:
        if checkpoint.resolve() != best:
            shutil.rmtree(checkpoint)


def _rename(finished: Path, final: Path) -> None:
    """Rename a finished checkpoint. An older one of the same step moves aside first and is deleted last."""
    aside = final.with_name(f".{final.name}.replaced.partial")
    if final.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(final, aside)
    os.replace(finished, final)
    sync(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _seal(folder: Path) -> None:
    """Sync every file and write the manifest of all files."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        sync(path)
        files[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"files": files}, indent=1))
    for path in (manifest, *(p for p in folder.rglob("*") if p.is_dir()), folder):
        sync(path)
