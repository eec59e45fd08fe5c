"""Runs that go on with other numbers of ranks and other ZeRO stages than those of their checkpoint."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from atr_scale import checkpoint
from atr_scale.config import RunConfig
from atr_scale.distributed.world import World
from atr_scale.training.schedule import seeds
from tests.tiny_run import tiny_config
from tools.parity import parameters, start, with_train
from tools.ranks import run_ranks

RATES = {"audio": 1e-3, "text": 2e-3, "heads": 1e-3}
STEPS = 2  # of a part of a run


def part(config: RunConfig, resume_from: Path | None, step: int, steps: int = STEPS) -> dict[str, Any]:
    """Optimizer steps from `step` on, and a checkpoint: losses, norms, the samples of all ranks, weights."""
    world, found = World.current(), dict[str, Any](loss=[], norm=[], samples=[])
    engine, batches = start(config, resume_from)
    for number, batch in enumerate(islice(batches, step, step + steps), start=step):
        result = engine.update([batch], RATES, seeds(config.run.seed, number, 1, world.rank))
        found["loss"].append(result.terms["loss"])
        found["norm"].append(result.gradient_norm)
        found["samples"].append(sorted(key for keys in world.gather_objects(batch.keys) for key in keys))
    saved = checkpoint.save(Path(config.run.dir), engine, world, config.to_yaml(), {"step": step + steps})
    return {**found, "weights": parameters(engine), "saved": saved, "state": checkpoint.read_state(saved)}


def run_in_parts(config: RunConfig, run: Path, shapes: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """One part after the other; shapes: (ranks, ZeRO stage) of each."""
    config = config.model_copy(update={"run": config.run.model_copy(update={"dir": str(run)})})
    found: list[dict[str, Any]] = []
    for number, (ranks, stage) in enumerate(shapes):
        before = found[-1]["saved"] if found else None
        found.append(run_ranks(part, ranks, with_train(config, zero_stage=stage), before, number * STEPS)[0])
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "shapes",
    [
        pytest.param([(4, 1), (2, 1), (4, 1), (3, 1)], id="ranks 4, 2, 4, 3"),
        pytest.param([(2, 1), (2, 3), (3, 0), (2, 2), (1, 3)], id="stages 1, 3, 0, 2, 3"),
    ],
)
def test_a_run_goes_on_with_other_ranks_and_stages(folder: Path, tmp_path: Path, shapes: list[tuple[int, int]]) -> None:
    """Losses, norms and weights are those of one process without ZeRO, the samples are the same."""
    config = tiny_config(folder, tmp_path / "run", micro_batch_size=5)  # divides no local batch
    (expected,) = run_ranks(part, 1, with_train(config, zero_stage=0), None, 0, len(shapes) * STEPS)
    found = run_in_parts(config, tmp_path / "elastic", shapes)
    for key, tolerance in (("loss", 1e-5), ("norm", 2e-4)):
        np.testing.assert_allclose([value for one in found for value in one[key]], expected[key], rtol=tolerance)
    assert [keys for one in found for keys in one["samples"]] == expected["samples"]
    assert [one["state"]["updates"] for one in found] == [(n + 1) * STEPS for n in range(len(shapes))]
    for name, value in expected["weights"].items():
        np.testing.assert_allclose(found[-1]["weights"][name], value, atol=2e-4, err_msg=name)


def moments_of(config: RunConfig, resume_from: Path) -> dict[str, np.ndarray]:
    """All moments, by name, after they went through an engine and its checkpoint."""
    engine, _ = start(config, resume_from)
    saved = checkpoint.save(Path(config.run.dir), engine, World.current(), config.to_yaml(), {"step": STEPS})
    stored: dict[str, dict[int, np.ndarray]] = {}
    for path in (saved / "optimizer").iterdir():
        for key, vector in load_file(path).items():
            kind, first, name = key.split("/", 2)
            stored.setdefault(f"{kind} {name}", {})[int(first)] = vector
    return {name: np.concatenate([at[first] for first in sorted(at)]) for name, at in stored.items()}


@pytest.mark.slow
def test_moments_pass_through_every_stage_to_the_bit(folder: Path, tmp_path: Path) -> None:
    config = tiny_config(folder, tmp_path / "run")
    saved = run_in_parts(config, tmp_path / "run", [(1, 0)])[-1]["saved"]
    expected: dict[str, np.ndarray] = {}
    for number, (ranks, stage) in enumerate([(1, 0), (3, 0), (3, 1), (3, 3)]):
        again = config.model_copy(update={"run": config.run.model_copy(update={"dir": str(tmp_path / str(number))})})
        found = run_ranks(moments_of, ranks, with_train(again, zero_stage=stage), saved)[0]
        expected = expected or found
        assert found.keys() == expected.keys() and len(found) > 10
        for name, vector in expected.items():
            assert np.array_equal(found[name], vector), (ranks, stage, name)
        assert any(vector.any() for vector in found.values())
