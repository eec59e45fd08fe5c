"""Layouts: how the files of the original projects store the weights of an encoder.

An encoder lists the layouts of the files that it loads. Every entry of a file is loaded, or its layout lists it as
derived (computed by the encoder itself) or unused. Any other entry, and any missing entry, is an error that names it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

# DataParallel puts this before every parameter name.
WRAPPER = "module."


@dataclass(frozen=True)
class Entry:
    """Place of a parameter in a file: the whole entry `key`, or third number `part` (0, 1, 2) along its first axis."""

    key: str
    part: int | None = None


def same_name(name: str) -> Entry | None:
    return Entry(name)


@dataclass(frozen=True)
class Misfit:
    """The entries that prevent a file from loading."""

    missing: list[str]
    unexpected: list[str]
    misshapen: list[str]

    def __len__(self) -> int:
        return len(self.missing) + len(self.unexpected) + len(self.misshapen)

    def __str__(self) -> str:
        kinds = (
            ("lacks", self.missing),
            ("has the unexpected", self.unexpected),
            ("has another shape of", self.misshapen),
        )
        return ", ".join(
            f"{verb} '{keys[0]}'" + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")
            for verb, keys in kinds
            if keys
        )


@dataclass(frozen=True)
class Layout:
    """How a project stores the weights of an encoder.

    name: name in reports.
    container: key of the named tensors in the file, None if the file holds nothing else.
    prefix: beginning of the names of the encoder's entries.
    derived, unused: regular expressions, matched from the start of the full name of an entry. derived are constants
    that this package computes itself, unused are weights that it does not use. Neither are read.
    origin: parameter name -> its entry without the prefix, None if no file in this layout holds the parameter.
    refusal: why files in this layout are refused, None for a layout that can be loaded.
    prefix, derived and unused leave out the `module.` that DataParallel puts before every name.
    """

    name: str = "original"
    container: str | None = None
    prefix: str = ""
    derived: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    origin: Callable[[str], Entry | None] = same_name
    refusal: str | None = None

    def entries(self, contents: dict[str, Any]) -> dict[str, Tensor] | None:
        """The named tensors of a file, None if the file has another layout."""
        found = contents if self.container is None else contents.get(self.container)
        if not isinstance(found, dict) or not found:
            return None
        if not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in found.items()):
            return None
        return found if any(key.startswith(_wrapper(found) + self.prefix) for key in found) else None

    def sources(self, module: nn.Module, entries: dict[str, Tensor]) -> Iterator[tuple[Tensor, str, Entry]]:
        """Yield each tensor of `module` that a file holds, the full name of its entry, and its place."""
        before = _wrapper(entries) + self.prefix
        for name, own in module.state_dict().items():
            entry = self.origin(name)
            if entry is not None:
                yield own, before + entry.key, entry

    def misfit(self, module: nn.Module, entries: dict[str, Tensor]) -> Misfit:
        """The entries that prevent loading into `module`; empty if all fit. Values are not read."""
        sources = list(self.sources(module, entries))
        expected = {key for _, key, _ in sources}
        derived, unused = self.ignored(entries)
        return Misfit(
            missing=sorted(expected - entries.keys()),
            unexpected=[key for key in entries if key not in expected | derived | unused],
            misshapen=[
                key for own, key, entry in sources if key in entries and not _alike(own, entries[key], entry.part)
            ],
        )

    def ignored(self, entries: dict[str, Tensor]) -> tuple[set[str], set[str]]:
        """Names of the derived entries and of the unused entries."""
        start = len(_wrapper(entries))

        def listed(patterns: tuple[str, ...]) -> set[str]:
            pattern = re.compile("|".join(f"(?:{p})" for p in patterns) or r"(?!)")
            return {key for key in entries if pattern.match(key, start)}

        return listed(self.derived), listed(self.unused)

    def damaged(self, module: nn.Module, entries: dict[str, Tensor]) -> str | None:
        """Name of the first entry with NaN or infinity among those to be loaded, None if there is none."""
        sources = self.sources(module, entries)
        return next((key for _, key, entry in sources if not _part(entries[key], entry).isfinite().all()), None)

    def load(self, module: nn.Module, entries: dict[str, Tensor]) -> None:
        """Copy `entries` into `module`. They must fit."""
        for own, key, entry in self.sources(module, entries):
            own.copy_(_part(entries[key], entry))


@dataclass(frozen=True)
class Loaded:
    """Result of loading a file: its layout and the numbers of entries that were loaded, derived and unused."""

    layout: Layout
    num_loaded: int
    num_derived: int
    num_unused: int


def _wrapper(entries: dict[str, Tensor]) -> str:
    return WRAPPER if all(key.startswith(WRAPPER) for key in entries) else ""


def _part(tensor: Tensor, entry: Entry) -> Tensor:
    return tensor if entry.part is None else tensor.chunk(3)[entry.part]


def _alike(own: Tensor, stored: Tensor, part: int | None) -> bool:
    shape = own.shape if part is None else (3 * own.shape[0], *own.shape[1:])
    # Otherwise quantised integers would be taken for weights.
    return stored.shape == shape and (stored.is_floating_point() or not own.is_floating_point())
