"""Copies of shards on a disk of the node that reads them."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from atr_scale.data import storage
from atr_scale.errors import UserError
from atr_scale.files import atomic_write
from atr_scale.locks import hold
from atr_scale.memory import as_text

logger = logging.getLogger(__name__)

PIECE = 64 * 2**20  # bytes copied at once
STATE = ".staged.json"  # versions of the files that a copy was made of
BAR_AFTER = 2.0  # seconds of work after which a progress bar appears


def stage_shards(location: str, folder: Path) -> Path:
    """Copy the files of a folder or s3:// prefix to a folder below `folder`, and return it.

    Files that are there and have not changed (bytes, ETag or time of modification) are kept, files that are gone from
    `location` are removed. Jobs on one node wait for each other. Raises UserError if `location` is empty, or if the
    disk has not enough space.
    """
    versions = {name: [size, version] for name, (size, version) in storage.list_versions(location).items()}
    if not versions:
        raise UserError(f"no shards in {location}: give the folder or s3:// prefix that `atr-scale shards build` made")
    digest = hashlib.sha256(location.encode()).hexdigest()[:12]
    copy = folder / f"{Path(location).name}-{digest}"
    try:
        copy.mkdir(parents=True, exist_ok=True)
        with hold(folder / f"{copy.name}.lock", f"the copy {copy}"):
            _update(location, copy, versions)
    except OSError as error:
        raise UserError(f"cannot copy {location} to {copy} ({error.strerror or error}): choose another STAGE") from None
    return copy


def _update(location: str, copy: Path, versions: Mapping[str, list[Any]]) -> None:
    try:
        there = json.loads((copy / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        there = {}
    kept = {name: at for name, at in there.items() if versions.get(name) == at and _has(copy / name, at[0])}
    for path in copy.iterdir():
        if path.name not in kept:
            path.unlink()
    missing = sorted(versions.keys() - kept.keys())
    needed, free = sum(versions[name][0] for name in missing), shutil.disk_usage(copy).free
    if needed > free:
        raise UserError(
            f"{location} needs {as_text(needed)} on the disk of {copy}, which has {as_text(free)} free: make space, "
            "choose another STAGE, or none"
        )
    with tqdm(
        total=needed, desc=f"copying {location}", unit="B", unit_scale=True, disable=None, delay=BAR_AFTER
    ) as bar:
        for name in missing:
            size = versions[name][0]
            with atomic_write(copy / name) as path, path.open("wb") as file:
                for start in range(0, size, PIECE):
                    file.write(storage.read_range(storage.join(location, name), start, min(size, start + PIECE)))
                    bar.update(min(size, start + PIECE) - start)
    with atomic_write(copy / STATE) as path:
        path.write_text(json.dumps(versions), encoding="utf-8")


def _has(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size
