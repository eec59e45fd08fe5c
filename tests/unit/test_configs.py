"""Every YAML file that is shipped parses, and every recipe says what it quotes and can be started as it stands."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from atr_scale.cli import app
from atr_scale.config import RunConfig, load_config
from atr_scale.train import train_rank
from atr_scale.training.schedule import RunLength, run_length
from tests.commands import ROOT
from tests.recipes import CONFIGS, configurations, name, small_world

YAML_FILES = [*CONFIGS, *sorted((ROOT / "launch").rglob("*.yaml"))]
RECIPES = [path for path in CONFIGS if not {"quickstart", "esc50.yaml", "own_recordings.yaml"} & set(path.parts)]
STEPS = re.compile(r"^# Optimizer steps: (about )?([\d,]+) (in \[\w+\]|\[ours\])", re.MULTILINE)
# Clips and captions of each training split; AudioCaps as published, and as the papers could still download it.
SIZES = {"shards/clotho/train": (3_839, 5), "shards/wavcaps/train": (399_600, 1), "shards/audiocaps/train": (49_838, 1)}
DOWNLOADED = 49_274


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with small_world(tmp_path_factory.mktemp("world")) as folder:
        yield folder


def test_there_are_configurations() -> None:
    corpora = [f"{recipe}{corpus}" for recipe in ("tap_pmr", "lgmm_cmsc") for corpus in ("", "_clotho")]
    stages = [f"estimated_correspondences/stage{n}_{one}" for n in (1, 2) for one in ("passt", "atst", "mn")]
    networks = [
        f"co_attention/{one}{corpus}" for one in ("single", "stacking", "iterating") for corpus in ("", "_clotho")
    ]
    papers = [f"papers/{recipe}" for recipe in (*corpora, *stages, *networks)]
    runs = ("quickstart/pretrain", "pretrain_wavcaps", "finetune_clotho", "finetune_audiocaps")
    assert {f"configs/{stem}.yaml" for stem in (*runs, *papers)} <= {name(path) for path in CONFIGS}


@pytest.mark.parametrize("path", YAML_FILES, ids=name)
def test_yaml_is_valid(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text()), dict)


def test_configurations_keep_to_run_folders_of_their_own() -> None:
    folders = [config.run.dir for config in configurations().values()]
    assert len(set(folders)) == len(folders) and all(folder.startswith("runs/") for folder in folders)
    for path, config in configurations().items():
        places = [source.shards for source in config.data.train]
        assert not any(place.startswith("/") for place in [*places, config.model.text.name]), f"{path}: of one machine"


def leaves(values: dict[str, Any], place: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= leaves(value, f"{place}{key}.") if isinstance(value, dict) else {f"{place}{key}": value}
    return found


def at(config: RunConfig, key: str) -> Any:
    found: Any = config.model_dump(mode="json", by_alias=True)
    for part in key.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


@pytest.mark.parametrize("path", [path for path in CONFIGS if "\nextends:" in path.read_text()], ids=name)
def test_an_extending_file_holds_differences_alone(path: Path) -> None:
    """A value of the extended file that stands again would stay behind when that file changes."""
    values = yaml.safe_load(path.read_text())
    base = load_config(path.parent / values.pop("extends"))
    same = [key for key, value in leaves(values).items() if at(base, key) == value and value is not None]
    renamed = {"model.audio." for key in leaves(values) if key == "model.audio.name"}
    assert not [key for key in same if not key.startswith(tuple(renamed) or "-")]


class Corpus:
    """Stands for the shards of a corpus: its numbers of clips and captions."""

    def __init__(self, clips: int, captions: int) -> None:
        self.clips, self.num_captions = clips, clips * captions

    def __len__(self) -> int:
        return self.clips

    def count_captions(self) -> int:
        return self.num_captions


def length_on(config: RunConfig, **sizes: int) -> RunLength:
    """The run's lengths on corpora of their real sizes."""
    corpora = {**SIZES, **{f"shards/{corpus}/train": (clips, 1) for corpus, clips in sizes.items()}}
    return run_length(config, [Corpus(*corpora[source.shards]) for source in config.data.train])  # type: ignore[misc]


def read_quote(path: Path) -> tuple[int, bool, bool]:
    """(optimizer steps, whether about as many, whether ours) that a recipe's head states."""
    (found,) = STEPS.findall(path.read_text())
    return int(found[1].replace(",", "")), bool(found[0]), found[2] == "[ours]"


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_a_recipe_makes_the_optimizer_steps_that_it_quotes(path: Path) -> None:
    """Published code drops the last incomplete batch of an epoch; here it opens the next epoch."""
    quoted, about, ours = read_quote(path)
    config = load_config(path)
    downloaded = {"tap_pmr", "lgmm_cmsc", "co_attention"} & {path.stem, path.parent.name}
    steps = length_on(config, **({"audiocaps": DOWNLOADED} if downloaded else {})).steps
    if about:
        assert steps == pytest.approx(quoted, rel=0.01)
    elif ours:
        assert steps == quoted
    else:
        assert config.train.epochs is not None and 0 <= steps - quoted <= config.train.epochs


def test_schedules_are_those_of_the_quoted_code() -> None:
    """salsa: warm-up over an epoch of captions, cosine until epoch 15, then flat at 1e-7. WavCaps: two epochs each."""
    found = configurations()
    for member in ("passt", "atst", "mn"):
        config = found[f"configs/papers/estimated_correspondences/stage2_{member}.yaml"]
        length = length_on(config)
        assert (length.warmup_steps, length.decay_steps) == (299, 4_498)
        assert config.train.lr * config.train.lr_floor == pytest.approx(1e-7)
    length = length_on(found["configs/papers/lgmm_cmsc.yaml"], audiocaps=DOWNLOADED)
    assert (length.warmup_steps, length.beta_warmup_steps) == (769, 769)


def test_the_members_differ_in_their_audio_encoder_alone() -> None:
    for stage in (1, 2):
        members = [
            configurations()[f"configs/papers/estimated_correspondences/stage{stage}_{one}.yaml"].model_dump()
            for one in ("passt", "atst", "mn")
        ]
        for member in members:
            member["train"].pop("initial_checkpoint")
            assert member.pop("run")["dir"].startswith(f"runs/stage{stage}_")
            assert member["model"].pop("audio")["window_seconds"] == 10
            assert member["model"]["text"]["dropout"] == 0.2
        assert members[0] == members[1] == members[2]


def _quick_first(path: Path) -> Any:
    """All recipes take a quarter of a minute; the quick tier starts those of the README."""
    quick = {"quickstart", "pretrain_wavcaps.yaml", "finetune_clotho.yaml"} & set(path.parts)
    return pytest.param(path, id=name(path), marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize("path", [_quick_first(path) for path in CONFIGS])
@pytest.mark.usefixtures("world")
def test_a_recipe_can_be_started_as_it_stands(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every file, run and table that it names is there, in small: written by the recipe that stands before it."""
    app(["train", str(path), "--dry-run", "--world-size", "8"], standalone_mode=False)
    printed = capsys.readouterr().out
    for line in ("model ", "memory ", "batch ", "steps ", "train "):
        assert f"\n{line}" in f"\n{printed}", printed
    assert f"{configurations()[name(path)].train.global_batch_size} pairs a loss" in printed


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
