"""`atr-scale train` and `python -m atr_scale.train`: one set of arguments, in any order."""

from __future__ import annotations

import errno
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import atr_scale.config
from atr_scale import cli
from atr_scale.config import RunConfig
from atr_scale.errors import UserError
from atr_scale.planner import dry_run
from atr_scale.teachers import estimate
from atr_scale.train import train_rank
from atr_scale.training import loop

CONFIG = str(Path(__file__).parents[2] / "configs/quickstart/pretrain.yaml")


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, int]]:
    """The learning rate and the ranks of every dry run, which reads nothing here."""
    found: list[tuple[float, int]] = []

    def note(config: RunConfig, world_size: int) -> str:
        found.append((config.train.lr, world_size))
        return "planned"

    monkeypatch.setattr(dry_run, "dry_run", note)
    return found


@pytest.mark.parametrize(
    "line",
    [
        "CONFIG --dry-run --world-size 2 train.lr=0.5",
        "CONFIG train.lr=0.5 --world-size=2 --dry-run",
        "--dry-run CONFIG --world-size 2 train.lr=0.5",
        "--world-size 2 CONFIG train.lr=1 --dry-run train.lr=0.5",
    ],
)
@pytest.mark.parametrize("launched", [False, True])
def test_options_and_overrides_in_any_order(
    line: str, launched: bool, planned: list[tuple[float, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = line.replace("CONFIG", CONFIG).split()
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments] if launched else ["atr-scale", "train", *arguments])
    with pytest.raises(SystemExit) as left:
        (train_rank if launched else cli.main)()
    assert left.value.code == 0 and planned == [(0.5, 2)]


@pytest.mark.parametrize("verb", ["train", "plan"])
@pytest.mark.parametrize(
    ("written", "hint"),
    [("--train.lr=1e-4", "write train.lr=1e-4"), ("--train.lr 1e-4", "write train.lr=VALUE")],
)
def test_an_override_like_an_option_gets_a_hint(verb: str, written: str, hint: str) -> None:
    with pytest.raises(UserError, match=f"no option --train.lr: .*{hint}$"):
        cli.app([verb, CONFIG, *written.split()], standalone_mode=False)


def test_other_options_are_refused_with_the_usage() -> None:
    result = CliRunner().invoke(cli.app, ["train", CONFIG, "--dryrun"])
    assert result.exit_code == 2 and "--dry-run" in result.stderr and "Usage" in result.stderr


def test_plugins_reach_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[Any, ...]] = []

    def refuse(path: str, overrides: Any, plugins: Any) -> RunConfig:
        given.append((path, list(overrides), list(plugins)))
        raise UserError("seen")

    monkeypatch.setattr(atr_scale.config, "load_config", refuse)
    for verb in ("train", "plan"):
        with pytest.raises(UserError, match="seen"):
            cli.app([verb, "a.yaml", "--plugins", "one", "x=1", "--plugins", "two.more"], standalone_mode=False)
    assert given == [("a.yaml", ["x=1"], ["one", "two.more"])] * 2


def test_plugins_reach_the_teachers(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(estimate, "write_teacher_tables", lambda runs, **options: given.update(options, runs=runs))
    cli.app(["estimate", "runs/a", "--shards", "s", "--out", "o", "--plugins", "one"], standalone_mode=False)
    assert given["runs"] == ["runs/a"] and list(given["plugins"]) == ["one"]


def test_a_broken_connection_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(config: RunConfig) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(loop, "train", broken)
    with pytest.raises(RuntimeError, match="connection of training broke"):
        cli.app(["train", CONFIG])


def test_help_has_an_example() -> None:
    result = CliRunner().invoke(cli.app, ["train", "--help"])
    assert result.exit_code == 0
    for word in ("  atr-scale train", "--dry-run", "--world-size", "--plugins", "key.sub=value"):
        assert word in result.stdout


@pytest.mark.parametrize(
    ("variables", "rank", "level"),
    [
        ({}, "rank 0", logging.INFO),
        ({"RANK": "1", "SLURM_PROCID": "0"}, "rank 1", logging.WARNING),
        ({"SLURM_PROCID": "3"}, "rank 3", logging.WARNING),
    ],
)
def test_a_rank_says_which_it_is(
    variables: dict[str, str],
    rank: str,
    level: int,
    planned: list[tuple[float, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first call of `basicConfig` counts: it is that of the module, not that of the console script."""
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(logging, "basicConfig", lambda **settings: calls.append(settings))
    monkeypatch.setattr(sys, "argv", ["train.py", CONFIG, "--dry-run"])
    with pytest.raises(SystemExit):
        train_rank()
    assert calls[0]["level"] == level and rank in calls[0]["format"] and len(planned) == 1
    assert calls[0]["format"].startswith("%(asctime)s")


@pytest.mark.parametrize(("rank", "start"), [("0", "%(asctime)s"), ("1", "\r\033[K%(asctime)s")])
def test_other_ranks_clear_the_bar_of_the_first_one(
    rank: str, start: str, planned: list[tuple[float, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(logging, "basicConfig", lambda **settings: calls.append(settings))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(sys, "argv", ["train.py", CONFIG, "--dry-run"])
    with pytest.raises(SystemExit):
        train_rank()
    assert calls[0]["format"].startswith(start)
