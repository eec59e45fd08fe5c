"""Starting from another run takes over weights, never settings, and says which."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from atr_scale.checkpoint import load_retriever
from atr_scale.config import RunConfig, parse_config
from atr_scale.distributed.world import World
from atr_scale.encoders import build_audio_encoder, build_text_encoder
from atr_scale.errors import UserError
from atr_scale.model import Retriever
from atr_scale.planner.dry_run import dry_run
from atr_scale.scorers import SCORERS
from atr_scale.training.initial_weights import InitialWeights
from atr_scale.training.parts import new_model
from tests.tiny_run import save_run, tiny_config

SMALL: dict[str, dict[str, Any]] = {
    "pooled": {},
    "meanmax": {},
    "netrvlad": {"num_clusters": 2},
    "tap": {"attention_dim": 8},
    "lgmm": {},
    "coattention": {"depth": 1, "width": 8, "heads": 2, "ffn_width": 8, "joint": 8},
}
CARRIED = ("audio_encoder", "text_encoder", "audio_projection", "text_projection")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("initial")
    tiny_config(folder, folder / "run")
    return folder


def configured(folder: Path, scorer: str = "meanmax", initial: Any = None, **sections: Any) -> RunConfig:
    """The tiny run with a scorer, an initial checkpoint, and further keys of the sections model and objective."""
    values = yaml.safe_load(tiny_config(folder, folder / "run").to_yaml())
    values["model"]["scorer"] = {"name": scorer, "options": SMALL[scorer]}
    values["train"]["initial_checkpoint"] = initial
    for name, section in sections.items():
        values[name] |= section
    return parse_config(values, "here")


def first_run(place: Path, config: RunConfig, temperature: float = 0.2) -> str:
    """A run folder with one checkpoint, whose weights no other model has."""
    config = config.model_copy(deep=True)
    config.objective.temperature.initial = temperature
    run = save_run(config, place, seed=5)
    model = Retriever(config.model, config.objective)
    checkpoint = run / "checkpoints" / "step-3"
    (checkpoint / "config.resolved.yaml").write_text(config.to_yaml())
    save_file({key: value.clone() for key, value in model.state_dict().items()}, checkpoint / "model.safetensors")
    return str(run)


def start(config: RunConfig) -> tuple[Retriever, InitialWeights]:
    torch.manual_seed(0)
    model, report = new_model(config, World())
    assert report is not None
    return model, report


def equal(model: Retriever, run: str, part: str) -> bool:
    """Whether the model has the weights of the run in this part."""
    saved = load_file(Path(run) / "best" / "model.safetensors")
    own = {key: value for key, value in model.state_dict().items() if key.startswith(f"{part}.")}
    assert own.keys() == {key for key in saved if key.startswith(f"{part}.")}
    return all(torch.equal(value, saved[key]) for key, value in own.items())


def test_the_temperature_is_that_of_the_configuration(folder: Path, tmp_path: Path) -> None:
    """Stage 1 ends at 0.2, stage 2 asks for a fixed 0.05: its logits and its soft labels are divided by 0.05."""
    run = first_run(tmp_path / "run", configured(folder))
    fixed = {"temperature": {"initial": 0.05, "learnable": False}}
    model, report = start(configured(folder, initial=run, objective=fixed))
    assert model.temperature().item() == pytest.approx(0.05)
    assert all(equal(model, run, part) for part in CARRIED)
    assert report.new == {"temperature": "0.05"} and report.left_out == ["temperature"]
    assert load_retriever(run)[0].temperature().item() == pytest.approx(0.2), "a checkpoint is loaded with its own"

    named = {"from": run, "parts": ["temperature"]}
    model, report = start(configured(folder, initial=named, objective=fixed))
    assert model.temperature().item() == pytest.approx(0.2)
    assert list(report.taken) == ["temperature"] and not equal(model, run, "text_projection")


@pytest.mark.parametrize("other", ["tap", "lgmm", "coattention", "netrvlad"])
def test_encoders_and_projections_go_from_scorer_to_scorer(folder: Path, tmp_path: Path, other: str) -> None:
    for number, (first, second) in enumerate((("pooled", other), (other, "pooled"))):
        run = first_run(tmp_path / f"{number}", configured(folder, first))
        model, report = start(configured(folder, second, run))
        assert all(equal(model, run, part) for part in CARRIED)
        assert "scorer" not in report.taken
        assert ("scorer" in report.new) == any(True for _ in model.scorer.parameters())


def test_a_scorer_is_taken_if_it_is_the_same(folder: Path, tmp_path: Path) -> None:
    run = first_run(tmp_path / "run", configured(folder, "tap"))
    model, report = start(configured(folder, "tap", run))
    assert equal(model, run, "scorer") and "scorer" in report.taken

    wider = {"scorer": {"name": "tap", "options": {"attention_dim": 4}}}
    model, report = start(configured(folder, "tap", run, model=wider))
    assert report.new.keys() == {"scorer", "temperature"} and report.left_out == ["scorer", "temperature"]

    named = {"from": run, "parts": ["scorer"]}
    with pytest.raises(UserError) as caught:
        start(configured(folder, "tap", named, model=wider))
    message = str(caught.value)
    assert f"the scorer of {Path(run).resolve()}/checkpoints/step-3 does not fit this model (scorer." in message
    assert "is [8, 16], this model has [4, 16] and " in message and "\n" not in message


def test_one_encoder_is_taken_and_the_other_keeps_its_own_weights(folder: Path, tmp_path: Path) -> None:
    run = first_run(tmp_path / "run", configured(folder))
    torch.manual_seed(3)
    original = build_audio_encoder("tiny_cnn14").state_dict()
    weights = tmp_path / "tiny_cnn14.pt"
    torch.save({"model": original}, weights)
    audio = {"audio": {"name": "tiny_cnn14", "checkpoint": str(weights)}}

    with pytest.raises(UserError) as caught:
        start(configured(folder, initial=run, model=audio))
    assert "the audio_encoder of " in str(caught.value) and "\n" not in str(caught.value)
    assert f"train.initial_checkpoint={{from: {run}, parts: [text_encoder]}} leaves it out" in str(caught.value)

    model, report = start(configured(folder, initial={"from": run, "parts": ["text_encoder"]}, model=audio))
    assert equal(model, run, "text_encoder") and not equal(model, run, "text_projection")
    assert all(torch.equal(value, original[key]) for key, value in model.audio_encoder.state_dict().items())
    assert list(report.taken) == ["text_encoder"] and report.new["audio_encoder"] == str(weights)


def test_pretrained_weights_of_what_is_taken_are_not_read(folder: Path, tmp_path: Path) -> None:
    """Neither is a plug-in that only the other run needs, nor the folder that its text encoder came from."""
    moved = tmp_path / "text_encoder"
    shutil.copytree(configured(folder).model.text.name, moved)
    sections = {"text": {"name": str(moved), "pooling": "mean"}}
    run = first_run(tmp_path / "run", configured(folder, model=sections))
    place = Path(run) / "checkpoints" / "step-3" / "config.resolved.yaml"
    place.write_text(place.read_text().replace("plugins: []", "plugins: [not_installed]"))
    shutil.rmtree(moved)
    audio = {"audio": {"name": "small_cnn", "checkpoint": "nowhere.pt"}}
    model, report = start(configured(folder, initial=run, model=sections | audio))
    assert set(CARRIED) == set(report.taken) and equal(model, run, "text_encoder")


def test_another_text_encoder_of_the_same_size_is_built_from_its_own_files(folder: Path, tmp_path: Path) -> None:
    """The tokenizer is a setting: it is that of the configuration, not the one of the checkpoint."""
    run = first_run(tmp_path / "run", configured(folder))
    before_name, other = configured(folder).model.text.name, tmp_path / "other"
    shutil.copytree(before_name, other)
    text = (other / "tokenizer.json").read_text()
    low, soft = (re.search(f'"{word}": [0-9]+', text)[0] for word in ("low", "soft"))  # type: ignore[index]
    swapped = {low: f'"low": {soft.split()[1]}', soft: f'"soft": {low.split()[1]}'}
    (other / "tokenizer.json").write_text(re.sub("|".join(swapped), lambda found: swapped[found[0]], text))
    model, _ = start(configured(folder, initial=run, model={"text": {"name": str(other), "pooling": "mean"}}))
    found, asked, before = (
        encoder.tokenizer(["a low tone"], padding=False, truncation=True, max_length=9, return_tensors="pt")[
            "input_ids"
        ]
        for encoder in (model.text_encoder, build_text_encoder(other), build_text_encoder(before_name))
    )
    assert torch.equal(found, asked) and not torch.equal(asked, before)
    assert equal(model, run, "text_encoder")


def test_the_dry_run_and_the_log_say_what_is_taken(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    run = first_run(tmp_path / "run", configured(folder, "tap"))
    printed = dry_run(configured(folder, initial=run), 1)
    (line,) = (line for line in printed.splitlines() if line.startswith("initial "))
    for words in (f"from {Path(run).resolve()}/checkpoints/step-3: taken audio_encoder (", "text_projection (0.00 M)",
                  "new temperature (0.07); left out scorer, temperature"):  # fmt: skip
        assert words in line
    assert line.removeprefix("initial     ") in caplog.text


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"parts": ["scorer"]}, "'train.initial_checkpoint.from' is missing"),
        ({"from": "x", "parts": ["head"]}, "'train.initial_checkpoint.parts[0]': Input should be 'audio_encoder', "),
        ({"from": "x", "parts": []}, "'train.initial_checkpoint.parts': List should have at least 1 item"),
        ("", "'train.initial_checkpoint.from': String should have at least 1 character"),
        ({"fro": "x"}, "unknown key 'train.initial_checkpoint.fro'; did you mean 'train.initial_checkpoint.from'?"),
        (3, "'train.initial_checkpoint': Input should be a valid dictionary"),
    ],
)
def test_mistakes(folder: Path, value: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        configured(folder, initial=value)
    assert message in str(caught.value)


def test_it_goes_through_a_saved_configuration(folder: Path) -> None:
    config = configured(folder, initial={"from": "runs/a", "parts": ["scorer"]})
    assert parse_config(yaml.safe_load(config.to_yaml()), "saved") == config
    assert configured(folder, initial="runs/a") == configured(folder, initial={"from": "runs/a"})


def test_equal_shapes_of_another_scorer_are_a_coincidence(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SCORERS, "like_tap", SCORERS["tap"])
    run = first_run(tmp_path / "run", configured(folder, "tap"))
    like_tap = {"scorer": {"name": "like_tap", "options": SMALL["tap"]}}
    assert "scorer" in start(configured(folder, initial=run, model=like_tap))[1].new
