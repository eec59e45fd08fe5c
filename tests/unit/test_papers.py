"""Every command of docs/papers.md: its options, keys and values are right, and what it reads is written by another."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from atr_scale.cli import app
from tests.commands import ROOT, configuration, parse
from tests.tiny import TinyInputs, make_tiny_inputs
from tests.unit.test_configs import on_tiny_inputs
from tools.bench import __main__ as bench
from tools.study import __main__ as study
from tools.study import report

PAGE = ROOT / "docs" / "papers.md"
PROGRAMS = ("atr-scale ", "python -m ", "launch/")
OVERRIDE = re.compile(r"'?[a-z_]+\.[a-z_.\[\]0-9]+=")


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


def test_every_row_has_a_command_or_says_not_yet() -> None:
    assert len(ROWS) > 35
    for row in ROWS:
        assert row.command == "not yet" or row.command in row.commands, row.question


def test_every_recipe_of_a_paper_has_its_row() -> None:
    recipes = {path.relative_to(ROOT).as_posix() for path in (ROOT / "configs" / "papers").glob("*.yaml")}
    assert recipes <= {word for command in TRAININGS for word in command.split()}


@pytest.mark.parametrize("command", COMMANDS)
def test_command_is_right(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if command.startswith("atr-scale "):
        verb, _ = parse(command)
        if verb in ("train", "plan"):
            configuration(command)
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
def test_variants_are_right(row: Row) -> None:
    for variant in row.variants:
        configuration(f"{row.commands[0]} {variant}")


def test_trainings_write_to_folders_of_their_own_and_others_read_from_these() -> None:
    configurations = [configuration(command) for command in TRAININGS]
    folders = [config.run.dir for config in configurations]
    assert len(set(folders)) == len(folders)
    starts = (config.train.initial_checkpoint for config in configurations)
    read = {start.removesuffix("/best") for start in starts if start}
    tables = set()
    for command in COMMANDS:
        if command.startswith("atr-scale evaluate "):
            given = parse(command)[1]
            read |= {given["run"], given["candidates"]} - {None}
        elif command.startswith("atr-scale estimate "):
            given = parse(command)[1]
            read |= set(given["runs"])
            tables |= {f"{given['out']}/{Path(run).name}.safetensors" for run in given["runs"]}
    assert read <= set(folders)
    assert {table.path for config in configurations for table in config.objective.distillation.tables} <= tables


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyInputs:
    return make_tiny_inputs(tmp_path_factory.mktemp("tiny"))


@pytest.mark.slow
@pytest.mark.parametrize("command", TRAININGS)
def test_training_can_be_planned(command: str, tiny: TinyInputs, capsys: pytest.CaptureFixture[str]) -> None:
    """`--dry-run` on tiny shards and a tiny text encoder: the model is built, the schedule and the memory computed."""
    _, verb, config, *overrides = shlex.split(command)
    inputs = on_tiny_inputs(configuration(command), tiny)
    app([verb, str(ROOT / config), *overrides, *inputs, "--dry-run"], standalone_mode=False)
    assert "memory " in capsys.readouterr().out
