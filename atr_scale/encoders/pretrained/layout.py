"""How the original projects write their encoders' weights.

An encoder names the layouts of the files it loads. Every entry of a file is loaded, or is on its layout's short lists
of what the encoder computes itself or has no use for; anything else, or anything missing, is an error that names it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

# What DataParallel puts before every name of the model inside it.
WRAPPER = "module."


@dataclass(frozen=True)
class Entry:
    """Where a parameter of ours lies in a file: all of entry `key`, or third `part` of its first axis."""

    key: str
    part: int | None = None


def same_name(name: str) -> Entry | None:
    return Entry(name)


@dataclass(frozen=True)
class Misfit:
    """The entries of a file that keep it from loading."""

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
            f"{what} '{keys[0]}'" + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")
            for what, keys in kinds
            if keys
        )


@dataclass(frozen=True)
class Layout:
    """How a project writes an encoder's weights.

    name: for people. container: the key under which the named tensors lie, None if the file is nothing else.
    prefix: what the entries of the encoder start with. derived, unused: regular expressions, matched from the start of
    an entry's full name, of constants that are computed here and of weights without use here; neither is ever read.
    origin: our name -> its entry, after the prefix; None for what no file in this layout holds. refusal: what to tell
    about a file in this layout, if it is known only to be refused.
    The `module.` that DataParallel puts before every name is no part of prefix, derived and unused.
    """

    name: str = "original"
    container: str | None = None
    prefix: str = ""
    derived: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    origin: Callable[[str], Entry | None] = same_name
    refusal: str | None = None

    def entries(self, contents: dict[str, Any]) -> dict[str, Tensor] | None:
        """The named tensors of a file in this layout, None if it is in another."""
        found = contents if self.container is None else contents.get(self.container)
        if not isinstance(found, dict) or not found:
            return None
        if not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in found.items()):
            return None
        return found if any(key.startswith(_wrapper(found) + self.prefix) for key in found) else None

    def sources(self, module: nn.Module, entries: dict[str, Tensor]) -> Iterator[tuple[Tensor, str, Entry]]:
        """Each tensor of `module` that a file holds, the name of its entry in the file, and where it lies there."""
        before = _wrapper(entries) + self.prefix
        for name, own in module.state_dict().items():
            entry = self.origin(name)
            if entry is not None:
                yield own, before + entry.key, entry

    def misfit(self, module: nn.Module, entries: dict[str, Tensor]) -> Misfit:
        """What keeps `entries` from `module`; empty if they fit. Values are not looked at."""
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
        """The entries that are derived, and those that are unused."""
        start = len(_wrapper(entries))

        def listed(patterns: tuple[str, ...]) -> set[str]:
            pattern = re.compile("|".join(f"(?:{p})" for p in patterns) or r"(?!)")
            return {key for key in entries if pattern.match(key, start)}

        return listed(self.derived), listed(self.unused)

    def damaged(self, module: nn.Module, entries: dict[str, Tensor]) -> str | None:
        """The first of the fitting `entries` to be loaded that holds NaN or infinity."""
        sources = self.sources(module, entries)
        return next((key for _, key, entry in sources if not _part(entries[key], entry).isfinite().all()), None)

    def load(self, module: nn.Module, entries: dict[str, Tensor]) -> None:
        """Copies `entries`, which must fit, into `module`."""
        for own, key, entry in self.sources(module, entries):
            own.copy_(_part(entries[key], entry))


@dataclass(frozen=True)
class Loaded:
    """What became of a file: its layout, and the number of entries loaded and left."""

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
    # Quantised integers would pass as weights otherwise.
    return stored.shape == shape and (stored.is_floating_point() or not own.is_floating_point())
