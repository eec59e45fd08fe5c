"""The examples of docs/extending.md, as far as tests/integration/test_extending.py does not run them."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from atr_scale.cli import app, main
from atr_scale.config import load_config
from atr_scale.encoders import AUDIO_ENCODERS, build_audio_encoder
from atr_scale.losses import LOSS_TERMS, build_objective
from atr_scale.scorers import SCORERS, build_scorer
from tests.commands import ROOT
from tests.sequences import random_sequence
from tests.tiny import make_tiny_inputs

PAGE = ROOT / "docs" / "extending.md"
MODULES = {
    "A loss": "my_losses",
    "A pooling scorer": "my_pooling",
    "An audio encoder": "my_audio",
    "A figure": "my_figure",
    "A verb": "my_verb",
}


def section(title: str) -> str:
    parts = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)
    (found,) = (part for part in parts if part.startswith(f"{title}\n"))
    return found


def example(title: str) -> str:
    block = re.search(r"```python\n(.*?)```", section(title), re.DOTALL)
    assert block is not None, title
    return block[1]


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The examples as modules, which are gone again after the test."""
    tables: list[dict[str, Any]] = [LOSS_TERMS, AUDIO_ENCODERS, SCORERS]
    before = [dict(table) for table in tables]
    verbs = list(app.registered_commands)
    for title, module in MODULES.items():
        (tmp_path / f"{module}.py").write_text(example(title))
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)
    app.registered_commands[:] = verbs
    for name in MODULES.values():
        sys.modules.pop(name, None)


def test_the_files_to_change_exist() -> None:
    rows = [line.split("|")[1:4] for line in PAGE.read_text().splitlines() if line.startswith("| [")]
    assert len(rows) == 9
    for link, _, files in rows:
        assert section(re.findall(r"\[(.*?)\]", link)[0].capitalize())
        for path in re.findall(r"`(.*?)`", files):
            assert (ROOT / path).exists() or ("NAME" in path and (ROOT / path).parent.is_dir()), path


def test_the_command_trains_with_the_new_loss_alone() -> None:
    shown = re.search(r"^ {4}PYTHONPATH=.*\\\n.*$", section("A loss"), re.MULTILINE)
    assert shown is not None
    words = shlex.split(shown[0].replace("\\\n", " "))
    assert words[1:3] == ["atr-scale", "train"]
    config = load_config(ROOT / words[3], words[4:])
    assert list(build_objective(config.objective.terms).terms) == ["margin"]
    assert config.train.steps == 10 and config.run.dir == "runs/margin"


def test_the_audio_encoder_stays_on_the_device_of_its_input() -> None:
    __import__("my_audio")
    encoder = build_audio_encoder("frames", width=320).to("meta")
    encoded = encoder.encode(torch.zeros(2, 1600, device="meta"))
    assert {tensor.device.type for tensor in encoded} == {"meta"}


def test_the_pooling_scorer_is_a_dual_encoder_between_mean_and_maximum() -> None:
    __import__("my_pooling")
    text, audio = random_sequence([2, 3, 1], 8, 0), random_sequence([4, 2], 8, 1)
    audio = audio._replace(tokens=0.5 + 0.5 * audio.tokens.sigmoid())
    text, audio = text.map(torch.Tensor.float, torch.Tensor.float), audio.map(torch.Tensor.float, torch.Tensor.float)
    for power, name in ((1.0, "mean"), (60.0, "max")):
        gem, known = build_scorer("gem", dim=8, power=power), build_scorer(name, dim=8)
        assert gem.is_dual_encoder
        torch.testing.assert_close(gem.scores(text, audio), known.scores(text, audio), atol=2e-2, rtol=0)
        torch.testing.assert_close(gem.block(text, audio).local(), gem.scores(text, audio))
    assert load_config(ROOT / "configs/quickstart/pretrain.yaml", ["model.scorer={name: gem}"]).model.scorer.options


def test_the_figure_draws_what_the_log_holds() -> None:
    lines = [{"step": step, "temperature": 0.07 - 0.001 * step} for step in range(5)]
    (axes,) = __import__("my_figure").temperature(lines).axes
    assert axes.lines[0].get_ydata().tolist() == [line["temperature"] for line in lines]


def test_the_verb_counts_and_shows_its_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = make_tiny_inputs(tmp_path, clips=3)
    __import__("my_verb")
    app(["count", str(inputs.shards)], standalone_mode=False)
    assert capsys.readouterr().out == "3\n"
    with pytest.raises(SystemExit) as left:
        main(["count", str(tmp_path / "nothing")])
    assert left.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
    verb: Any = typer.main.get_command(app)
    shown = verb.commands["count"].get_help(verb.commands["count"].make_context("count", ["shards"]))
    assert "atr-scale count shards/clotho/train" in [line.strip() for line in shown.splitlines()]
