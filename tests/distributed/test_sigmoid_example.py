"""The loss of examples/sigmoid_loss, which is no part of the package: trained on two ranks, saved and restored."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atr_scale import checkpoint
from atr_scale.config import load_config
from atr_scale.distributed.world import World
from atr_scale.training.schedule import seeds
from tests.tiny import read_training
from tests.tiny_run import tiny_config
from tools.parity import curve, parameters, start
from tools.ranks import run_ranks

RATES = {"audio": 1e-3, "text": 1e-3, "heads": 1e-3}
OVERRIDES = ("plugins=[sigmoid_loss]", "objective.nt_xent.weight=0", "objective.sigmoid.weight=1", "train.lr=0.01")
CHUNKS = ("train.micro_batch_size=2", "train.kept_chunks=1", "train.accum_steps=2")
UPDATES = 3
CAPTURED: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 240}


def curves_of(example: str, path: Path, runs: list[tuple[str, ...]]) -> list[dict[str, Any]]:
    """`curve` of each run, a set of overrides."""
    sys.path.insert(0, example)
    return [curve(load_config(path, [*OVERRIDES, *run]), UPDATES) for run in runs]


def restored(example: str, path: Path, folder: Path, runs: list[tuple[str, ...]]) -> list[Any]:
    """Losses of the second update, and the term's parameters after it: going on, and after a restart."""
    sys.path.insert(0, example)
    found = []
    for number, run in enumerate(runs):
        config, world = load_config(path, [*OVERRIDES, *run]), World.current()
        engine, batches = start(config)
        batch, later = next(batches), next(batches)
        engine.update([batch], RATES, seeds(0, 0, 1, world.rank))
        place = checkpoint.save(folder / str(number), engine, world, config.to_yaml(), {"step": 1})
        again, _ = start(config, place)
        weights = checkpoint.read_weights(place)
        own = []
        for one in (engine, again):
            result = one.update([later], RATES, seeds(0, 1, 1, world.rank))
            after = {name: value.tolist() for name, value in parameters(one).items() if "sigmoid" in name}
            own.append((result.terms["loss"], result.gradient_norm, after))
        found.append((own, sorted(name for name in weights if "sigmoid" in name)))
    return found


@pytest.mark.slow
def test_two_ranks_equal_one_process(folder: Path, tmp_path: Path, example: str) -> None:
    """GradCache, accumulated losses, and every stage of ZeRO."""
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny_config(folder, folder / "run").to_yaml())
    ((expected,),) = run_ranks(curves_of, 1, example, path, [("train.zero_stage=0", "train.accum_steps=2")])
    own = {name for name in expected["gradients"] if "sigmoid" in name}
    assert own == {"objective.terms.sigmoid.log_scale", "objective.terms.sigmoid.bias"}
    initial = {"objective.terms.sigmoid.log_scale": np.log(10), "objective.terms.sigmoid.bias": -10}
    for name, value in initial.items():
        assert abs(expected["parameters"][name] - value) > 1e-3, "it learns"
    stages = range(4)
    runs = [(f"train.zero_stage={stage}", *CHUNKS) for stage in stages]
    largest = max(np.abs(g).max() for g in expected["gradients"].values())
    for rank in run_ranks(curves_of, 2, example, path, runs):
        for stage, found in zip(stages, rank, strict=True):
            np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-5, err_msg=str(stage))
            np.testing.assert_allclose(found["norm"], expected["norm"], rtol=2e-4, err_msg=str(stage))
            for name, gradient in expected["gradients"].items():
                np.testing.assert_allclose(
                    found["gradients"][name], gradient, rtol=1e-4, atol=2e-5 * largest, err_msg=f"{stage} {name}"
                )
            for name in own:
                np.testing.assert_allclose(found["parameters"][name], expected["parameters"][name], rtol=1e-5)


@pytest.mark.slow
def test_its_configuration_trains_with_the_command_of_its_readme(folder: Path, tmp_path: Path, example: str) -> None:
    """On small inputs: two ranks with ZeRO 1 and GradCache, and one process without either, log the same losses."""
    inputs = folder / "train"
    changes = [
        f"data.train=[{{shards: {inputs / 'shards'}}}]",
        "data.validation=null", "data.test=null", "data.crop_seconds=0.5", "data.workers=0",
        f"model.text.name={inputs / 'text_encoder'}", "model.projection.dim=16",
        "train.epochs=null", "train.steps=3", "train.log_every=1", "train.global_batch_size=12", "train.precision=fp32",
    ]  # fmt: skip
    losses = []
    for ranks, more in ((2, ["train.micro_batch_size=3"]), (1, ["train.micro_batch_size=null", "train.zero_stage=0"])):
        run = tmp_path / f"run-{ranks}"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [*launcher, "-m", "atr_scale.train", f"{example}/config.yaml", *changes, *more, f"run.dir={run}"]
        path = os.pathsep.join([example, os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, **CAPTURED)
        assert done.returncode == 0, done.stderr[-3000:]
        assert (run / "latest" / "config.resolved.yaml").read_text().count("sigmoid_loss") == 1
        losses.append([line["loss/sigmoid"] for line in read_training(run)])
        assert losses[-1] == [line["loss"] for line in read_training(run)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


@pytest.mark.slow
def test_its_parameters_are_saved_and_restored(folder: Path, tmp_path: Path, example: str) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny_config(folder, folder / "run").to_yaml())
    main, other = run_ranks(restored, 2, example, path, tmp_path, [("train.zero_stage=1",), ("train.zero_stage=3",)])
    for (going_on, after_restart), _ in (*main, *other):
        assert going_on == after_restart
        assert set(going_on[2]) == {"objective.terms.sigmoid.log_scale", "objective.terms.sigmoid.bias"}
    for _, saved in main:
        assert saved == ["objective.terms.sigmoid.bias", "objective.terms.sigmoid.log_scale"]
