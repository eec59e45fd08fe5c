"""Plug-ins in configurations: a loss term that a module outside of the package adds, with its own keys."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from atr_scale.config import load_config, parse_config
from atr_scale.errors import UserError
from atr_scale.losses import LOSS_TERMS, LossTerm, TermSection, build_objective
from atr_scale.sections import Section

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
        (
            "objective.mine.sharpnes=1",
            "'objective.mine.sharpnes'; did you mean 'objective.mine.sharpness'?",
        ),
        ("objective.minne.weight=1", "unknown key 'objective.minne'; did you mean 'objective.mine'?"),
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


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("terms", "'terms', which is a method of sections"),
        ("has_a_term", "'has_a_term', which is a method of sections"),
        ("type", "'type', which means something else"),
        ("keys", "'keys', which means something else"),
        ("loss", "'loss', which means something else"),
        ("a.b", "'a.b': use letters, digits, _ and -"),
        ("_own", "'_own': use letters"),
        ("", "'': use letters"),
        (3, "3: use letters"),
    ],
)
def test_a_name_that_would_hide_something_is_refused(module: str, name: Any, message: str) -> None:
    __import__(module)
    LOSS_TERMS[name] = LOSS_TERMS["mine"]
    with pytest.raises(UserError) as caught:
        parse_config(VALUES, "here")
    assert f"a loss term cannot be called {message}" in str(caught.value)


@pytest.mark.parametrize("entry", [lambda section: None, torch.nn.Module])
def test_an_entry_that_is_no_term_is_refused(entry: Any) -> None:
    LOSS_TERMS["other"] = entry
    with pytest.raises(UserError, match=r"LOSS_TERMS\['other'\] is .*: give a subclass of LossTerm"):
        parse_config(VALUES, "here")


def test_a_term_in_the_place_of_the_default_one_needs_a_weight(module: str) -> None:
    __import__(module)
    LOSS_TERMS["nt_xent"] = LOSS_TERMS["mine"]  # its weight is 0 unless given
    with pytest.raises(UserError, match="here: 'objective': no loss term has a positive weight") as caught:
        parse_config(VALUES, "here")
    assert "\n" not in str(caught.value)
    config = parse_config({**VALUES, "objective": {"nt_xent": {"weight": 2}}}, "here")
    assert config.objective.terms["nt_xent"].model_dump() == {"weight": 2.0, "sharpness": 2.0}


def test_a_section_may_need_a_value() -> None:
    class NeedySection(TermSection):
        margin: float

    class Needy(LossTerm):
        Section = NeedySection

        @staticmethod
        def dense(scores: Tensor) -> Tensor:
            return scores.sum()

    assert Needy.inputs == ("scores",)
    LOSS_TERMS["needy"] = Needy
    with pytest.raises(UserError, match=r"here: 'objective\.needy\.margin' is missing"):
        parse_config(VALUES, "here")
    config = parse_config({**VALUES, "objective": {"needy": {"margin": 1}}}, "here")
    assert config.objective.terms["needy"].model_dump() == {"weight": 0.0, "margin": 1.0}


def test_a_term_without_formula_and_one_with_another_section_are_refused() -> None:
    class Bare(LossTerm):
        pass

    with pytest.raises(UserError, match="Bare has no method dense"):
        Bare(TermSection())
    with pytest.raises(UserError, match="give a subclass of TermSection"):
        type("Wrong", (LossTerm,), {"Section": Section, "dense": lambda self, scores: scores})


def test_a_scalar_parameter_is_refused_before_training() -> None:
    class Scaled(LossTerm):
        def __init__(self, section: TermSection) -> None:
            super().__init__(section)
            self.scale = nn.Parameter(torch.tensor(1.0))

        def dense(self, scores: Tensor) -> Tensor:
            return self.scale * scores.sum()

    LOSS_TERMS["scaled"] = Scaled
    with pytest.raises(UserError, match="loss term scaled has the scalar parameter scale: give it the shape"):
        build_objective({"scaled": TermSection(weight=1.0)})
