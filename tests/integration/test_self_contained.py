"""A checkpoint is complete: moved to another folder, without network and without what training started from."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from tests.tiny import make_tiny_inputs, read_training, write_tiny_config

pytestmark = pytest.mark.slow
README = Path(__file__).parents[2] / "README.md"


def python(*arguments: str, cwd: Path, network: bool = True) -> str:
    """Runs Python in `cwd`; without network in a namespace that has no interface but loopback, if one may be made."""
    command = [sys.executable, *arguments]
    if not network:
        alone = ["unshare", "--net", "--map-root-user", "sh", "-c", 'ip link set lo up && exec "$0" "$@"']
        if shutil.which("unshare") and subprocess.run([*alone, "true"], capture_output=True).returncode == 0:
            command = [*alone, *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def evaluate(run: Path, shards: Path, cwd: Path, network: bool) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    python("-m", "atr_scale.cli", "evaluate", str(run), "--shards", str(shards), "--split", "held", cwd=cwd,
           network=network)  # fmt: skip
    with np.load(run / "ranks-held.npz") as ranks:
        return json.loads((run / "evaluation-held.json").read_text()), dict(ranks)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards/, audio and run/, trained with a frozen text encoder; the encoder's own folder is gone."""
    place = tmp_path_factory.mktemp("self_contained")
    inputs = make_tiny_inputs(place / "made")
    settings = {"lr_text": 0, "checkpoint_every": 2, "evaluate_every": 2, "keep_checkpoints": 9, "zero_stage": 2}
    config = write_tiny_config(place / "run.yaml", inputs, place / "run", **settings)
    override = f"data.validation={inputs.shards}"
    python("-m", "atr_scale.train", str(config), override, cwd=place)
    before = evaluate(place / "run", inputs.shards, place, network=True)
    shutil.rmtree(inputs.text_encoder)
    (place / "before.json").write_text(json.dumps(before[0]))
    arrays: dict[str, Any] = before[1]
    np.savez(place / "before.npz", **arrays)
    return place


def test_a_moved_run_evaluates_to_the_same_numbers(trained: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "run"
    shutil.copytree(trained / "run", moved, symlinks=True)
    (tmp_path / "cwd").mkdir()
    table, ranks = evaluate(moved, trained / "made" / "shards", tmp_path / "cwd", network=False)
    assert table == json.loads((trained / "before.json").read_text())
    with np.load(trained / "before.npz") as before:
        assert {name: ranks[name].tolist() for name in ranks} == {name: before[name].tolist() for name in before}


def test_the_readmes_python_block_runs(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "run", tmp_path / "runs" / "quickstart", symlinks=True)
    shutil.copytree(trained / "made" / "corpus" / "audio", tmp_path / "demo" / "corpora" / "clotho" / "evaluation")
    block = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert block is not None
    out = python("-c", block[1], cwd=tmp_path, network=False)
    numbers = [float(number) for number in re.findall(r"-?\d\.\d+", out)]
    assert len(numbers) == 12 and numbers[:6] == pytest.approx(numbers[6:], abs=1e-5)


def test_frozen_weights_are_stored_once(trained: Path) -> None:
    folder = trained / "run" / "checkpoints" / "step-4"
    moments = load_file(folder / "optimizer" / "rank-0.safetensors")
    assert moments and not [name for name in moments if "/text_encoder." in name]
    assert not (folder / "text_encoder" / "model.safetensors").exists()


def test_training_goes_on_without_what_it_started_from(trained: Path, tmp_path: Path) -> None:
    """Pretrained weights are not read only to be overwritten, so they may be gone."""
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run, symlinks=True)
    whole = read_training(run)
    shutil.rmtree(run / "checkpoints" / "step-4")
    settings = f"run.dir={run}"
    override = f"data.validation={trained / 'made' / 'shards'}"
    python("-m", "atr_scale.train", str(trained / "run.yaml"), override, settings, cwd=tmp_path, network=False)
    again = read_training(run)
    assert [line["step"] for line in again] == [1, 2, 3, 4]
    assert [line["loss"] for line in again] == [line["loss"] for line in whole]
