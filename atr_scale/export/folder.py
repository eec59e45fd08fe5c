"""Writes a trained model as a folder that can be handed on.

    OUT/README.md               model card
    OUT/model.safetensors       weights, fp32
    OUT/config.resolved.yaml    configuration, without the places of the training machine
    OUT/text_encoder/           configuration and tokenizer of the text encoder
    OUT/state.json, score.json  step, fingerprints of the data, validation score
    OUT/onnx/                   graphs of both towers
    OUT/sentence-transformers/  text tower for the library of that name
    OUT/manifest.json           size and sha256 of every file above but the card, which may be edited

It is written beside OUT and renamed when it is complete.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from atr_scale.checkpoint import find_checkpoint
from atr_scale.errors import UserError, one_line
from atr_scale.evaluation.results import run_folder
from atr_scale.export.card import write_card
from atr_scale.export.onnx import export_onnx
from atr_scale.export.origin import Origin
from atr_scale.export.places import public_config, public_state, remove_local_paths
from atr_scale.export.sentence_transformers import export_text_tower
from atr_scale.files import give_usual_mode
from atr_scale.inference import TrainedModel, load_trained
from atr_scale.locks import hold
from atr_scale.remote.fetch import bring_files
from atr_scale.remote.places import address_of, run_of
from atr_scale.run_checkpoints import (
    CONFIG,
    SCORE,
    STATE,
    TEXT_ENCODER,
    WEIGHTS,
    sealed,
    write_manifest,
)

CARD = "README.md"
MODEL, ONNX, SENTENCE_TRANSFORMERS = "model", "onnx", "sentence-transformers"
FORMATS = (MODEL, ONNX, SENTENCE_TRANSFORMERS)


@dataclass(frozen=True)
class ExportedPart:
    """A format of the model: its size in MB (10^6 bytes), or the reason why it is not there."""

    name: str
    megabytes: float = 0.0
    reason: str = ""


@dataclass(frozen=True)
class ExportedModel:
    """What `export_run` has written."""

    folder: Path
    parts: list[ExportedPart]


def export_run(
    location: str | Path, out: str | Path, *, formats: Sequence[str] | None = None, plugins: Sequence[str] = ()
) -> ExportedModel:
    """Export the model of a run, its best checkpoint, or of one checkpoint, to the new folder `out`.

    formats: of FORMATS; the model itself is always there. By default all, and what the model cannot have is told.
    plugins: as for `atr_scale.load`. Raises UserError if `out` exists and is not an empty folder, if the model cannot
    be loaded, or if it cannot have a format of `formats`.
    """
    out = Path(os.path.abspath(out))
    if unknown := [name for name in formats or () if name not in FORMATS]:
        raise UserError(f"no format is called {unknown[0]!r}: choose of {', '.join(FORMATS)}")
    if re.search(r"[\"'`\\\x00-\x1f]", out.name):
        raise UserError(f"--out: the model would be called {out.name!r}: give a name without quotes and backslashes")
    _check_free(out)
    checkpoint = find_checkpoint(location)
    if out.parent.resolve() == checkpoint.resolve().parent and out.parent.name == "checkpoints":
        raise UserError(f"{out} is among the checkpoints of a run, which would be taken for one: choose another --out")
    model = load_trained(checkpoint, "cpu", plugins)
    address = address_of(location)
    run_dir = bring_files(run_of(address)) if address else run_folder(location, checkpoint)
    origin = Origin.of(run_dir, checkpoint, model.config, out.name, plugins)
    partial = out.with_name(f".{out.name}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with hold(out.with_name(f".{out.name}.lock"), f"the export to {out}"):
            shutil.rmtree(partial, ignore_errors=True)
            try:
                partial.mkdir()
                parts = _write(checkpoint, model, origin, partial, formats)
                _check_free(out)
                os.replace(partial, out)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        cause = getattr(error, "strerror", None) or one_line(error)
        raise UserError(f"cannot write {out} ({cause}): choose another --out") from None
    return ExportedModel(out, parts)


def _write(
    checkpoint: Path, model: TrainedModel, origin: Origin, folder: Path, formats: Sequence[str] | None
) -> list[ExportedPart]:
    _write_model(checkpoint, model, origin, folder)
    parts = [_part(MODEL, folder)]
    for name, write in ((ONNX, _graphs), (SENTENCE_TRANSFORMERS, _text_tower)):
        if formats is None or name in formats:
            try:
                parts += write(model, folder / name)
            except UserError as error:
                parts.append(ExportedPart(name, reason=str(error)))
    failed = next((part for part in parts if part.reason), None)
    if formats is not None and failed is not None:
        raise UserError(f"{failed.name} cannot be exported: {failed.reason}")
    write_card(origin, model, folder / CARD, [part.name for part in parts if not part.reason])
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        give_usual_mode(path)
    inside = [str(path.relative_to(folder)) for path in files]
    write_manifest(folder, sealed(folder, [name for name in inside if name != CARD]))
    return parts


def _graphs(model: TrainedModel, folder: Path) -> list[ExportedPart]:
    parts = []
    for tower, graph in export_onnx(model, folder).items():
        reason = "" if graph.file else graph.reason or "no reason is known"
        parts.append(ExportedPart(f"{ONNX}/{tower}.onnx", graph.megabytes, reason))
    if not any(folder.iterdir()):
        folder.rmdir()
    return parts


def _text_tower(model: TrainedModel, folder: Path) -> list[ExportedPart]:
    return [_part(SENTENCE_TRANSFORMERS, export_text_tower(model, folder))]


def _part(name: str, folder: Path) -> ExportedPart:
    return ExportedPart(name, sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6)


def _check_free(out: Path) -> None:
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise UserError(f"{out} is there and not an empty folder: choose another --out, or remove it")


def _write_model(checkpoint: Path, model: TrainedModel, origin: Origin, folder: Path) -> None:
    """The files that `atr_scale.load` reads."""
    _copy_weights(checkpoint / WEIGHTS, folder / WEIGHTS)
    (folder / CONFIG).write_text(public_config(origin.config, origin.names), encoding="utf-8")
    state = public_state({"step": 0, **origin.state}, origin.config, origin.names)
    (folder / STATE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    if (checkpoint / SCORE).is_file():
        shutil.copyfile(checkpoint / SCORE, folder / SCORE)
    place = folder / TEXT_ENCODER
    if (checkpoint / TEXT_ENCODER).is_dir():
        shutil.copytree(checkpoint / TEXT_ENCODER, place, copy_function=shutil.copyfile)
    else:  # a checkpoint of version 0.1
        place.mkdir()
        model.module.text_encoder.save_files(place)
    remove_local_paths(place)


def _copy_weights(source: Path, target: Path) -> None:
    """Copy the weights. Metadata in the header, which no version of this package writes, is left out."""
    with safe_open(source, "pt") as file:
        has_metadata = any(key != "format" for key in file.metadata() or {})
    if has_metadata:
        save_file(load_file(source), target)
    else:
        shutil.copyfile(source, target)
