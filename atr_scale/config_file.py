"""Configuration files and overrides, before their values are checked.

A file may extend another one, and overrides change what the files say. Each of them is a layer, and one rule joins a
layer to the ones before it: what it names is replaced, and if it gives a section another `name`, what belonged to the
old name is dropped. A mapping in a file names its keys one by one; an override names a whole value.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from atr_scale.errors import UserError, one_line
from atr_scale.sections import dotted, flat

logger = logging.getLogger(__name__)

Keys = tuple[str | int, ...]
# By the place of a section with a `name`: of its values, the keys that do not outlive a change of the name.
Leftovers = Mapping[tuple[str, ...], Callable[[dict[str, Any]], list[tuple[str, ...]]]]

EXTENDS = "extends"
# Plain scalars that YAML 1.1 reads as other numbers than they look like: 017 is 15, 1:30 is 90.
_ODD_NUMBER = re.compile(r"[-+]?(0[0-9_]+|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)")
FORMS = "key.sub=value, key+=value or ~key"
_KEY = re.compile(r"[^.\[\]]+(\[\d+\])*(\.[^.\[\]]+(\[\d+\])*)*")


@dataclass(frozen=True)
class Override:
    """One override of the command line. keys: the place; a number is a place in a list."""

    text: str
    keys: Keys
    action: Literal["replace", "append", "remove"]
    value: Any = None


def read_files(path: Path) -> list[dict[str, Any]]:
    """The values of a configuration file and of those that it extends, the extended ones first.

    Raises UserError for a missing file, one that does not parse, or files that extend each other in a circle.
    """
    if not path.is_file():
        raise UserError(
            f"no configuration file at {path}: give the path of a YAML file; `atr-scale init DIR` copies the "
            "shipped ones to DIR/configs"
        )
    layers: list[dict[str, Any]] = []
    chain: list[Path] = []
    while True:
        chain.append(path)
        values = _read_yaml(path)
        extended = values.pop(EXTENDS, None)
        layers.insert(0, values)
        if extended is None:
            return layers
        if not isinstance(extended, str):
            raise UserError(f"{path}: {EXTENDS} is {extended!r}: give the path of one YAML file, relative to this file")
        base = path.parent / extended
        if not base.is_file():
            raise UserError(f"{path} extends {extended!r}, but there is no file at {base}: correct {EXTENDS}")
        if any(base.samefile(file) for file in chain):
            circle = " extends ".join(map(str, [*chain, base]))
            raise UserError(f"{circle}, which is a circle: remove {EXTENDS} from one of these files")
        path = base


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        odd = _odd_number(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} does not parse as YAML: {one_line(error)}") from None
    if odd:
        raise UserError(f"{path}, line {odd[0]}: {odd[1]}")
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no configuration: expected sections such as run, data, model and train")
    return values  # type: ignore[return-value]


def _odd_number(text: str) -> tuple[int, str] | None:
    """Line of the first number in YAML that is read as another one than it looks like, and a clause about it."""
    for token in yaml.scan(text):
        if isinstance(token, yaml.ScalarToken) and token.plain and _ODD_NUMBER.fullmatch(token.value):
            number = yaml.safe_load(token.value)
            if isinstance(number, int | float):
                cause = f"YAML reads {token.value} as {number}: write {number}, or quotes around a text"
                return token.start_mark.line + 1, cause
    return None


def parse_override(text: str) -> Override:
    """Raises UserError if `text` is no override."""
    key, equals, value = text.partition("=")
    action: Literal["replace", "append", "remove"] = "replace"
    if key.startswith("~"):
        key, action = key[1:], "remove"
    elif key.endswith("+"):
        key, action = key[:-1], "append"
    if not _KEY.fullmatch(key) or (action == "remove") == bool(equals):
        raise UserError(f"override {text!r} is not of the form {FORMS}, for example train.lr=1e-4")
    keys = tuple(int(part[1:-1]) if part.startswith("[") else part for part in re.findall(r"\[\d+\]|[^.\[\]]+", key))
    if action == "remove":
        return Override(text, keys, action)
    try:
        # Parsed as OmegaConf parses a file: 1e-4 is a number, [a, b] a list.
        parsed: Any = OmegaConf.to_container(OmegaConf.create(f"value: {value}"), resolve=False)
        odd = _odd_number(f"value: {value}")
    except (yaml.YAMLError, OmegaConfBaseException, LookupError, TypeError, ValueError) as error:
        raise _refused(text, one_line(error)) from None
    if len(parsed) > 1:  # after a line break
        raise _refused(text, "it holds more than one value")
    if odd:
        raise _refused(text, odd[1])
    return Override(text, keys, action, parsed["value"])


def assemble(
    files: Sequence[dict[str, Any]], overrides: Sequence[Override], leftovers: Leftovers | None = None
) -> dict[str, Any]:
    """The values that files (extended ones first) and overrides give together.

    leftovers: the sections whose name decides which other keys they have. Raises UserError for an override that cannot
    be applied.
    """
    values: dict[str, Any] = {}
    for file in files:
        values = _without_leftovers(values, _merged(values, file), list(_leaves(file)), leftovers or {})
    changed = copy.deepcopy(values)
    for override in overrides:
        _apply(changed, override)
    return _without_leftovers(values, changed, [override.keys for override in overrides], leftovers or {})


def resolve(values: dict[str, Any], place: str) -> Any:
    """The values with their interpolations (`${run.dir}`) replaced. Raises UserError, naming `place`, if one fails."""
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(values), resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{place} does not resolve with its overrides: {one_line(error)}") from None
    if missing := [key for key, value in flat(resolved) if value == "???"]:
        raise UserError(f"{place}: {', '.join(missing)} is ???, which stands for a missing value: give it")
    return resolved


def _merged(base: dict[str, Any], extension: dict[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(base)
    for key, value in extension.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else copy.deepcopy(value)
    return merged


def _leaves(values: dict[str, Any]) -> Iterator[Keys]:
    """The places of all values that are no mappings."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from ((key, *rest) for rest in _leaves(value))
        else:
            yield (key,)


def _without_leftovers(
    before: dict[str, Any], after: dict[str, Any], named: Sequence[Keys], leftovers: Leftovers
) -> dict[str, Any]:
    """`after` without the keys of an earlier name in `before`, except those that the layer itself has `named`."""
    for place, belonging in leftovers.items():
        section, old = _at(after, place), _at(before, place)
        if not isinstance(section, dict) or not isinstance(old, dict) or section.get("name") == old.get("name"):
            continue
        dropped = []
        for keys in belonging(section):
            if not any(_one_holds_the_other((*place, *keys), other) for other in named):
                del _at(section, keys[:-1])[keys[-1]]
                dropped.append(".".join((*place, *keys)))
        if dropped:
            name = ".".join(place)
            logger.info("%s.name is now %s: dropped %s", name, section.get("name"), ", ".join(dropped))
    return after


def _at(values: Any, place: Sequence[str]) -> Any:
    for key in place:
        values = values.get(key) if isinstance(values, dict) else None
    return values


def _one_holds_the_other(one: Keys, other: Keys) -> bool:
    return all(a == b for a, b in zip(one, other, strict=False))


def _apply(values: dict[str, Any], override: Override) -> None:
    *outer, last = override.keys
    container: Any = values
    for number, key in enumerate(outer, 1):
        below = _child(container, key, override, number)
        if below is None:  # not set, or null: what is below starts from the defaults
            if override.action == "remove":
                raise _refused(override.text, f"{dotted(override.keys[:number])} is not set")
            container[_index(container, key)] = below = {}
        container = below
    if override.action == "remove":
        _child(container, last, override, len(override.keys))
        if isinstance(container, dict) and last not in container:
            raise _refused(override.text, f"{dotted(override.keys)} is not set, so there is nothing to remove")
        del container[_index(container, last)]
        return
    current = _child(container, last, override, len(override.keys))
    if override.action == "replace":
        container[_index(container, last)] = override.value
        return
    if current is not None and not isinstance(current, list):
        raise _refused(override.text, f"{dotted(override.keys)} is {current!r} and no list")
    added = override.value if isinstance(override.value, list) else [override.value]
    container[_index(container, last)] = [*(current or []), *added]


def _child(container: Any, key: str | int, override: Override, number: int) -> Any:
    """The value of the `number`-th key of an override, None if there is none. UserError if there can be none."""
    place = dotted(override.keys[: number - 1])
    if isinstance(container, list):
        index = _index(container, key)
        if not isinstance(index, int):
            raise _refused(override.text, f"{place} is a list: give the number of an item, for example {place}[0]")
        if index >= len(container):
            items = f"{len(container)} item{'s' if len(container) != 1 else ''}, counted from 0"
            raise _refused(override.text, f"{place} has {items}; {place}+=VALUE appends one")
        return container[index]
    if not isinstance(container, dict):
        short = f": give all of it, {place}={{{key}: VALUE, ...}}" if isinstance(container, str) else ""
        raise _refused(override.text, f"{place} is {container!r} and has no keys{short}")
    if isinstance(key, int):
        raise _refused(override.text, f"{place} is no list")
    return container.get(key)


def _index(container: Any, key: str | int) -> str | int:
    """data.train.0 means data.train[0]."""
    return int(key) if isinstance(container, list) and isinstance(key, str) and key.isdecimal() else key


def _refused(text: str, cause: str) -> UserError:
    cause = cause.replace("\n", "\\n")  # of a key
    return UserError(f"override {text!r} cannot be applied: {cause}")
