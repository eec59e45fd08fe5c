"""Runs that go on with other numbers of ranks and other ZeRO stages than those of their checkpoint."""

from __future__ import annotations

import json
import threading
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from atr_scale import checkpoint
from atr_scale.checkpoint_writer import Writing
from atr_scale.config import RunConfig
from atr_scale.distributed.world import World
from atr_scale.run_checkpoints import Files
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


def passed_on(config: RunConfig, resume_from: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """All moments, by name, and the state, after they went through an engine and its checkpoint."""
    engine, _ = start(config, resume_from)
    saved = checkpoint.save(Path(config.run.dir), engine, World.current(), config.to_yaml(), {"step": STEPS})
    stored: dict[str, dict[int, np.ndarray]] = {}
    for path in (saved / "optimizer").iterdir():
        for key, vector in load_file(path).items():
            kind, first, name = key.split("/", 2)
            stored.setdefault(f"{kind} {name}", {})[int(first)] = vector
    moments = {name: np.concatenate([at[first] for first in sorted(at)]) for name, at in stored.items()}
    return moments, checkpoint.read_state(saved)


@pytest.mark.slow
def test_moments_and_loss_scale_pass_through_every_stage_to_the_bit(folder: Path, tmp_path: Path) -> None:
    config = tiny_config(folder, tmp_path / "run")
    saved = run_in_parts(config, tmp_path / "run", [(1, 0)])[-1]["saved"]
    state = {**checkpoint.read_state(saved), "scale": 512.0, "good_steps": 7}
    (saved / "state.json").write_text(json.dumps(state))
    config = with_train(config, precision="fp16")
    expected: dict[str, np.ndarray] = {}
    for number, (ranks, stage) in enumerate([(1, 0), (3, 0), (3, 1), (2, 2), (3, 3)]):
        again = config.model_copy(update={"run": config.run.model_copy(update={"dir": str(tmp_path / str(number))})})
        found, state_now = run_ranks(passed_on, ranks, with_train(again, zero_stage=stage), saved)[0]
        expected = expected or found
        assert found.keys() == expected.keys() and len(found) > 10
        for name, vector in expected.items():
            assert np.array_equal(found[name], vector), (ranks, stage, name)
        assert any(vector.any() for vector in found.values())
        assert [state_now[key] for key in ("updates", "scale", "good_steps")] == [STEPS, 512.0, 7]


def saved_behind(config: RunConfig) -> dict[int, tuple[set[str], set[str]]]:
    """By ZeRO stage: the tensors that a save behind training has other values of than one that training waits for, and
    those that training has changed meanwhile.
    """
    world, found, may_write = World.current(), dict[int, tuple[set[str], set[str]]](), threading.Event()
    own_files = Writing._own_files

    def later(self: Writing) -> Files:
        may_write.wait()
        return own_files(self)

    Writing._own_files = later  # type: ignore[method-assign]
    for stage in range(4):
        engine, batches = start(with_train(config, zero_stage=stage))

        def train(number: int, engine: Any = engine, batches: Any = batches) -> None:
            engine.update([next(batches)], RATES, seeds(config.run.seed, number, 1, world.rank))

        run = Path(config.run.dir) / str(stage)
        train(0)
        may_write.set()
        waited_for = checkpoint.save(run, engine, world, config.to_yaml(), {"step": 0})
        may_write.clear()
        writing = checkpoint.start_saving(run, engine, world, config.to_yaml(), {"step": 1})
        train(1)
        may_write.set()
        behind = writing.result()
        after = checkpoint.save(run, engine, world, config.to_yaml(), {"step": 2})
        found[stage] = different(waited_for, behind), different(behind, after)
    return found


def different(one: Path, other: Path) -> set[str]:
    names = [path.relative_to(one) for path in one.rglob("*.safetensors")]
    assert len(names) == 3  # weights, and the moments of two ranks
    pairs = [(load_file(one / name), load_file(other / name)) for name in names]
    assert all(a.keys() == b.keys() for a, b in pairs)
    return {key for a, b in pairs for key in a if not np.array_equal(a[key], b[key])}


@pytest.mark.slow
def test_a_checkpoint_has_the_state_of_its_step_while_training_goes_on(folder: Path, tmp_path: Path) -> None:
    found = run_ranks(saved_behind, 2, tiny_config(folder, tmp_path / "run"))[0]
    for stage, (wrong, trained) in found.items():
        assert not wrong, stage
        assert len(trained) > 10, stage
