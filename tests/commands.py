"""Checks commands of documents without running them: verbs, options, configuration keys."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import typer

from atr_scale.cli import app
from atr_scale.config import RunConfig, load_config
from atr_scale.experiments.grid import combinations, parse_arguments

ROOT = Path(__file__).parents[1]


def parse(command: str) -> tuple[str, dict[str, Any]]:
    """The verb and the arguments of an `atr-scale` command; raises if the command line would refuse them."""
    found: Any = typer.main.get_command(app)
    _, *words = shlex.split(command, comments=True)
    while hasattr(found, "commands"):
        assert words and words[0] in found.commands, f"no verb in {command}"
        found = found.commands[words.pop(0)]
    return str(found.name), dict(found.make_context(found.name, words).params)


def configuration(command: str) -> RunConfig:
    """The configuration of an `atr-scale train` or `plan` command with its overrides."""
    verb, given = parse(command)
    assert verb in ("train", "plan"), f"{command} has no configuration"
    return load_config(ROOT / given["config"], given["overrides"] or ())


def sweep(command: str) -> list[RunConfig]:
    """The configurations of all runs of an `atr-scale sweep` command."""
    verb, given = parse(command)
    assert verb == "sweep"
    axes, shared = parse_arguments(given["grid"] or ())
    grid = [[f"{key}={value}" for key, value in values.items()] for values in combinations(axes)]
    return [load_config(ROOT / given["config"], [*shared, *values]) for values in grid]
