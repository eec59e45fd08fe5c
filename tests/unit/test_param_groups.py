"""Frozen layers and layer-wise decay of the learning rate: which parameters learn, and how fast."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from atr_scale.config import RunConfig
from atr_scale.encoders import AUDIO_ENCODERS
from atr_scale.encoders.small_cnn import SmallCNN
from atr_scale.errors import UserError
from atr_scale.model import Retriever
from atr_scale.planner.dry_run import dry_run
from atr_scale.training.param_groups import freeze, layer_of, optimizer_groups, rate_scales
from atr_scale.training.schedule import seeds
from tests.tiny_run import tiny_config
from tools.parity import start, with_train
from tools.ranks import run_ranks

SMALL = [name for name in AUDIO_ENCODERS if name.startswith(("tiny_", "small_", "mn04"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


def build(folder: Path, **train: object) -> tuple[Retriever, dict[str, float]]:
    """The tiny model (4 audio layers), frozen as told, and its rate scales."""
    config = tiny_config(folder, folder / "run", **train)
    model = Retriever(config.model, config.objective)
    freeze(model, config.train)
    return model, rate_scales(model, config.train)


def test_without_options_there_are_the_groups_of_before(folder: Path) -> None:
    """Old checkpoints hold two groups for each of audio, text and heads, in this order."""
    config = tiny_config(folder, folder / "run")
    groups = list(optimizer_groups(Retriever(config.model, config.objective), config.train))
    assert [(g["name"], g["weight_decay"] > 0) for g in groups] == [
        (name, decayed) for name in ("audio", "text", "heads") for decayed in (True, False)
    ]
    assert {g["lr_scale"] for g in groups} == {1.0}


def test_each_layer_learns_at_a_share_of_the_one_above(folder: Path) -> None:
    model, scales = build(folder, layer_decay_audio=0.5, layer_decay_text=0.1)
    assert set(scales) == {n for members in model.parameter_groups().values() for n, _ in members}
    by_layer = [scales[f"audio_encoder.{name}"] for name in ("patches.0.bias", "halvings.0.0.weight", "frames.weight")]
    assert by_layer == [0.125, 0.25, 0.5]
    assert scales["audio_encoder.context.0.2.weight"] == scales["audio_encoder.norm.weight"] == 1.0
    text = Counter(round(scale, 9) for name, scale in scales.items() if name.startswith("text_encoder."))
    layers = len(model.text_encoder.layers)
    assert set(text) == {round(0.1**k, 9) for k in range(layers)}
    assert all(scale == 1.0 for name, scale in scales.items() if not name.startswith(("audio_enc", "text_enc")))


@pytest.mark.slow
def test_the_optimizer_steps_by_the_share(folder: Path) -> None:
    """Adam's first step is as long as the rate, whatever the gradient: so each parameter shows its own rate."""
    config = tiny_config(folder, folder / "run", layer_decay_audio=0.5, frozen_layers_audio=1, weight_decay=0.0)
    for moved in run_ranks(first_steps, 1, [with_train(config, zero_stage=stage) for stage in (0, 1, 3)])[0]:
        assert moved["audio_encoder.patches.0.weight"] == 0
        for name, share in (("halvings.0.0", 0.25), ("frames", 0.5), ("context.1.2", 1.0)):
            assert moved[f"audio_encoder.{name}.weight"] == pytest.approx(1e-3 * share, rel=1e-2), name
        assert moved["audio_projection.map.weight"] == pytest.approx(2e-3, rel=1e-2)


def first_steps(configs: list[RunConfig]) -> list[dict[str, float]]:
    """How far each parameter moves in the first update."""
    found = []
    for config in configs:
        engine, batches = start(config)
        before = engine.full_weights()
        engine.update([next(batches)], {"audio": 1e-3, "text": 1e-3, "heads": 2e-3}, seeds(0, 0, 1, 0))
        after = engine.full_weights()
        found.append({name: (after[name] - value).abs().max().item() for name, value in before.items()})
    return found


def test_frozen_layers_have_no_gradient_and_no_dropout(folder: Path) -> None:
    model, scales = build(folder, frozen_layers_audio=2, frozen_layers_text=2)
    frozen = [n for n, p in model.audio_encoder.named_parameters() if not p.requires_grad]
    assert {name.split(".")[0] for name in frozen} == {"patches", "halvings"}
    assert not any(name.startswith("audio_encoder.patches.") for name in scales)
    model.train()
    assert isinstance(model.audio_encoder, SmallCNN)
    assert model.audio_encoder.training and not model.audio_encoder.get_submodule("halvings.1.1").training
    assert model.audio_encoder.frames.training
    text = model.text_encoder
    layers = text.layers
    for name, module in text.named_modules():
        mine = [k for k, prefixes in enumerate(layers) if f"{name}.".startswith(prefixes)]
        if mine:
            assert module.training == (mine[0] >= 2), name
    assert any(m.training for m in text.modules())


def test_more_frozen_layers_than_there_are(folder: Path) -> None:
    with pytest.raises(UserError, match=r"frozen_layers_audio = 5, but the audio encoder has 4 layers: give at most 4"):
        build(folder, frozen_layers_audio=5)
    with pytest.raises(UserError, match=r"frozen_layers_text = 99, but the text encoder has \d+ layers"):
        build(folder, frozen_layers_text=99)
    model, _ = build(folder, frozen_layers_audio=4)
    assert not model.parameter_groups()["audio"]


def test_the_plan_tells_what_is_frozen_and_decayed(folder: Path) -> None:
    assert "frozen" not in dry_run(tiny_config(folder, folder / "run"), 1)
    lines = dry_run(
        tiny_config(folder, folder / "run", frozen_layers_audio=1, layer_decay_audio=0.5, lr_text=0.0), 1
    ).splitlines()
    assert [line for line in lines if line.startswith(("frozen", "layer decay"))] == [
        "frozen      audio: lowest 1 of 4 layers; text: all 3 layers",
        "layer decay audio: 0.5 a layer, lowest trained one 0.25 of the rate",
    ]


@pytest.mark.parametrize("name", SMALL)
def test_every_trained_parameter_is_in_one_layer(name: str) -> None:
    encoder = AUDIO_ENCODERS[name]()
    used = {layer_of(n, encoder.layers) for n, p in encoder.named_parameters() if p.requires_grad}
    assert used == set(range(len(encoder.layers)))


def test_seeds_of_augmentation_are_equal_on_all_ranks() -> None:
    by_rank = [seeds(7, 3, 2, rank) for rank in range(3)]
    assert len({tuple(s.augmentation for s in one) for one in by_rank}) == 1
    assert len({s.dropout for one in by_rank for s in one}) == 6
    others = [seeds(8, 3, 2, 0), seeds(7, 4, 2, 0)]
    assert len({s.augmentation for one in (by_rank[0], *others) for s in one}) == 6
    assert seeds(7, 3, 2, 1) == by_rank[1]
