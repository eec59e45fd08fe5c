"""Every audio encoder in training: the same losses however it is spread out, with all of its draws on, and back from
its checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from atr_scale import checkpoint
from atr_scale.batch import Batch
from atr_scale.checkpoint import load_retriever
from atr_scale.config import RunConfig
from atr_scale.config_model import AudioEncoderSection
from atr_scale.config_train import TrainSection
from atr_scale.distributed.world import World
from atr_scale.encoders import AUDIO_ENCODERS
from atr_scale.encoders.spec_augment import SpecAugmentSection
from atr_scale.training import engine
from atr_scale.training.schedule import seeds
from tests.tiny_run import tiny_config
from tools.parity import curve, curves, start, with_train
from tools.ranks import run_ranks

NAMES = ["small_cnn", *(name for name in AUDIO_ENCODERS if name.startswith("tiny_")), "mn04"]
UPDATES = 3
RATES = {"audio": 1e-3, "text": 1e-3, "heads": 1e-3}
# Each is set where an encoder has it; SpecAugment all have.
DRAWS: dict[str, Any] = {"s_patchout_t": 2, "s_patchout_f": 1, "fmin_aug_range": 10, "fmax_aug_range": 2000}


def config_of(
    folder: Path, name: str, draws: bool = True, train: dict[str, Any] | None = None, **audio: Any
) -> RunConfig:
    """A run of `name` with four pairs a batch; `audio` sets its options."""
    config = tiny_config(folder, folder / name, global_batch_size=4, gradient_clipping=0.0, **(train or {}))
    if draws:
        special = AUDIO_ENCODERS[name]().special_options
        audio |= {option: value for option, value in DRAWS.items() if option in special}
        audio["spec_augment"] = SpecAugmentSection(time_drop_width=8)
    config.model.audio = AudioEncoderSection(name=name, **audio)
    return config


def assert_equal_curves(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=2 * tolerance)
    largest = max(np.abs(g).max() for g in expected["gradients"].values())
    assert found["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        np.testing.assert_allclose(
            found["gradients"][name], gradient, rtol=1e-4, atol=2 * tolerance * largest, err_msg=name
        )


def shard_small_parameters() -> None:
    """ZeRO 3 as for large encoders: by default it keeps parameters as small as these whole on every rank."""
    original = engine.deepspeed_config

    def with_all_sharded(train: TrainSection, world_size: int) -> dict[str, Any]:
        options = original(train, world_size)
        options["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return options

    engine.deepspeed_config = with_all_sharded  # for the rest of this process


def trained(config: RunConfig) -> dict[str, Any]:
    """What one rank sees of a training that is saved, restored and gone on with, in fp32 and bf16."""
    found: dict[str, Any] = {"curve": curve(config, UPDATES)}
    bf16 = with_train(config, precision="bf16", zero_stage=1).model_copy(deep=True)
    bf16.model.audio.activation_checkpointing = False
    found["bf16"] = curve(bf16, 1)["loss"]

    world = World.current()
    first, batches = start(config)
    losses = [step(first, batches, number) for number in range(2)]
    saved = checkpoint.save(Path(config.run.dir), first, world, config.to_yaml(), {"step": 2})
    found["embedded"] = embeddings(first.model)
    restored, _, _ = load_retriever(saved)
    found["restored"] = embeddings(restored)
    found["gone on"] = [*losses, step(first, batches, 2)]

    second, batches = start(config, saved)
    for _ in losses:
        next(batches)
    found["resumed"] = [*losses, step(second, batches, 2)]
    return found


def uneven(config: RunConfig) -> tuple[float, float]:
    """Loss and gradient norm of a batch whose ranks hear unequal numbers of windows, and of lengths."""
    one, _ = start(config)
    generator = torch.Generator().manual_seed(0)
    seconds = torch.tensor([0.5, 0.5, 1.7, 0.4])
    lengths = (seconds * one.model.sample_rate).long()
    waveform = 0.1 * torch.randn(4, int(lengths.max()), generator=generator)
    waveform *= torch.arange(waveform.shape[1]) < lengths.unsqueeze(1)
    words, ids = torch.randint(5, 40, (4, 6), generator=generator), torch.arange(4)
    rows = slice(one.world.rank * 4 // one.world.size, (one.world.rank + 1) * 4 // one.world.size)
    batch = Batch(
        waveform[rows],
        lengths[rows],
        words[rows],
        torch.ones_like(words[rows]),
        ids[rows],
        ids[rows],
        ids[rows],
        ids[rows],
    )
    result = one.update([batch], RATES, seeds(0, 0, 1, one.world.rank))
    return result.terms["loss"], result.gradient_norm


def all_uneven(configs: list[RunConfig]) -> list[tuple[float, float]]:
    shard_small_parameters()
    return [uneven(config) for config in configs]


def all_trained(configs: list[RunConfig]) -> dict[str, dict[str, Any]]:
    shard_small_parameters()
    found = {}
    for config in configs:
        try:
            found[config.model.audio.name] = trained(config)
        except BaseException as error:
            error.add_note(f"in the training of {config.model.audio.name}")
            raise
    return found


def step(one: engine.Engine, batches: Iterator[Batch], number: int) -> float:
    result = one.update([next(batches)], RATES, seeds(0, number, 1, one.world.rank))
    assert result.applied
    return result.terms["loss"]


@torch.no_grad()
def embeddings(model: torch.nn.Module) -> np.ndarray:
    model.eval()
    waveform = 0.1 * torch.randn(2, 16_000, generator=torch.Generator().manual_seed(1))
    return model.encode_audio(waveform, torch.tensor([16_000, 12_000])).pooled.numpy()  # type: ignore[operator]


@pytest.fixture(scope="module")
def on_two_ranks(folder: Path) -> dict[str, dict[str, Any]]:
    """All encoders under ZeRO 3 with activation checkpointing and fused attention; one start of two ranks for all."""
    configs = [config_of(folder, n, train={"zero_stage": 3}, activation_checkpointing=True) for n in NAMES]
    for config in configs:
        if "attention" in AUDIO_ENCODERS[config.model.audio.name]().special_options:
            config.model.audio.attention = "sdpa"
    return run_ranks(all_trained, 2, configs)[1]


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, dict[str, Any]]:
    """All encoders in one process, without ZeRO, activation checkpointing and fused attention."""
    configs = [config_of(folder, name, train={"zero_stage": 0}) for name in NAMES]
    return dict(zip(NAMES, run_ranks(curves, 1, configs, UPDATES)[0], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_equal_one_process(alone: dict[str, Any], on_two_ranks: dict[str, Any], name: str) -> None:
    """With patchout, band jitter and SpecAugment on."""
    found, expected = on_two_ranks[name]["curve"], alone[name]
    assert_equal_curves(found, expected)
    assert any(name.startswith("audio_encoder.") for name in expected["gradients"])
    assert len(set(expected["loss"])) == UPDATES
    np.testing.assert_allclose(on_two_ranks[name]["bf16"], expected["loss"][:1], rtol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_saved_restored_and_gone_on_with(on_two_ranks: dict[str, Any], name: str) -> None:
    found = on_two_ranks[name]
    np.testing.assert_allclose(found["restored"], found["embedded"], rtol=1e-5, atol=1e-6)
    assert np.isfinite(found["restored"]).all() and np.abs(found["restored"][0] - found["restored"][1]).max() > 0
    assert found["resumed"] == found["gone on"]


@pytest.mark.slow
def test_draws_change_the_loss_and_checkpointing_does_not(folder: Path) -> None:
    """Without the first the comparison of ranks could pass with everything switched off."""
    name = next((name for name in NAMES if name.startswith("tiny_passt")), "small_cnn")
    without = config_of(folder, name, draws=False, train={"zero_stage": 0})
    drawn = config_of(folder, name, train={"zero_stage": 0})
    recomputed = config_of(folder, name, train={"zero_stage": 0}, activation_checkpointing=True)
    found = run_ranks(curves, 1, [without, drawn, recomputed], 1)[0]
    assert abs(found[0]["loss"][0] - found[1]["loss"][0]) > 1e-4
    assert_equal_curves(found[2], found[1], 1e-6)


@pytest.mark.slow
def test_unequal_numbers_of_windows(folder: Path) -> None:
    """Under ZeRO 3 each gather waits for the other rank, so ranks must encode equally often."""
    configs = [
        config_of(folder, name, train={"zero_stage": 3}, window_seconds=0.5, activation_checkpointing=True)
        for name in ("tiny_passt", "tiny_cnn14")
    ]
    expected = run_ranks(all_uneven, 1, [with_train(config, zero_stage=0) for config in configs])[0]
    for rank in run_ranks(all_uneven, 2, configs):
        np.testing.assert_allclose(rank, expected, rtol=2e-5)


@pytest.mark.slow
def test_compiled_layers_train_alike(folder: Path) -> None:
    """torch.compile alone, and with activation checkpointing."""
    configs = [
        config_of(folder, "tiny_passt", train={"zero_stage": 0}, **options)
        for options in ({}, {"compile": True}, {"compile": True, "activation_checkpointing": True})
    ]
    expected, *compiled = run_ranks(curves, 1, configs, 1)[0]
    for found in compiled:
        assert_equal_curves(found, expected)
