"""`train.profile`: a trace of some steps, which changes nothing else."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from atr_scale.config_train import ProfileSection
from atr_scale.training.loop import train
from atr_scale.training.profile import StepProfile
from tests.tiny import read_training
from tests.tiny_run import tiny_config

pytestmark = pytest.mark.slow


def losses(folder: Path, name: str, **settings: Any) -> list[float]:
    train(tiny_config(folder, folder / name, log_every=1, micro_batch_size=6, accum_steps=2, **settings))
    return [line["loss"] for line in read_training(folder / name)]


def traced(path: Path) -> list[str]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [event.get("name", "") for event in json.load(file)["traceEvents"]]


def test_a_trace_of_two_steps(tmp_path: Path) -> None:
    wanted = losses(tmp_path, "plain")
    assert losses(tmp_path, "traced", profile={"start": 3, "steps": 2}) == wanted
    names = traced(tmp_path / "traced/profile/step-3-rank-0.json.gz")
    steps = {name for name in names if name.startswith("optimizer step")}
    assert steps == {"optimizer step 3", "optimizer step 4"}
    assert names.count("reading a batch") == 4, "two batches a step"
    assert "aten::convolution" in names
    table = (tmp_path / "traced/profile/step-3-rank-0.txt").read_text()
    assert "Self CPU" in table and "reading a batch" in table
    assert not (tmp_path / "plain/profile").exists()


def test_a_run_that_ends_earlier_writes_what_it_has(tmp_path: Path) -> None:
    losses(tmp_path, "run", profile={"start": 6, "steps": 100})
    assert "optimizer step 6" in traced(tmp_path / "run/profile/step-6-rank-0.json.gz")


def test_a_trace_of_no_step_of_the_run_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    StepProfile(ProfileSection(start=7, steps=1), tmp_path, 0, torch.device("cpu"), 7)
    assert not caplog.messages
    StepProfile(ProfileSection(start=8, steps=1), tmp_path, 0, torch.device("cpu"), 7)
    assert caplog.messages == ["train.profile.start = 8 is behind the last step, 7: no trace is written"]


def test_a_resume_may_ask_for_a_trace(tmp_path: Path) -> None:
    losses(tmp_path, "run", checkpoint_every=6)
    train(tiny_config(tmp_path, tmp_path / "run", steps=8, micro_batch_size=6, accum_steps=2, profile={"start": 7}))
    assert list((tmp_path / "run/profile").glob("step-7-rank-0.*"))
