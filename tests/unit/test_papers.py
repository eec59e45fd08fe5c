"""Every command of docs/papers.md: its options, keys and values are right, and what it reads is written by another."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from atr_scale.config import RunConfig
from atr_scale.experiments.grid import parse_arguments, run_names
from atr_scale.planner.dry_run import dry_run
from tests.commands import ROOT, configuration, parse, sweep
from tests.recipes import small_world
from tools.bench import __main__ as bench
from tools.study import __main__ as study
from tools.study import report

PAGE = ROOT / "docs" / "papers.md"
PROGRAMS = ("atr-scale ", "python -m ", "launch/")
OVERRIDE = re.compile(r"'?~?[a-z_]+\.[a-z_.\[\]0-9]+=")
LIST = re.compile(r"'?[a-z_.0-9\[\]]+=\[")


class Row(NamedTuple):
    """A row of the page: its question, its command ("not yet" if there is none), all commands and variants in it."""

    question: str
    command: str
    commands: list[str]
    variants: list[str]


def rows() -> Iterator[Row]:
    for line in PAGE.read_text().splitlines():
        if not line.startswith("| ") or line.startswith("| mechanism"):
            continue
        question, command, _ = (cell.strip() for cell in line.strip("|").split("|"))
        spans = re.findall(r"`([^`]+)`", line)
        commands = [span for span in spans if span.startswith(PROGRAMS)]
        yield Row(question, command.strip("`"), commands, [span for span in spans if OVERRIDE.match(span)])


ROWS = list(rows())
COMMANDS = list(dict.fromkeys(command for row in ROWS for command in row.commands))
TRAININGS = [command for command in COMMANDS if command.startswith("atr-scale train ")]
RUNS = [row for row in ROWS if row.command.startswith(("atr-scale train ", "atr-scale sweep "))]


def runs(command: str) -> list[RunConfig]:
    """The configurations that a command trains."""
    return sweep(command) if command.startswith("atr-scale sweep ") else [configuration(command)]


def with_variant(command: str, variant: str) -> str:
    """The command with a variant of its row: a list replaces all lists of a sweep, a value the list of the same key."""
    words, changed = shlex.split(command), {word.partition("=")[0] for word in shlex.split(variant)}
    if words[1] == "sweep":
        replaced = LIST.match(variant) is not None
        words = [
            w
            for w in words
            if not LIST.match(w) or w.count("[") > 1 or not (replaced or w.partition("=")[0] in changed)
        ]
    return f"{shlex.join(words)} {variant}"


def test_every_row_has_a_command_or_says_not_yet() -> None:
    assert len(ROWS) > 50
    for row in ROWS:
        assert row.command == "not yet" or row.command in row.commands, row.question


def test_every_recipe_of_a_paper_has_its_row() -> None:
    recipes = {path.relative_to(ROOT).as_posix() for path in (ROOT / "configs" / "papers").rglob("*.yaml")}
    assert recipes <= {word for command in TRAININGS for word in command.split()}


@pytest.mark.parametrize("command", COMMANDS)
def test_command_is_right(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if command.startswith("atr-scale "):
        verb, _ = parse(command)
        if verb in ("train", "plan", "sweep"):
            assert runs(command)
        return
    words = shlex.split(command)
    if command.startswith("launch/"):
        assert os.access(ROOT / words[0], os.X_OK)
        return
    assert words[:2] == ["python", "-m"] and words[2] in ("tools.study", "tools.bench")
    if words[2] == "tools.study":
        monkeypatch.setattr(study, "run", lambda *_: True)
        monkeypatch.setattr(report, "write_page", lambda *_: None)
        assert study.main(words[3:]) == 0
    else:
        assert words[3:] and set(words[3:]) <= set(bench.NAMES)


@pytest.mark.parametrize("row", [row for row in ROWS if row.variants], ids=lambda row: row.question)
@pytest.mark.slow
def test_variants_are_right(row: Row) -> None:
    for variant in row.variants:
        assert runs(with_variant(row.commands[0], variant)) != runs(row.commands[0])


def test_trainings_write_to_folders_of_their_own_and_others_read_from_these() -> None:
    configurations = [configuration(command) for command in TRAININGS]
    folders = [config.run.dir for config in configurations]
    sweeps = [parse(row.command)[1] for row in RUNS if row.command.startswith("atr-scale sweep ")]
    assert all(given["out"] for given in sweeps)
    folders += [f"{given['out']}/{name}" for given in sweeps for name in run_names(parse_arguments(given["grid"])[0])]
    assert len(set(folders)) == len(folders)
    starts = (config.train.initial_checkpoint for config in configurations)
    read = {start.from_.removesuffix("/best") for start in starts if start}
    tables = set()
    for command in COMMANDS:
        if command.startswith("atr-scale evaluate "):
            given = parse(command)[1]
            read |= {given["run"], given["candidates"]} - {None}
        elif command.startswith(("atr-scale estimate ", "atr-scale compare ")):
            given = parse(command)[1]
            read |= set(map(str, given["runs"]))
            if "estimate" in command:
                tables |= {f"{given['out']}/{Path(run).name}.safetensors" for run in given["runs"]}
    assert read <= set(folders)
    assert {table.path for config in configurations for table in config.objective.distillation.tables} <= tables


@pytest.fixture(scope="module")
def started() -> set[str]:
    """What has been dry-run already."""
    return set()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with small_world(tmp_path_factory.mktemp("world")) as folder:
        yield folder


@pytest.mark.slow
@pytest.mark.parametrize("row", RUNS, ids=lambda row: row.question)
@pytest.mark.usefixtures("world")
def test_a_row_can_be_started_with_its_variants(row: Row, started: set[str]) -> None:
    """Small encoders with the names and options of the large ones: models are built, tables and first weights read."""
    commands = [*row.commands, *(with_variant(row.command, variant) for variant in row.variants)]
    for command in commands:
        if command.startswith(("atr-scale train ", "atr-scale sweep ")):
            for config in runs(command):
                built = repr(
                    (config.model, config.data, config.objective.distillation, config.train.initial_checkpoint)
                )
                if built not in started:  # rows that differ in rates and weights of losses build one model
                    assert "memory " in dry_run(config, world_size=1)
                    started.add(built)
