"""Plug-ins in configurations: a loss term that a module outside of the package adds, with its own keys."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from atr_scale.config import load_config, parse_config
from atr_scale.errors import UserError
from atr_scale.losses import LOSS_TERMS, build_objective

MODULE = """
from pydantic import Field
from torch import Tensor

from atr_scale.losses import LOSS_TERMS, LossTerm, TermSection
from atr_scale.sections import Positive


class MineSection(TermSection):
    sharpness: Positive = Field(2.0)


class Mine(LossTerm):
    Section = MineSection

    def dense(self, scores: Tensor) -> Tensor:
        return scores.square().mean()


LOSS_TERMS["mine"] = Mine
"""
VALUES = {
    "run": {"dir": "runs/x"},
    "data": {"train": [{"shards": "a"}]},
    "model": {"audio": {"name": "small_cnn"}, "text": {"name": "bert"}},
    "train": {"steps": 10},
}


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module with a term, which is gone again after the test."""
    before = dict(LOSS_TERMS)
    (tmp_path / "my_losses.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_losses"
    sys.modules.pop("my_losses", None)
    LOSS_TERMS.clear()
    LOSS_TERMS.update(before)


def write(folder: Path, **more: object) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({**VALUES, **more}))
    return path


def test_a_term_of_a_plug_in_has_keys_of_its_own(tmp_path: Path, module: str) -> None:
    path = write(tmp_path, plugins=[module])
    config = load_config(
        path, ["objective.nt_xent.weight=0", "objective.mine.weight=0.5", "objective.mine.sharpness=3"]
    )
    assert config.objective.terms["mine"].model_dump() == {"weight": 0.5, "sharpness": 3.0}
    assert list(build_objective(config.objective.terms).terms) == ["mine"]
    saved = tmp_path / "saved.yaml"
    saved.write_text(config.to_yaml())
    assert load_config(saved).model_dump() == config.model_dump()
    assert load_config(path).objective.terms["mine"].weight == 0, "off unless asked for"
    del LOSS_TERMS["mine"]
    assert "mine" not in load_config(write(tmp_path)).objective.terms


def test_the_example_of_the_documents_runs(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()
    (tmp_path / "my_losses.py").write_text(text.split("```python\n")[1].split("```")[0])
    margin = ["objective.margin.weight=1", "objective.margin.margin=0.5"]
    config = load_config(write(tmp_path), ["plugins=[my_losses]", *margin])
    term = LOSS_TERMS["margin"](config.objective.terms["margin"])
    scores, itself = torch.tensor([[0.9, 0.2], [0.8, 0.5]]), torch.eye(2, dtype=torch.bool)
    # 0.5 + 0.8 - 0.5 for the second text, 0.5 + 0.8 - 0.9 for the first audio, 0.5 + 0.2 - 0.5 for the second one.
    assert term.dense(scores, itself).item() == pytest.approx((0.8 + 0.4 + 0.2) / 4)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.mine.sharpnes=1", "unknown key 'objective.mine.sharpnes'; did you mean 'sharpness'?"),
        ("objective.minne.weight=1", "unknown key 'objective.minne'; did you mean 'mine'?"),
        ("objective.mine.sharpness=-1", "'objective.mine.sharpness': Input should be greater than 0, got -1"),
        ("objective.nt_xent.weight=0", "no loss term has a positive weight: give one to nt_xent, pmr, cmsc, intra_mod"),
        ("plugins=[my_loses]", "my_loses"),
        ("plugins=my_losses", "'plugins': Input should be a valid list, got 'my_losses'"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, module: str, override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(write(tmp_path), [f"plugins=[{module}]", override])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_modules_that_a_stranger_names_are_not_imported(tmp_path: Path, module: str) -> None:
    """A checkpoint's configuration may name code; whoever loads it says whether it may run."""
    path = write(tmp_path, plugins=[module])
    with pytest.raises(UserError, match="needs the plug-ins my_losses: if you trust them"):
        load_config(path, trusted=False)
    assert module not in sys.modules
    assert "mine" in load_config(path, plugins=[module], trusted=False).objective.terms


def test_a_term_may_replace_one_but_not_another_key(module: str) -> None:
    __import__(module)
    LOSS_TERMS["pmr"] = LOSS_TERMS["mine"]
    config = parse_config({**VALUES, "objective": {"pmr": {"sharpness": 4}}}, "here")
    assert config.objective.terms["pmr"].model_dump() == {"weight": 0.0, "sharpness": 4.0}
    LOSS_TERMS["temperature"] = LOSS_TERMS["mine"]
    with pytest.raises(UserError, match="a loss term cannot be called 'temperature'"):
        parse_config(VALUES, "here")
