"""Every verb's --help: its examples can be copied and parse, and each option is described by a sentence."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from atr_scale.cli import app

STARTS = ("atr-scale ", "torchrun ")
ROOT: Any = typer.main.get_command(app)


def verbs(group: Any = ROOT, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from verbs(command, (*path, name))
        else:
            yield (*path, name)


def find(path: list[str]) -> tuple[Any, list[str]]:
    """The command at the beginning of a line, and the arguments that follow it."""
    command, rest = ROOT, path
    while hasattr(command, "commands"):
        assert rest and rest[0] in command.commands, f"no verb {' '.join(path)}"
        command, rest = command.commands[rest[0]], rest[1:]
    return command, rest


def examples(text: str) -> list[str]:
    """The commands of a help text; a line that ends in a backslash goes on in the next."""
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines()]
    return [" ".join(line.split()) for line in lines if line.startswith(STARTS)]


def parse(line: str) -> None:
    words = shlex.split(line)
    if words[0] == "torchrun":
        module = words.index("-m") + 1
        words = words[module:] if words[module] == "atr_scale.cli" else ["", "train", *words[module + 1 :]]
    command, arguments = find(words[1:])
    command.make_context(words[1], arguments)


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("path", [(), *verbs()], ids=" ".join)
def test_examples_can_be_copied(path: tuple[str, ...], columns: int) -> None:
    shown = CliRunner().invoke(app, [*path, "--help"], terminal_width=columns)
    assert shown.exit_code == 0
    written = (find(list(path))[0] if path else ROOT).callback.__doc__
    found = examples(shown.output)
    assert found == examples(written) and found, "an example is missing, or wrapped"
    assert any(line.startswith(" ".join(("atr-scale", *path))) for line in found)
    assert all(len(line) <= columns for line in shown.output.splitlines())
    for line in found:
        parse(line)


@pytest.mark.parametrize("path", list(verbs()), ids=" ".join)
def test_verbs_and_options_are_described_by_sentences(path: tuple[str, ...]) -> None:
    command, _ = find(list(path))
    assert command.get_short_help_str(57).endswith(".") and "..." not in command.get_short_help_str(57)
    for parameter in command.params:
        text = parameter.help or ""
        assert text[:1].isupper() or text.startswith(("fp32", "YAML", "URL")), f"{parameter.name}: {text!r}"
        assert text.endswith(".") and len(text) < 130, f"{parameter.name}: {text!r}"


def test_an_example_with_an_unknown_verb_or_option_fails() -> None:
    parse("atr-scale evaluate runs/quickstart --split test")
    parse("torchrun --nproc-per-node 2 -m atr_scale.train run.yaml train.lr=1")
    with pytest.raises(AssertionError, match="no verb"):
        parse("atr-scale evaluates runs/quickstart")
    with pytest.raises(Exception, match="No such option"):
        parse("atr-scale evaluate runs/quickstart --splits test")
