"""Which changes of its inputs a resumed run refuses, and which it does not notice or may make."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from atr_scale.config import RunConfig
from atr_scale.config_train import InitialCheckpoint
from atr_scale.data.options import TrainingSource
from atr_scale.data.shard_reader import open_shards
from atr_scale.data.stream import open_sources
from atr_scale.distributed.world import World
from atr_scale.errors import UserError
from atr_scale.losses.terms import TeacherTableSection
from atr_scale.run_files import CHANGED_DATA, read_json_lines
from atr_scale.teachers.tables import TeacherTable
from atr_scale.training.checks import differences
from atr_scale.training.fingerprints import INPUTS, of_shards, same_inputs, without_places
from tests.tiny_run import save_run, tiny_config


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    config = tiny_config(tmp_path, tmp_path / "run")
    (tmp_path / "run").mkdir()
    return config


def inputs(config: RunConfig, resume_from: Path | None = None) -> dict[str, Any]:
    sets = {name: open_shards(place) for name, place in config.data.validation_sets.items()}
    return same_inputs(config, open_sources(config.data), sets, World(), resume_from)


def saved(config: RunConfig, found: dict[str, Any] | None = None) -> Path:
    """A checkpoint that knows the inputs of the configuration."""
    folder = Path(config.run.dir) / "checkpoints" / "step-4"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"step": 4, INPUTS: inputs(config) if found is None else found}))
    return folder


def change_manifest(shards: str, **change: Any) -> None:
    path = Path(shards) / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["shards"][0].update(change)
    path.write_text(json.dumps(manifest))


def write_table(folder: Path, scores: float) -> None:
    ids = torch.arange(2)
    values = {"scores": torch.full((2, 2), scores, dtype=torch.float16)}
    TeacherTable("teacher", ids, ids.clone(), torch.zeros(2, dtype=torch.int64), values=values, metadata={}).save(
        folder
    )


def test_the_same_inputs_are_the_same(config: RunConfig) -> None:
    found = inputs(config)
    assert inputs(config, saved(config)) == found
    assert {"data.train[0].shards", "data.train[0].exclusions", "data.validation.validation", "model.text.name"} == {
        *found
    }
    assert all(each["fingerprint"] for each in found.values())


def test_changed_shards_are_refused_by_name(config: RunConfig) -> None:
    checkpoint = saved(config)
    change_manifest(config.data.train[0].shards, sha256="0" * 64)
    with pytest.raises(UserError, match=r"up to step 4: data\.train\[0\]\.shards \(.*shards\): restore it") as error:
        inputs(config, checkpoint)
    assert "validation" not in str(error.value)
    assert not (Path(config.run.dir) / CHANGED_DATA).exists()


def test_a_change_that_is_allowed_is_recorded_and_counts_from_then_on(
    config: RunConfig, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = saved(config)
    change_manifest(config.data.train[0].shards, bytes=10**6)
    config.run.allow_changed_data = True
    found = inputs(config, checkpoint)
    assert "from step 4 on the run reads other data than before: data.train[0].shards" in caplog.text
    (line,) = read_json_lines(Path(config.run.dir) / CHANGED_DATA)
    assert line["step"] == 4 and [*line["changed"]] == ["data.train[0].shards"]
    config.run.allow_changed_data = False
    shutil.rmtree(checkpoint)
    assert inputs(config, saved(config, found)) == found


def test_data_that_have_moved_are_the_same(config: RunConfig, tmp_path: Path) -> None:
    before, checkpoint = config.model_dump(mode="json"), saved(config)
    shutil.copytree(tmp_path / "train", tmp_path / "moved")
    config.data.train = [TrainingSource(shards=str(tmp_path / "moved" / "shards"))]
    config.model.text.name = str(tmp_path / "moved" / "text_encoder")
    inputs(config, checkpoint)
    now = config.model_dump(mode="json")
    assert len(differences(before, now)) == 2 and differences(without_places(before), without_places(now)) == []
    change_manifest(config.data.train[0].shards, sha256="0" * 64)
    with pytest.raises(UserError, match=r"data\.train\[0\]\.shards \(.*moved"):
        inputs(config, checkpoint)


def test_an_input_that_is_no_longer_given_is_another_configuration(config: RunConfig) -> None:
    before = config.model_dump(mode="json")
    config.model.audio.checkpoint = "cnn14.pth"
    assert differences(without_places(before), without_places(config.model_dump(mode="json"))) == [
        "model.audio.checkpoint was None, now given"
    ]


def test_other_validation_sets_may_be_named_but_not_put_in_place(config: RunConfig, tmp_path: Path) -> None:
    checkpoint, place = saved(config), config.data.validation
    assert isinstance(place, str)
    config.data.validation = config.data.train[0].shards
    inputs(config, checkpoint)
    config.data.validation = place
    change_manifest(place, sha256="0" * 64)
    with pytest.raises(UserError, match=r"data\.validation\.validation"):
        inputs(config, checkpoint)


def test_what_is_read_at_the_start_alone_may_be_gone(config: RunConfig, tmp_path: Path) -> None:
    save_run(config, tmp_path / "first", seed=0)
    config.train.initial_checkpoint = InitialCheckpoint.model_validate({"from": str(tmp_path / "first")})
    checkpoint = saved(config)
    found = inputs(config)
    shutil.rmtree(tmp_path / "train" / "text_encoder")
    (tmp_path / "first").rename(tmp_path / "gone")
    assert inputs(config, checkpoint) == found, "the next checkpoints know them too"
    (tmp_path / "gone").rename(tmp_path / "first")
    weights = tmp_path / "first" / "checkpoints" / "step-3" / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    with pytest.raises(UserError, match=r"train\.initial_checkpoint"):
        inputs(config, checkpoint)


def test_text_encoder_teachers_paraphrases_and_exclusions(config: RunConfig, tmp_path: Path) -> None:
    place = Path(config.data.train[0].shards)
    config.data.augmented_captions = 0.5
    (place / "captions.augmented.jsonl").write_text("{}\n")
    write_table(tmp_path, 0.5)
    distillation = config.objective.distillation
    distillation.weight = 1.0
    distillation.tables = [TeacherTableSection(path=str(tmp_path / "teacher.safetensors"))]
    checkpoint = saved(config)
    write_table(tmp_path, 0.25)
    with (place / "captions.augmented.jsonl").open("a") as file:
        file.write("{}\n")
    settings = tmp_path / "train" / "text_encoder" / "config.json"
    settings.write_text(settings.read_text() + " ")
    manifest = json.loads((place / "manifest.json").read_text())
    manifest["exclusions"] = [{"name": "list.csv", "sha256": "0"}]
    (place / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError) as error:
        inputs(config, checkpoint)
    for name in (
        "data.train[0].exclusions", "data.train[0].paraphrases", "model.text.name",
        "objective.distillation.tables[0].path",
    ):  # fmt: skip
        assert f"{name} (" in str(error.value)
    assert "[0].shards" not in str(error.value)


def test_an_older_checkpoint_goes_on_with_a_line(config: RunConfig, caplog: pytest.LogCaptureFixture) -> None:
    assert inputs(config, saved(config, {})) == inputs(config)
    assert "has no fingerprints of its data" in caplog.text


def test_shards_without_a_manifest(config: RunConfig) -> None:
    place = Path(config.data.train[0].shards)
    (place / "manifest.json").unlink()
    shards = open_shards(str(place))
    assert of_shards(shards) == of_shards(replace(shards, location="elsewhere"))
    for change in (
        {"keys": [*shards.keys[:-1], "other"]}, {"names": [*shards.names[:-1], "other.tar"]},
        {"stop": np.append(shards.stop[:-1], shards.stop[-1] + 512)},
    ):  # fmt: skip
        assert of_shards(replace(shards, **change)) != of_shards(shards)
