"""atr-scale export: a folder that loads anywhere, says nothing of its machine, and has a card whose examples run."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from safetensors import SafetensorError, safe_open

import atr_scale
import atr_scale.export.folder
from atr_scale.config import load_config
from atr_scale.data.storage import read_bytes
from atr_scale.errors import UserError
from atr_scale.export.card import _value
from atr_scale.export.folder import export_run
from atr_scale.export.places import PublicNames, public_config
from atr_scale.run_checkpoints import verify
from tests.tiny_run import OVERRIDES, save_run, tiny_config

SECRET = "xyzzy-private-place"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a name that must not be told: inputs, run/ (trained, measured) and pairwise/ (tap, untrained)."""
    place = tmp_path_factory.mktemp("made") / SECRET
    config = tiny_config(place, place / "run", steps=2)
    arguments = [*OVERRIDES, f"data.validation={config.data.validation}"]
    command = [sys.executable, "-m", "atr_scale.train", str(place / "tiny.yaml"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    save_run(config, place / "pairwise", 0, "tap")
    return place


@pytest.fixture(scope="module")
def exported(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of run/, moved to another folder."""
    made = export_run(place / "run", tmp_path_factory.mktemp("out") / "quiet")
    assert [part.name for part in made.parts if not part.reason] == [
        "model",
        "onnx/text.onnx",
        "onnx/audio.onnx",
        "sentence-transformers",
    ]
    moved = tmp_path_factory.mktemp("moved") / "quiet"
    shutil.move(made.folder, moved)
    return moved


def clips(place: Path) -> list[Path]:
    return sorted((place / "train" / "corpus" / "audio").glob("*.wav"))[:2]


@pytest.mark.slow
def test_it_loads_elsewhere_with_equal_embeddings(place: Path, exported: Path) -> None:
    before, after = atr_scale.load(place / "run"), atr_scale.load(exported)
    assert np.array_equal(before.embed_text(["a low tone"]), after.embed_text(["a low tone"]))
    assert np.array_equal(before.embed_audio(clips(place)), after.embed_audio(clips(place)))
    assert verify(exported) == []
    again = export_run(exported, exported.with_name("again"), formats=["model"]).folder
    assert np.array_equal(atr_scale.load(again).embed_text(["a low tone"]), after.embed_text(["a low tone"]))
    with (exported / "text_encoder" / "config.json").open("a") as file:
        file.write(" ")
    with pytest.raises(UserError, match=r"text_encoder/config\.json has \d+ bytes instead of"):
        atr_scale.load(exported)
    (exported / "text_encoder" / "config.json").write_text((again / "text_encoder" / "config.json").read_text())


@pytest.mark.slow
def test_it_says_nothing_of_its_machine(place: Path, exported: Path) -> None:
    told = [SECRET, str(place.parent), str(Path.home()) + "/", os.getcwd(), f"{socket.gethostname()}."]
    files = [path for path in exported.rglob("*") if path.is_file()]
    assert len(files) > 8
    for path in files:
        content = read_bytes(str(path))
        assert not [word for word in told if word.encode() in content], path
    with safe_open(exported / "model.safetensors", "pt") as file:
        assert not file.metadata() or set(file.metadata()) <= {"format"}


@pytest.mark.slow
def test_the_card_is_complete_and_its_examples_run(place: Path, exported: Path) -> None:
    text = (exported / "README.md").read_text()
    data: Any = ModelCard(text, ignore_metadata_errors=False).data
    assert data.license == "unknown" and data.library_name == "atr-scale"
    assert any(result.metric_type == "t2a/R@1" for result in data.eval_results or ())
    assert "| corpus |  | 40 | 40 | 0.0 | none |" in text and "| R@1 | " in text and " [" in text
    work = exported.parent
    for name, clip in zip(("dog.wav", "rain.wav"), clips(place), strict=True):
        shutil.copyfile(clip, work / name)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    embed = [
        sys.executable,
        "-m",
        "atr_scale.cli",
        "embed",
        "quiet",
        str(clips(place)[0].parent),
        "--out",
        "sounds.npy",
    ]
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 5
    for command in (embed, *([sys.executable, "-c", block] for block in blocks)):
        done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_a_pairwise_model_exports_and_says_why_not_more(place: Path, tmp_path: Path) -> None:
    made = export_run(place / "pairwise", tmp_path / "two pairs")
    assert all("pairwise" in part.reason for part in made.parts[1:])
    text = (made.folder / "README.md").read_text()
    assert "No results of step 0 were there at the export" in text
    assert "similarity(" in text and "sounds.npy" not in text
    assert "train 'two pairs/config.resolved.yaml' run.dir=" in text
    with pytest.raises(UserError, match="is pairwise"):
        export_run(place / "pairwise", tmp_path / "more", formats=["sentence-transformers"])
    assert [path.name for path in tmp_path.iterdir()] == ["two pairs"]
    with pytest.raises(UserError, match="not an empty folder"):
        export_run(place / "pairwise", tmp_path / "two pairs")


@pytest.mark.slow
def test_places_that_would_be_taken_for_something_else_are_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="among the checkpoints of a run"):
        export_run(place / "pairwise", place / "pairwise" / "checkpoints" / "step-9")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(UserError, match="not an empty folder"):
        export_run(place / "pairwise", tmp_path / "link")


@pytest.mark.slow
def test_a_disk_that_is_full_only_for_a_library_is_one_line(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(atr_scale.export.folder, "export_text_tower", full)
    with pytest.raises(UserError, match=r"cannot write .*No space left on device"):
        export_run(place / "pairwise", tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_everybody_can_read_weights(place: Path, exported: Path) -> None:
    for path in (place / "run" / "best" / "model.safetensors", *exported.rglob("*.safetensors")):
        assert path.stat().st_mode == (place / "tiny.yaml").stat().st_mode, path


@pytest.mark.parametrize("name", ['a"b', "a'b", "a\\b", "a\nb"])
def test_names_that_the_examples_of_a_card_cannot_hold_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="without quotes"):
        export_run(tmp_path / "run", tmp_path / name)


def test_ranks_of_a_card_have_one_digit() -> None:
    assert _value("a2t/median_rank", {"value": 121.5, "low": 107.9875, "high": 135.0}) == "121.5 [108, 135]"


def test_places_become_names() -> None:
    root = Path(__file__).parents[2]
    config = load_config(
        root / "configs" / "finetune_clotho.yaml",
        [
            "data.train=[{shards: /home/me/a}, {shards: s3://bucket/b}]",
            "model.audio.checkpoint=/home/me/mn40_as_ext_mAP_487.pt",
            "model.text.name=/home/me/bert",
            "train.initial_checkpoint=/home/me/run",
        ],
    )
    text = public_config(config, PublicNames("new", {"/home/me/a": "clotho/development"}, {}))
    values = yaml.safe_load(text)
    assert "/home" not in text and "s3:" not in text
    assert values["data"]["train"][0]["shards"] == "clotho/development"
    assert values["data"]["train"][1]["shards"] == "not-exported"
    assert values["model"]["audio"]["checkpoint"] == "mn40" and values["model"]["text"]["name"] == "text_encoder"
    assert values["train"]["initial_checkpoint"]["from"] == "not-exported"
    config.model.text.name = "bert-base-uncased"
    assert "name: bert-base-uncased" in public_config(config, PublicNames("new", {}, {}))
