"""A run folder and shards of version 0.1.0: loaded, evaluated, continued (tests/fixtures/README.md)."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import atr_scale
from atr_scale.data.shard_reader import open_shards
from atr_scale.distributed.world import World
from atr_scale.errors import UserError
from atr_scale.evaluation.evaluate import evaluate_run

FIXTURE = Path(__file__).parents[1] / "fixtures" / "run_0_1"
METRICS = ("t2a/R@1", "t2a/R@5", "t2a/mAP@10", "t2a/median_rank", "a2t/R@1", "a2t/mAP@10")


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the fixture, which is the working directory: its configuration names its inputs from there."""
    copy = shutil.copytree(FIXTURE, tmp_path / "old", symlinks=True)
    monkeypatch.chdir(copy)
    return copy


def test_its_model_gives_the_same_vectors(old: Path) -> None:
    model = atr_scale.load("run", device="cpu")
    expected = np.load("expected.npz")
    assert np.allclose(model.embed_text([str(text) for text in expected["captions"]]), expected["text"], atol=1e-6)
    shards = open_shards("shards")
    files = []
    for row in range(len(shards)):
        sample = shards.read(row)
        files.append(old / f"{row}.{sample.extension}")
        files[-1].write_bytes(bytes(sample.audio))
    assert np.allclose(model.embed_audio(files), expected["audio"], atol=1e-6)


def test_its_evaluation_gives_the_same_numbers(old: Path) -> None:
    lines = map(json.loads, Path("run/metrics.jsonl").read_text().splitlines())
    logged = next(line for line in lines if line["kind"] == "evaluation")
    found = evaluate_run("run", split="validation", world=World(), device=torch.device("cpu"))
    assert {name: found.metrics[name] for name in METRICS} == {name: logged[name] for name in METRICS}
    assert Path("run/evaluation-validation.json").is_file()


def test_from_another_folder_it_says_what_is_missing(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (old / "elsewhere").mkdir()
    monkeypatch.chdir(old / "elsewhere")
    with pytest.raises(UserError, match=r"is of version 0\.1, which left out the text encoder's files") as caught:
        atr_scale.load("../run")
    assert "'text_encoder' is not found from here: load it from the folder that it was trained in" in str(caught.value)


@pytest.mark.slow
def test_its_training_goes_on_as_it_would_have(old: Path) -> None:
    subprocess.run([sys.executable, "-m", "atr_scale.train", "config.yaml"], check=True, timeout=300)
    lines = list(map(json.loads, Path("run/metrics.jsonl").read_text().splitlines()))
    expected = list(map(json.loads, Path("after_step_3.jsonl").read_text().splitlines()))
    found = [line for line in lines if line["kind"] == "train" and line["step"] > 3]
    assert [line["step"] for line in found] == [4, 5, 6]
    for new, was in zip(found, expected, strict=True):
        for name in ("loss", "loss/nt_xent", "loss/pmr", "loss/cmsc", "loss/intra_modal", "grad_norm"):
            assert new[name] == pytest.approx(was[name], rel=2e-5), (new["step"], name)
