"""The grid of a sweep: arguments of the command line, their combinations, and the names of the runs."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import yaml

from atr_scale.errors import UserError

UNSAFE = re.compile(r"[^\w.+-]+")
LONGEST_VALUE, LONGEST_NAME = 32, 100  # characters
SEED = "run.seed"


@dataclass(frozen=True)
class Axis:
    """A key and the values that it takes, as they were written."""

    key: str
    values: tuple[str, ...]


def parse_arguments(arguments: Sequence[str]) -> tuple[list[Axis], list[str]]:
    """(axes of the grid, overrides that all runs share). `key=[v1,v2]` is an axis, anything else an override.

    A value that is itself a list stands in the list: train.betas=[[0.9,0.98],[0.9,0.999]]. A list of one value is an
    override: [[0.9,0.98]] gives all runs this list. Raises UserError for an empty or damaged list, and for a key that
    is given twice.
    """
    axes, shared = [], []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if value.startswith("[") and not key.endswith("+"):
            values = _items(argument, value)
            if len(values) > 1:
                axes.append(Axis(key, values))
            else:
                shared.append(f"{key}={values[0]}")
        else:
            shared.append(argument)
    counts = Counter([axis.key for axis in axes] + [argument.partition("=")[0] for argument in shared])
    twice = [axis.key for axis in axes if counts[axis.key] > 1]
    if twice:
        raise UserError(f"{twice[0]} is given twice: give all of its values in one list")
    if any(axis.key == "run.dir" for axis in axes):
        raise UserError("run.dir is no key to sweep: the run folders are named by what differs, below --out DIR")
    return axes, shared


def _items(argument: str, text: str) -> tuple[str, ...]:
    """The items of a YAML list, as they were written."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise UserError(f"{argument!r} is no list: {' '.join(str(error).split())}") from None
    if not isinstance(node, yaml.SequenceNode) or not node.value:
        raise UserError(f"{argument!r} has no values: give a list of at least one, for example train.lr=[1e-4,3e-4]")
    return tuple(text[item.start_mark.index : item.end_mark.index].strip() for item in node.value)


def combinations(axes: Sequence[Axis]) -> list[dict[str, str]]:
    """The value of every key in every run; the last axis varies fastest."""
    return [
        dict(zip([axis.key for axis in axes], values, strict=True))
        for values in product(*(axis.values for axis in axes))
    ]


def run_names(axes: Sequence[Axis]) -> list[str]:
    """Names of the runs of `combinations` by their values, which are safe as names of folders.

    For example `lr=1e-4,scorer.name=tap,seed=0`.
    """
    short = _short_keys([axis.key for axis in axes])
    runs = combinations(axes)
    names = [",".join(f"{short[key]}={_readable(value)}" for key, value in values.items()) or "run" for values in runs]
    counts = Counter(name.lower() for name in names)  # some file systems do not tell upper from lower case
    return [
        name if counts[name.lower()] == 1 and len(name) <= LONGEST_NAME else _with_digest(name, values)
        for name, values in zip(names, runs, strict=True)
    ]


def _short_keys(keys: Sequence[str]) -> dict[str, str]:
    """The end of each key: without its section, and two parts at most, unless that is ambiguous."""
    short = {key: ".".join(key.split(".")[1:][-2:]) or key for key in keys}
    counts = Counter(short.values())
    return {key: UNSAFE.sub("-", end if counts[end] == 1 else key) for key, end in short.items()}


def _readable(value: str) -> str:
    """The end of a path, without characters that are unsafe in a file name."""
    text = UNSAFE.sub("-", value.strip(" \"'{}[]").rstrip("/").rpartition("/")[2]).rstrip("-")
    return text[:LONGEST_VALUE] or "empty"


def _with_digest(name: str, values: dict[str, str]) -> str:
    digest = hashlib.blake2b(repr(sorted(values.items())).encode(), digest_size=4).hexdigest()
    return f"{name[: LONGEST_NAME - len(digest) - 1]}-{digest}"
