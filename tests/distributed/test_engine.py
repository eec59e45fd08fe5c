"""Updates under DeepSpeed: the same gradients and losses whatever the ranks and the ZeRO stage, and safe skips."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from atr_scale import checkpoint
from atr_scale.batch import Batch
from atr_scale.config import RunConfig
from atr_scale.distributed.world import World
from atr_scale.errors import UserError
from atr_scale.model import Retriever
from atr_scale.scorers import build_scorer
from atr_scale.training.engine import Engine, _load_learned
from atr_scale.training.param_groups import freeze
from atr_scale.training.parts import new_model
from atr_scale.training.schedule import seeds
from tests.tiny_run import tiny_config
from tools.parity import curves, parameters, start, with_train
from tools.ranks import run_ranks

RATES = {"audio": 1e-3, "text": 1e-3, "heads": 1e-3}


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["nt_xent", "pmr"])
def test_ranks_and_zero_stages_agree(folder: Path, objective: str) -> None:
    """One process without ZeRO against two with stages 0 to 3: gradients, losses, norms, parameters."""
    config = tiny_config(folder, folder / "run")
    config.objective.nt_xent.weight = 0.0
    getattr(config.objective, objective).weight = 1.0
    ((expected,),) = run_ranks(curves, 1, [with_train(config, zero_stage=0)], 3)
    stages = (0, 1, 2, 3)
    for rank in run_ranks(curves, 2, [with_train(config, zero_stage=stage) for stage in stages], 3):
        for stage, found in zip(stages, rank, strict=True):
            np.testing.assert_allclose(found["loss"], expected["loss"], rtol=2e-5, err_msg=f"stage {stage}")
            np.testing.assert_allclose(found["norm"], expected["norm"], rtol=2e-4, err_msg=f"stage {stage}")
            largest = max(np.abs(g).max() for g in expected["gradients"].values())
            for name, gradient in expected["gradients"].items():
                np.testing.assert_allclose(
                    found["gradients"][name], gradient, rtol=1e-4, atol=2e-5 * largest, err_msg=f"{stage} {name}"
                )


@pytest.mark.slow
def test_gradient_norms_by_group_are_those_of_one_backward_pass(folder: Path) -> None:
    """1 and 2 ranks, ZeRO 0 to 3, fp16, in chunks, and with frozen layers; together they are the whole norm."""
    config = with_train(tiny_config(folder, folder / "run"), gradient_clipping=0.1)
    gradients = run_ranks(gradients_of_batches, 1, config)[0][0]
    squares = dict.fromkeys(("audio", "text", "heads"), 0.0)
    for name, gradient in gradients.items():
        group = next((kind for kind in ("audio", "text") if name.startswith(f"{kind}_encoder.")), "heads")
        squares[group] += float(np.square(gradient, dtype=np.float64).sum())
    expected = {group: square**0.5 for group, square in squares.items()}
    every: list[dict[str, Any]] = [{"zero_stage": stage} for stage in (0, 1, 2, 3)]
    every += [{"zero_stage": stage, "micro_batch_size": 2, "kept_chunks": 1} for stage in (1, 3)]
    every += [{"zero_stage": 0, "precision": "fp16"}, {"zero_stage": 2, "precision": "fp16"}]
    every += [{"zero_stage": 1, "lr_text": 0.0}]
    for size in (1, 2):
        for rank in run_ranks(norms_of_first_updates, size, [with_train(config, **train) for train in every]):
            for train, (whole, by_group) in zip(every, rank, strict=True):
                wanted = {group: norm for group, norm in expected.items() if f"lr_{group}" not in train}
                assert by_group == pytest.approx(wanted, rel=2e-2 if "precision" in train else 1e-4), (size, train)
                assert whole == pytest.approx(np.linalg.norm(list(by_group.values())), rel=1e-6), (size, train)


def norms_of_first_updates(configs: list[RunConfig]) -> list[tuple[float, dict[str, float]]]:
    found = []
    for config in configs:
        engine, batches = start(config)
        engine.scale.value.clamp_(max=256.0)  # fp16: no overflow
        result = engine.update([next(batches)], RATES, seeds(0, 0, 1, engine.world.rank))
        found.append((result.gradient_norm, result.gradient_norms))
    return found


def test_a_run_without_a_parameter_of_this_version_does_not_go_on() -> None:
    """One of version 0.2 with X-Pool's block, which had no biases. What is frozen may be missing."""
    model = build_scorer("tap", dim=8, attention_dim=4, residual=True)
    saved = {name: value for name, value in model.state_dict().items() if name != "weights.out_bias"}
    with pytest.raises(UserError, match=r"whose model had no weights\.out_bias: go on with that one, or"):
        _load_learned(saved, model)
    model.requires_grad_(False)
    _load_learned(saved, model)


@pytest.mark.slow
def test_accumulated_losses_are_averaged(folder: Path) -> None:
    """Two losses an update: the gradient is the mean of theirs."""
    config = with_train(tiny_config(folder, folder / "run"), gradient_clipping=0.0, lr=0.0)
    single = run_ranks(gradients_of_batches, 1, config)[0]
    both = run_ranks(curves, 1, [with_train(config, accum_steps=2)], 1)[0][0]["gradients"]
    for name, gradient in both.items():
        np.testing.assert_allclose(gradient, (single[0][name] + single[1][name]) / 2, rtol=1e-4, atol=1e-6)


def gradients_of_batches(config: RunConfig) -> list[dict[str, np.ndarray]]:
    """Gradients of the first two batches, each by itself, at the initial parameters."""
    _, batches = start(config)
    return [curve_of(config, batch) for batch in (next(batches), next(batches))]


def curve_of(config: RunConfig, batch: Batch) -> dict[str, np.ndarray]:
    torch.manual_seed(0)
    model = Retriever(config.model, config.objective).train()
    model(batch)["loss"].backward()
    return {n: p.grad.numpy().copy() for n, p in model.named_parameters() if p.grad is not None}


def skip_and_go_on(config: RunConfig) -> dict[str, Any]:
    """A good update, one whose batch is poisoned on the last rank, a good one."""
    world = World.current()
    engine, batches = start(config)
    engine.scale.value.clamp_(max=256.0)  # fp16: no overflow of its own
    good, bad, again = (next(batches) for _ in range(3))
    if world.rank == world.size - 1:
        bad = replace(bad, waveform=bad.waveform * torch.nan)

    engine.update([good], RATES, seeds(0, 0, 1, world.rank))
    before, moments = parameters(engine), optimizer_state(engine)
    skipped = engine.update([bad], RATES, seeds(0, 1, 1, world.rank))
    after, moments_after = parameters(engine), optimizer_state(engine)
    last = engine.update([again], RATES, seeds(0, 2, 1, world.rank))
    return {
        "bad_ranks": skipped.bad_ranks,
        "unchanged": all(np.array_equal(before[n], after[n]) for n in before),
        "moments_unchanged": all(torch.equal(a, b) for a, b in zip(moments, moments_after, strict=True)),
        "last": (last.applied, last.terms["loss"], last.gradient_norm),
        "moved": any(not np.array_equal(after[n], value) for n, value in parameters(engine).items()),
    }


def optimizer_state(engine: Engine) -> list[torch.Tensor]:
    return [
        value.clone()
        for state in engine.optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]


def skips(configs: list[RunConfig]) -> list[dict[str, Any]]:
    return [skip_and_go_on(config) for config in configs]


@pytest.mark.slow
def test_a_non_finite_rank_makes_all_skip(folder: Path) -> None:
    """Parameters and moments stay bit for bit, and the next update is a normal one."""
    cases = [("fp32", 0), ("fp32", 1), ("fp32", 2), ("fp32", 3), ("bf16", 1), ("bf16", 3), ("fp16", 0), ("fp16", 2)]
    in_chunks = [("fp32", 2), ("bf16", 1), ("bf16", 3), ("fp16", 0)]
    config = tiny_config(folder, folder / "run")
    configs = [with_train(config, zero_stage=stage, precision=precision) for precision, stage in cases]
    configs += [with_train(config, zero_stage=s, precision=p, micro_batch_size=2, kept_chunks=1) for p, s in in_chunks]
    cases += in_chunks
    for rank in run_ranks(skips, 2, configs):
        for case, found in zip(cases, rank, strict=True):
            assert 1 in found["bad_ranks"], case
            assert found["unchanged"] and found["moments_unchanged"] and found["moved"], case
            applied, loss, norm = found["last"]
            assert applied and np.isfinite(loss) and np.isfinite(norm), case


@pytest.mark.slow
def test_fp16_halves_its_scale_after_an_overflow(folder: Path) -> None:
    config = with_train(tiny_config(folder, folder / "run"), precision="fp16")
    before, after, overflow = run_ranks(overflow_once, 1, config)[0]
    assert overflow and after == before / 2


def overflow_once(config: RunConfig) -> tuple[float, float, bool]:
    engine, batches = start(config)
    engine.scale.value.fill_(2.0**120)
    result = engine.update([next(batches)], RATES, seeds(0, 0, 1, 0))
    return 2.0**120, float(engine.scale.value), result.overflow


def frozen_and_restored(configs: list[RunConfig], folder: Path) -> list[tuple[list[list[float]], int, int, int]]:
    """An update, a checkpoint, another update; the same after a restart from that checkpoint, and from one as version
    0.1 wrote it."""
    found = []
    for config in configs:
        run = folder / f"stage-{config.train.zero_stage}"
        engine, batches = start(config)
        world = engine.world
        batch, later = next(batches), next(batches)
        engine.update([batch], RATES, seeds(0, 0, 1, world.rank))
        place = checkpoint.save(run, engine, world, config.to_yaml(), {"step": 1})
        engine.deepspeed.save_checkpoint(str(run / "old"), tag="deepspeed", client_state=STATE, save_latest=False)
        outcomes = [outcome(engine, later)]
        for source in (place, run / "old"):
            model, _ = new_model(config, world, place)
            freeze(model, config.train)
            again = Engine(model, config.train, world, torch.device("cpu"))
            again.load(source, checkpoint.read_state(place))
            outcomes.append(outcome(again, later))
        learned = [parameter for parameter in engine.model.parameters() if parameter.requires_grad]
        frozen = [parameter for parameter in engine.model.parameters() if not parameter.requires_grad]
        stored = sum(path.stat().st_size for path in (place / "optimizer").iterdir())
        found.append((outcomes, sum(map(_count, learned)), sum(map(_count, frozen)), stored))
    return found


STATE = {"step": 1, "scale": 1.0, "good_steps": 1}


def _count(parameter: Any) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def outcome(engine: Engine, batch: Batch) -> list[float]:
    """Of one update, and of the model after it."""
    result = engine.update([batch], RATES, seeds(0, 1, 1, engine.world.rank))
    weights = [float(np.abs(value).sum()) for value in parameters(engine).values()]
    return [result.terms["loss"], result.gradient_norm, *weights]


@pytest.mark.slow
def test_frozen_weights_are_stored_once(folder: Path, tmp_path: Path) -> None:
    """The optimizer's files are without them; a restart goes on as if there had been none, at every stage."""
    config = with_train(tiny_config(folder, folder / "run"), lr_text=0.0, frozen_layers_audio=1)
    configs = [with_train(config, zero_stage=stage) for stage in (0, 1, 2, 3)]
    for rank in run_ranks(frozen_and_restored, 2, configs, tmp_path):
        for stage, found in enumerate(rank):
            (going_on, restarted, from_old), learned, frozen, stored = found
            assert going_on == restarted == from_old, stage
            names = 40_000  # bytes
            assert frozen > 10_000 and 8 * learned < stored < 8 * learned + names, stage
