"""Original checkpoints, loaded strictly and without running code from them.

An encoder names the layouts of the files it loads. Every entry of a file is loaded, or is on its layout's short lists
of what the encoder computes itself or has no use for; anything else, or anything missing, is an error that names it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from atr_scale.encoders.safe_types import safe_types
from atr_scale.errors import UserError

TRANSFORMERS_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class Entry:
    """Where a parameter of ours lies in a file: all of entry `key`, or third `part` of its first axis."""

    key: str
    part: int | None = None


def same_name(name: str) -> Entry | None:
    return Entry(name)


@dataclass(frozen=True)
class Layout:
    """How a project writes an encoder's weights.

    name: for people. container: the key under which the named tensors lie, None where the file is nothing else.
    prefix: what the entries of the encoder start with. derived, unused: regular expressions, matched from the start of
    an entry's full name, of constants that are computed here and of weights without use here; neither is ever read.
    origin: our name -> its entry, after the prefix; None for what no file in this layout holds.
    """

    name: str = "original"
    container: str | None = None
    prefix: str = ""
    derived: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    origin: Callable[[str], Entry | None] = same_name

    def entries(self, contents: dict[str, Any]) -> dict[str, Tensor] | None:
        """The named tensors of a file in this layout, None where it is in another."""
        found = contents if self.container is None else contents.get(self.container)
        if not isinstance(found, dict) or not found or not all(isinstance(v, Tensor) for v in found.values()):
            return None
        if all(key.startswith("module.") for key in found):  # a model saved from inside DataParallel
            found = {key.removeprefix("module."): value for key, value in found.items()}
        return found if any(key.startswith(self.prefix) for key in found) else None

    def problem(self, module: nn.Module, entries: dict[str, Tensor]) -> str | None:
        """Why `entries` do not fit `module`, None where they do."""
        own = module.state_dict()
        origins = {name: entry for name in own if (entry := self.origin(name)) is not None}
        expected = {self.prefix + entry.key for entry in origins.values()}
        skipped = re.compile("|".join(f"(?:{p})" for p in (*self.derived, *self.unused)) or r"(?!)")
        missing = [key for key in sorted(expected) if key not in entries]
        unexpected = [key for key in entries if key not in expected and not skipped.match(key)]
        misshapen = [
            key
            for name, entry in origins.items()
            if (key := self.prefix + entry.key) in entries and _part(entries[key], entry).shape != own[name].shape
        ]
        for problem, keys in (
            ("lacks", missing),
            ("has the unexpected", unexpected),
            ("has another shape of", misshapen),
        ):
            if keys:
                return f"{problem} '{keys[0]}'" + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")
        return None

    def load(self, module: nn.Module, entries: dict[str, Tensor]) -> None:
        """Copies `entries`, which must fit, into `module`."""
        own = module.state_dict()
        for name, value in own.items():
            entry = self.origin(name)
            if entry is not None:
                value.copy_(_part(entries[self.prefix + entry.key], entry))


def _part(tensor: Tensor, entry: Entry) -> Tensor:
    if entry.part is None or tensor.ndim == 0 or len(tensor) % 3:
        return tensor
    return tensor.chunk(3)[entry.part]


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """What torch.save wrote to `path`, or the weights of a transformers folder; UserError where it is neither."""
    path = Path(path)
    if path.is_dir():
        for name in TRANSFORMERS_WEIGHTS:
            if (path / name).is_file():
                path = path / name
                break
        else:
            raise UserError(f"{path} is a folder without {' or '.join(TRANSFORMERS_WEIGHTS)}: give the checkpoint file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with safe_types():
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {path}: check the path") from None
    except Exception as error:
        reason = str(error).strip().split("\n")[0].split(". ")[0]
        raise UserError(
            f"{path} is no checkpoint of plain tensors ({reason}): give the original weights file"
        ) from None
    if not isinstance(contents, dict):
        raise UserError(f"{path} does not hold named tensors: give the original weights file of the encoder")
    return contents


def load_strictly(module: nn.Module, layouts: tuple[Layout, ...], name: str, path: str | Path) -> Layout:
    """Copies the checkpoint at `path` into `module` and returns its layout; `name` is the encoder's, for messages.

    Raises UserError naming the first missing, unexpected, misshapen or non-finite entry.
    """
    contents = read_checkpoint(path)
    fitting = [(layout, entries) for layout in layouts if (entries := layout.entries(contents)) is not None]
    if not fitting:
        places = " or ".join(f"'{layout.prefix}*' under '{layout.container or 'its top'}'" for layout in layouts)
        raise UserError(f"{path} does not hold the named tensors of {name} (entries {places}): give its original file")
    problems = []
    for layout, entries in fitting:
        problem = layout.problem(module, entries)
        if problem is None:
            break
        problems.append(problem)
    else:
        raise UserError(f"{path} {problems[0]}: it is no checkpoint of {name}")
    layout.load(module, entries)
    for own_name, value in module.state_dict().items():
        entry = layout.origin(own_name)
        if entry is not None and not value.isfinite().all():
            raise UserError(f"{path} has non-finite values in '{layout.prefix}{entry.key}': it is damaged")
    return layout
