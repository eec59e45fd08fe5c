"""Scorers over ranks: gradients equal one process, and captions of unequal length meet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from atr_scale import score_block as blocks
from atr_scale.batch import TokenSequence
from atr_scale.distributed.world import World
from atr_scale.losses import dense, tiled
from atr_scale.losses.targets import positives_mask
from atr_scale.scorers import build_scorer
from atr_scale.scorers import tiles as scorer_tiles
from atr_scale.scorers.scorer import gather_sequence
from tests.sequences import random_sequence
from tools.ranks import run_ranks

DIM = 6
FRAMES = [3, 1, 5, 2, 4, 4, 2, 1, 3, 5, 2, 4]
B = len(FRAMES)
SCORERS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ("pooled", "mean", "max", "meanmax")},
    "netrvlad": ("netrvlad", {"num_clusters": 3}),
    "attention": ("attention", {"hidden_dim": 4}),
    "tap": ("tap", {"attention_dim": 12}),
    "tap of few texts": ("tap", {"attention_dim": 13}),
    "tap of pairs' vectors": ("tap", {"attention_dim": 3}),
    "tap with residual block": ("tap", {"attention_dim": 4, "residual": True}),
}
OBJECTIVES: dict[str, dict[str, Any]] = {"nt_xent": {}, "pmr": {"omega": 5.0}}
CASES = [(scorer, objective) for scorer in SCORERS for objective in OBJECTIVES]


class Model(nn.Module):
    """Two linear encoders under a scorer, in float64."""

    def __init__(self, name: str, options: dict[str, Any]) -> None:
        super().__init__()
        self.text, self.audio, self.scorer = (
            nn.Linear(DIM, DIM),
            nn.Linear(DIM, DIM),
            build_scorer(name, DIM, **options),
        )
        self.double()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))

    def encode(self, text: TokenSequence, audio: TokenSequence) -> tuple[TokenSequence, TokenSequence]:
        return text.map(self.text, self.text), audio.map(self.audio, self.audio)


def rows_of(world: World) -> Tensor:
    share = B // world.size
    return torch.arange(world.rank * share, (world.rank + 1) * share)


def data(frames: list[int] = FRAMES) -> tuple[TokenSequence, TokenSequence, Tensor]:
    """Captions, clips and ids; clip 9 is clip 0 again, on another rank."""
    ids = torch.arange(B).unsqueeze(1)
    ids[9] = 0
    return random_sequence([1] * B, DIM, 1), random_sequence(frames, DIM, 2), ids


def gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def loss_of_ranks(scorer: str, objective: str) -> tuple[float, list[np.ndarray]]:
    blocks.STRIPE_COLUMNS, scorer_tiles.CPU_TEXTS_PER_TILE = 3, 5
    world, model = World.current(), Model(*SCORERS[scorer])
    text, audio, ids = data()
    mine = rows_of(world)
    block = model.scorer.block(*model.encode(text.take(mine), audio.take(mine)), world)
    pairs = (world.gather(ids[mine]), ids[mine])
    loss = getattr(tiled, objective)(block, 0.2, positives=pairs, **OBJECTIVES[objective])
    loss.backward()
    gradients = [world.sum(gradient(p)).numpy() for p in used(model)]
    return loss.item(), gradients


def loss_of_one(scorer: str, objective: str) -> tuple[float, list[np.ndarray]]:
    model = Model(*SCORERS[scorer])
    text, audio, ids = data()
    scores = model.scorer.scores(*model.encode(text, audio))
    loss = getattr(dense, objective)(scores, 0.2, positives=positives_mask(ids, ids), **OBJECTIVES[objective])
    loss.backward()
    return loss.item(), [gradient(p).numpy() for p in used(model)]


def used(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.grad is not None]


def gathered_words() -> tuple[list[Any], list[Any]]:
    """Of captions whose longest is of another length on every rank: what arrives, and the gradient that returns."""
    world = World.current()
    mine = random_sequence([1, world.rank + 2], DIM, world.rank, gradient=True)
    text = gather_sequence(mine, world, with_tokens=True)
    (text.tokens * torch.arange(1, text.tokens.numel() + 1).view_as(text.tokens)).sum().backward()
    assert mine.tokens.grad is not None
    return [x.detach().numpy() for x in (text.tokens, text.mask, text.pooled)], [mine.tokens.grad.numpy()]


def on_rank() -> dict[str, Any]:
    """All that ranks are asked; one start of them serves all tests."""
    return {"losses": [loss_of_ranks(*case) for case in CASES], "words": gathered_words()}


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return run_ranks(on_rank, request.param)


def assert_equal_one_process(losses: list[tuple[float, list[np.ndarray]]]) -> None:
    for case, (found_loss, found) in zip(CASES, losses, strict=True):
        loss, gradients = loss_of_one(*case)
        assert abs(found_loss - loss) < 1e-12, case
        for got, want in zip(found, gradients, strict=True):
            assert np.abs(got - want).max() < 1e-12, case


def test_one_rank_equals_dense_objectives() -> None:
    assert_equal_one_process([loss_of_ranks(*case) for case in CASES])


def test_gradients_equal_one_process(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert_equal_one_process(rank["losses"])


def test_captions_of_unequal_length_are_gathered(ranks: list[dict[str, Any]]) -> None:
    expected = TokenSequence.cat([random_sequence([1, rank + 2], DIM, rank) for rank in range(len(ranks))])
    real = expected.mask.numpy()
    factor = torch.arange(1, expected.tokens.numel() + 1).view_as(expected.tokens).double()
    for number, rank in enumerate(ranks):
        (tokens, mask, pooled), (gradient,) = rank["words"]
        assert np.array_equal(mask, real) and np.array_equal(tokens[real], expected.tokens[expected.mask].numpy())
        assert np.array_equal(pooled, expected.pooled.numpy())
        own = factor[2 * number : 2 * number + 2, : number + 2].numpy()
        assert np.array_equal(gradient, len(ranks) * own)  # one share from every rank


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"residual": True}, {"residual": True, "dropout": 0.2}])
def test_text_aware_pooling_under_zero_3(tmp_path: Path, options: dict[str, Any]) -> None:
    """Tiles are computed again in the backward pass, when ZeRO-3 has partitioned the parameters."""
    from tests.tiny_run import tiny_config  # with DeepSpeed behind it: ranks of the other tests start without
    from tools.parity import curves, with_train

    config = tiny_config(tmp_path, tmp_path / "run")
    config.model.scorer.name, config.model.scorer.options = "tap", {"attention_dim": 16, **options}
    size = 1 if "dropout" in options else 2  # ranks draw their own numbers
    configs = [with_train(config, zero_stage=stage) for stage in (0, 3)]
    expected, found = run_ranks(curves, size, configs, 3)[0]
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=2e-5)
    assert sum("scorer" in name for name in found["gradients"]) == (15 if "residual" in options else 8)
    for name, gradient in expected["gradients"].items():
        largest = max(np.abs(g).max() for g in expected["gradients"].values())
        np.testing.assert_allclose(found["gradients"][name], gradient, rtol=1e-4, atol=2e-5 * largest, err_msg=name)
