"""Checkpoints: written whole or not at all, verified before they are read.

    RUN/checkpoints/step-N/
        model.safetensors       the full fp32 weights
        config.resolved.yaml    what they belong to
        deepspeed/              moments and shards, one file a rank
        state.json              step and samples seen
        manifest.json           size and sha256 of every file above
    RUN/latest, RUN/best        links to one of them

A checkpoint is built in a temporary folder, synced, renamed, and only then linked.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from atr_scale.distributed.world import World
from atr_scale.errors import UserError
from atr_scale.model import WEIGHTS
from atr_scale.training.engine import Engine

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"


def save(run: Path, engine: Engine, world: World, config_yaml: str, state: dict[str, Any]) -> Path:
    """Write checkpoint step-`state["step"]` and link it as latest. All ranks call this; returns its folder."""
    final = run / "checkpoints" / f"step-{state['step']}"
    temporary = final.with_name(f".{final.name}.partial")
    if world.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    world.barrier()
    engine.save(temporary, state)
    weights = engine.full_weights()
    if world.is_main:
        save_file(weights, temporary / WEIGHTS)
        (temporary / "config.resolved.yaml").write_text(config_yaml)
        (temporary / "state.json").write_text(json.dumps(state))
    world.barrier()  # every rank's files are there
    if world.is_main:
        _seal(temporary)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        _sync(final.parent)
        link(run, "latest", final)
    world.barrier()
    return final


def link(run: Path, name: str, checkpoint: Path) -> None:
    """Point RUN/`name` at a checkpoint, in one step."""
    temporary = run / f".{name}.partial"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(checkpoint.relative_to(run))
    os.replace(temporary, run / name)
    _sync(run)


def find(run: Path) -> Path | None:
    """The newest checkpoint of a run whose checksums hold; None where the run has none at all.

    Raises UserError where there are checkpoints and all of them are broken: a run never starts over silently.
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
    """The run's checkpoints by falling step."""
    found = [(int(m[1]), p) for p in run.glob("checkpoints/step-*") if (m := re.fullmatch(r"step-(\d+)", p.name))]
    return [path for _, path in sorted(found, reverse=True)]


def verify(checkpoint: Path) -> list[str]:
    """What is wrong with a checkpoint by its manifest; empty where nothing is."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        return [f"no readable {MANIFEST}: {error}"]
    faults = []
    for name, expected in files.items():
        path = checkpoint / name
        if not path.is_file():
            faults.append(f"{name} is missing")
        elif path.stat().st_size != expected["bytes"]:
            faults.append(f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}")
        elif _sha256(path) != expected["sha256"]:
            faults.append(f"{name} has another checksum")
    return faults


def prune(run: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints and the best one."""
    best = (run / "best").resolve() if (run / "best").exists() else None
    for checkpoint in newest_first(run)[keep:]:
        if checkpoint.resolve() != best:
            shutil.rmtree(checkpoint)


def _seal(folder: Path) -> None:
    """Sync every file and write the manifest over them."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        _sync(path)
        files[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"files": files}, indent=1))
    for path in (manifest, *(p for p in folder.rglob("*") if p.is_dir()), folder):
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
