"""Read checkpoint files without running code from them.

Training scripts save more than weights: learning rates as NumPy scalars, samplers as NumPy arrays, settings as
namespaces, and callbacks of Lightning under their classes. None of this is needed. Each such name is read as an inert
object, so that neither NumPy nor Lightning is called or has to be installed. torch refuses every other name in a file.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from atr_scale.errors import UserError

TRANSFORMERS_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
INERT = (
    # NumPy 1 and 2 write the same objects under different names.
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.ndarray",
    "numpy.dtype",
    "argparse.Namespace",
    # Before version 1.6 Lightning stored the state of a callback under its class.
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "pytorch_lightning.callbacks.lr_monitor.LearningRateMonitor",
)
# A dict with attribute access. It is read as a plain dict, because torch fills only those.
DICTS = ("pytorch_lightning.utilities.parsing.AttributeDict",)


class Inert:
    """Stands for any object: takes all arguments and any state, and keeps none of them."""

    def __new__(cls, *args: object) -> Inert:
        return super().__new__(cls)

    def __init__(self, *args: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


@contextmanager
def safe_types() -> Iterator[None]:
    """Let `torch.load(weights_only=True)` read the names above and no names that other code has declared safe."""
    others = torch.serialization.get_safe_globals()
    known: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [(Inert, name) for name in INERT]
    known += [(dict, name) for name in DICTS]
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(known)
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(others)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a file of torch.save or safetensors, or the weights in a transformers folder.

    Tensors stay on disk until they are used if the format of the file allows it. Raises UserError if `path` is none of
    these.
    """
    path = Path(path)
    if path.is_dir():
        candidates = [path / name for name in TRANSFORMERS_WEIGHTS if (path / name).is_file()]
        if not candidates:
            raise UserError(f"{path} is a folder without {' or '.join(TRANSFORMERS_WEIGHTS)}: give the checkpoint file")
        path = candidates[0]
    try:
        contents = _read_shards(path) if path.suffix == ".json" else _read_file(path)
    except UserError:
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0].split(". ")[0]
        if unsafe := re.search(r"GLOBAL (\S+)", str(error)):
            reason = f"it holds {unsafe[1]}"
        raise UserError(
            f"{path} is no checkpoint of plain tensors ({reason}): give the original weights file"
        ) from None
    if not isinstance(contents, dict):
        raise UserError(f"{path} does not hold named tensors: give the original weights file of the encoder")
    return contents


def _read_file(path: Path) -> Any:
    if not path.exists():
        raise UserError(f"no checkpoint at {path}: check the path")
    if path.suffix == ".safetensors":
        return load_file(path)
    # Files of torch before 1.6 are not zip archives and cannot be mapped into memory.
    mapped = zipfile.is_zipfile(path)
    with safe_types():
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


def _read_shards(index: Path) -> dict[str, Any]:
    """All tensors of the files that a transformers index names."""
    contents: dict[str, Any] = {}
    for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())):
        contents |= _read_file(index.parent / name)
    return contents
