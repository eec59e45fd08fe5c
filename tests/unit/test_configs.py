"""Every YAML file that is shipped parses, and every configuration can be planned for real."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from atr_scale.cli import app
from atr_scale.config import RunConfig, load_config
from atr_scale.train import train_rank
from tests.tiny import TinyInputs, make_tiny_inputs

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
YAML_FILES = [*CONFIGS, *sorted((ROOT / "launch").rglob("*.yaml"))]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyInputs:
    return make_tiny_inputs(tmp_path_factory.mktemp("tiny"))


def on_tiny_inputs(config: RunConfig, tiny: TinyInputs) -> list[str]:
    """Overrides that leave all of a configuration but its inputs, which are put in the place of those it names."""
    data = config.data
    overrides = [f"data.train[{n}].shards={tiny.shards}" for n in range(len(data.train))]
    overrides += [f"data.{split}={tiny.shards}" for split in ("validation", "test") if getattr(data, split)]
    if config.objective.distillation.tables:
        overrides += ["objective.distillation={weight: 0, tables: []}", "objective.nt_xent.weight=1"]
    if config.data.augmented_captions:
        overrides.append("data.augmented_captions=0")
    overrides += ["model.audio.checkpoint=null", "train.initial_checkpoint=null"]
    return [*overrides, f"model.text.name={tiny.text_encoder}"]


def test_there_are_configurations() -> None:
    papers = ("tap_pmr", "lgmm_cmsc", "estimated_correspondences", "co_attention")
    runs = ("quickstart/pretrain", "pretrain_wavcaps", "finetune_clotho", "finetune_audiocaps")
    expected = {f"configs/{stem}.yaml" for stem in (*runs, *(f"papers/{paper}" for paper in papers))}
    assert expected <= {name(path) for path in CONFIGS}


@pytest.mark.parametrize("path", YAML_FILES, ids=name)
def test_yaml_is_valid(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text()), dict)


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_configuration_parses_and_keeps_to_the_run_folder(path: Path) -> None:
    config = load_config(path)
    assert config.run.dir.startswith("runs/")
    places = [source.shards for source in config.data.train]
    assert not any(place.startswith("/") for place in [*places, config.model.text.name]), "a path of one machine"


@pytest.mark.parametrize("world_size", [1, 2, 8])
@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_configuration_can_be_planned(
    path: Path, world_size: int, tiny: TinyInputs, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(path)
    command = ["train", str(path), *on_tiny_inputs(config, tiny), "--dry-run", "--world-size", str(world_size)]
    app(command, standalone_mode=False)
    printed = capsys.readouterr().out
    for line in ("model ", "memory ", "batch ", "steps ", "train "):
        assert f"\n{line}" in f"\n{printed}", printed
    assert f"{config.train.global_batch_size} pairs a loss" in printed


def test_a_mistake_in_a_configuration_ends_with_2_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "typo.yaml"
    path.write_text((ROOT / "configs/quickstart/pretrain.yaml").read_text().replace("epochs:", "epoch:"))
    monkeypatch.setattr(sys, "argv", ["train", str(path), "--dry-run"])
    with pytest.raises(SystemExit) as left:
        train_rank()
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "'train.epoch'" in line and "did you mean 'train.epochs'" in line


def accelerate_settings(file: str) -> dict:
    return yaml.safe_load((ROOT / "launch/accelerate" / file).read_text())


@pytest.mark.parametrize("file", ["cpu.yaml", "one_node.yaml", "many_nodes.yaml"])
def test_accelerate_only_starts_processes(file: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    settings = accelerate_settings(file)
    parsed = load_config_from_file(str(ROOT / "launch/accelerate" / file))
    assert parsed.distributed_type == "DEEPSPEED", "any other type starts one process on a CPU"
    assert "mixed_precision" not in settings, "the run's configuration decides"
    assert settings["num_processes"] % settings["num_machines"] == 0
