"""What a run is made of: schedule, place among ranks, frozen encoders, batch sizes, configuration drift."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from atr_scale.distributed.start import Place, distributed
from atr_scale.distributed.world import World
from atr_scale.errors import UserError
from atr_scale.model import Retriever
from atr_scale.planner.dry_run import dry_run
from atr_scale.run_checkpoints import seal
from atr_scale.training import parts
from atr_scale.training.checks import check_batch_size, check_temporary_folder, checkpoint_to_resume, differences
from atr_scale.training.loop import Training
from atr_scale.training.param_groups import freeze
from tests.tiny_run import tiny_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


def test_place_under_each_launcher() -> None:
    assert Place.find({}).world_size == 1
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "7"}
    assert Place.find(torchrun) == Place(3, 4, 1, "a", 7)
    srun = {"SLURM_PROCID": "2", "SLURM_NTASKS": "8", "SLURM_LOCALID": "2", "MASTER_ADDR": "b", "MASTER_PORT": "8"}
    assert Place.find(srun) == Place(2, 8, 2, "b", 8)
    assert Place.find({**srun, **torchrun}) == Place(3, 4, 1, "a", 7)  # torchrun inside srun
    with pytest.raises(UserError, match="MASTER_ADDR is not set"):
        Place.find({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"})
    with pytest.raises(UserError, match="no number"):
        Place.find({**torchrun, "RANK": "first"})


def test_a_learning_rate_of_zero_freezes(folder: Path) -> None:
    """No gradients and no dropout in that encoder, and less memory in the plan."""
    config = tiny_config(folder, folder / "run", lr_text=0.0)
    model = Retriever(config.model, config.objective)
    assert model.parameter_groups()["text"]
    freeze(model, config.train)
    groups = model.parameter_groups()
    assert not groups["text"] and groups["audio"] and groups["heads"]
    model.train()
    assert model.audio_encoder.training and not model.text_encoder.training
    assert "text 0.00 M" in dry_run(config, 1)


def test_plan_counts_what_each_stage_splits(folder: Path) -> None:
    sizes = {
        stage: float(dry_run(tiny_config(folder, folder / "run", zero_stage=stage), 4).split("memory")[1].split()[0])
        for stage in (0, 1, 2, 3)
    }
    # Four values a parameter: parameter, gradient, two moments; 1, 2 and 3 split 2, 3 and 4 of them over 4 ranks.
    for stage, share in ((1, 2.5 / 4), (2, 1.75 / 4), (3, 1 / 4)):
        assert sizes[stage] == pytest.approx(sizes[0] * share, abs=0.006)


def test_batch_sizes_that_do_not_divide(folder: Path) -> None:
    config = tiny_config(folder, folder / "run")
    check_batch_size(config, 4)
    with pytest.raises(
        UserError, match=r"among 5 ranks: start 2, 3, 4 or 6, .* or set it to a multiple in a new run, for example 15"
    ):
        check_batch_size(config, 5)
    for micro, ranks in ((3, 4), (3, 2), (1, 1), (12, 1), (5, 2)):
        config.train.micro_batch_size = micro
        check_batch_size(config, ranks)
    config.train.micro_batch_size, config.model.audio.batch_norm = 3, "local"
    check_batch_size(config, 4)
    with pytest.raises(UserError, match=r"batch_norm is local, but train.micro_batch_size = 3 cuts .* of 6 pairs"):
        check_batch_size(config, 2)


@pytest.mark.parametrize(
    ("overrides", "cause"),
    [
        ({"run.dir": "FILE"}, "the run folder"),
        ({"data.validation": "nowhere"}, "no shards in nowhere"),
        ({"evaluation.select": "t2a/R@2"}, "evaluation.select"),
        ({"train.warmup_steps": 7}, "train.warmup_steps = 7 is longer than the run of 6 optimizer steps"),
    ],
)
def test_cheap_checks_come_before_the_model_is_built(
    overrides: dict[str, Any], cause: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*_: object, **__: object) -> None:
        raise AssertionError("the model is built before all cheap checks are made")

    monkeypatch.setattr(parts, "new_model", build)
    config = tiny_config(folder, tmp_path / "run")
    (tmp_path / "file").touch()
    for key, value in overrides.items():
        section, name = key.split(".")
        setattr(getattr(config, section), name, str(tmp_path / "file") if value == "FILE" else value)
    with pytest.raises(UserError, match=cause):
        Training(config, World(), torch.device("cpu"))


def test_drift_names_keys_and_leaves_the_free_ones(folder: Path) -> None:
    saved = tiny_config(folder, folder / "run").model_dump(mode="json")
    now = tiny_config(folder, folder / "elsewhere", lr=5e-4, log_every=7).model_dump(mode="json")
    now["data"]["workers"], now["train"]["steps"], now["train"]["epochs"] = 3, None, 40
    now["model"]["projection"]["kind"] = "mlp"
    other = {"data": {"train": [{"shards": "given", "weight": 1}, {"shards": "given", "weight": None}]}}
    one = {"data": {"train": [{"shards": "given", "weight": 2}]}}
    assert differences(other, one) == ["data.train had 2 entries, now 1", "data.train[0].weight was 1, now 2"]
    assert differences(saved, now) == ["model.projection.kind was linear, now mlp", "train.lr was 0.001, now 0.0005"]


def test_one_process_leaves_the_environment_as_it_was() -> None:
    """A launcher started from this process later must not take its numbers for its own."""
    before = dict(os.environ)
    with distributed() as (world, device):
        assert (world.rank, world.size, device.type in ("cpu", "cuda")) == (0, 1, True)
        assert os.environ["WORLD_SIZE"] == "1"
    assert dict(os.environ) == before


def test_ranks_that_cannot_meet_say_where(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(UserError, match=f"127.0.0.1:{port} .* set MASTER_PORT to a free port"), distributed():
            pass


def test_a_dry_run_tells_a_metric_that_does_not_exist(folder: Path) -> None:
    config = tiny_config(folder, folder / "run")
    config.evaluation.select = "t2a/R@2"
    with pytest.raises(UserError, match=r"evaluation.select = 't2a/R@2' names no validation metric"):
        dry_run(config, 1)
    config.evaluation.select = "zero_shot/accuracy"
    with pytest.raises(UserError, match=r"the clips of .* have no labels: give t2a/mAP@10"):
        dry_run(config, 1)


@pytest.mark.parametrize("length", [75, 76])
def test_a_temporary_folder_too_long_for_sockets_is_refused_before_workers_start(
    length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/" + "t" * (length - 1))
    check_temporary_folder(workers=0)
    if length == 75:
        check_temporary_folder(workers=2)
        return
    with pytest.raises(UserError, match=r"^TMPDIR=/t+ is longer than the 75 bytes"):
        check_temporary_folder(workers=2)


def test_a_batch_that_no_number_of_ranks_divides(folder: Path) -> None:
    config = tiny_config(folder, folder / "run", global_batch_size=48)
    for ranks, start in ((5, "start 2, 3, 4 or 6,"), (100, "start 16, 24 or 48,"), (7, "start 3, 4, 6 or 8,")):
        with pytest.raises(UserError, match=f"does not divide among {ranks} ranks: {start}"):
            check_batch_size(config, ranks)


@pytest.mark.parametrize(
    ("saved", "before", "asked", "now", "expected"),
    [
        (None, 4, None, 2, 12),  # as many as the local batch was
        (12, 2, None, 1, 12),  # fewer again: the number that was set then
        (None, 2, None, 4, None),
        (None, 4, 5, 2, 5),
    ],
)
def test_fewer_ranks_need_no_larger_forward_pass(
    folder: Path, tmp_path: Path, saved: int | None, before: int, asked: int | None, now: int, expected: int | None
) -> None:
    config = tiny_config(folder, tmp_path / "run", global_batch_size=48, micro_batch_size=saved)
    step = tmp_path / "run" / "checkpoints" / "step-2"
    step.mkdir(parents=True)
    (step / "config.resolved.yaml").write_text(config.to_yaml())
    (step / "state.json").write_text(json.dumps({"step": 2, "world_size": before}))
    (step / "model.safetensors").touch()
    seal(step)
    config = tiny_config(folder, tmp_path / "run", global_batch_size=48, micro_batch_size=asked)
    assert checkpoint_to_resume(config, Alone(0, now)) == step
    assert config.train.micro_batch_size == expected


class Alone(World):
    """The first of several ranks, without the others."""

    def gather_objects(self, value: Any) -> list[Any]:
        return [value] * self.size
