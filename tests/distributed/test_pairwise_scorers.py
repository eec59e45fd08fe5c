"""Scorers of pairs over ranks: captions travel with their words, clips stay, gradients are those of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from atr_scale.batch import TokenSequence
from atr_scale.config_model import ScorerSection
from atr_scale.distributed.world import World
from atr_scale.losses import dense, tiled
from atr_scale.losses.targets import positives_mask
from atr_scale.scorers import build_scorer
from tests.sequences import random_sequence
from tests.tiny_run import tiny_config
from tools.parity import curves, with_train
from tools.ranks import run_ranks

B, DIM = 6, 5
WORDS, FRAMES = [2, 1, 3, 6, 4, 5], [3, 4, 1, 2, 6, 2]  # no two ranks have the same longest caption or clip
SMALL = {"width": 4, "heads": 2, "ffn_width": 6, "dropout": 0.0, "pool_width": 3, "joint": 4, "pairs_per_tile": 4}
SCORERS: dict[str, dict[str, Any]] = {
    "tap": {"name": "tap", "attention_dim": 3},
    "lgmm": {"name": "lgmm"},
    "lgmm both": {"name": "lgmm", "direction": "both", "normalise": "clipped_l2"},
    "coattention": {"name": "coattention", "configuration": "stacking", "depth": 2, **SMALL},
    "coattention both": {"name": "coattention", "configuration": "iterating", "depth": 2, "guidance": "both", **SMALL},
}
OBJECTIVES: dict[str, dict[str, Any]] = {"nt_xent": {}, "pmr": {"omega": 5.0}}
TEMPERATURE = 0.2


class Model(nn.Module):
    """One layer a modality under the scorer, so that gradients pass through both sides of the gather."""

    def __init__(self, case: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.text, self.audio = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.scorer = build_scorer(dim=DIM, **SCORERS[case])
        self.double()
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)

    def encode(self, rows: slice) -> tuple[TokenSequence, TokenSequence]:
        """Texts and audios of `rows`, padded no further than to the longest of them."""
        text, audio = random_sequence(WORDS, DIM, 1), random_sequence(FRAMES, DIM, 2)
        return cut(text, rows, max(WORDS[rows])).map(self.text, self.text), cut(audio, rows, max(FRAMES[rows])).map(
            self.audio, self.audio
        )


def cut(sequence: TokenSequence, rows: slice, length: int) -> TokenSequence:
    return TokenSequence(sequence.tokens[rows, :length], sequence.mask[rows, :length], sequence.pooled[rows])


def ids() -> Tensor:
    """Clip 0 comes again in the last row, on another rank."""
    return torch.tensor([[0], [1], [2], [3], [4], [0]])


def gradients(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: p.grad.numpy().copy() for name, p in model.named_parameters() if p.grad is not None}


def on_rank() -> dict[tuple[str, str], tuple[float, dict[str, np.ndarray]]]:
    """Of every scorer under every objective: the loss, and the gradients as data-parallel training averages them."""
    world, found = World.current(), {}
    share = B // world.size
    mine = slice(world.rank * share, (world.rank + 1) * share)
    for case in SCORERS:
        for objective, options in OBJECTIVES.items():
            model = Model(case)
            block = model.scorer.block(*model.encode(mine), world)
            positives = (world.gather(ids()[mine]), ids()[mine])
            loss = getattr(tiled, objective)(block, TEMPERATURE, positives=positives, **options)
            (world.size * loss).backward()
            if world.size > 1:
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        dist.all_reduce(parameter.grad)
                        parameter.grad /= world.size
            found[case, objective] = loss.item(), gradients(model)
    return found


@pytest.fixture(scope="module")
def expected() -> dict[tuple[str, str], tuple[float, dict[str, np.ndarray]]]:
    found = {}
    for case in SCORERS:
        for objective, options in OBJECTIVES.items():
            model = Model(case)
            scores = model.scorer.scores(*model.encode(slice(0, B)))
            positives = positives_mask(ids(), ids())
            loss = getattr(dense, objective)(scores, TEMPERATURE, positives=positives, **options)
            loss.backward()
            found[case, objective] = loss.item(), gradients(model)
    return found


@pytest.mark.parametrize("size", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3))])
def test_gradients_equal_one_process(size: int, expected: dict[Any, tuple[float, dict[str, np.ndarray]]]) -> None:
    for rank in run_ranks(on_rank, size) if size > 1 else [on_rank()]:
        for case, (loss, wanted) in expected.items():
            found_loss, found = rank[case]
            assert abs(found_loss - loss) < 1e-12, case
            assert found.keys() == wanted.keys(), case
            for name, gradient in wanted.items():
                np.testing.assert_allclose(found[name], gradient, rtol=0, atol=1e-12, err_msg=f"{case} {name}")


@pytest.mark.slow
def test_tiles_are_computed_again_under_zero_3(tmp_path: Path) -> None:
    """Sharded parameters are gathered once more in the backward pass, also where one block serves all layers."""
    configs = []
    for shared in (False, True):
        config = tiny_config(tmp_path, tmp_path / "run").model_copy(deep=True)
        options = {"depth": 2, "guidance": "both", "share_weights": shared, **SMALL, "pairs_per_tile": 36}
        config.model.scorer = ScorerSection(name="coattention", options=options)
        configs.append(config)
    expected = run_ranks(curves, 1, [with_train(config, zero_stage=0) for config in configs], 2)[0]
    sharded = run_ranks(curves, 2, [with_train(config, zero_stage=3) for config in configs], 2)
    for rank in sharded:
        for found, wanted in zip(rank, expected, strict=True):
            np.testing.assert_allclose(found["loss"], wanted["loss"], rtol=2e-5)
            largest = max(np.abs(g).max() for g in wanted["gradients"].values())
            for name, gradient in wanted["gradients"].items():
                np.testing.assert_allclose(
                    found["gradients"][name], gradient, rtol=1e-4, atol=2e-5 * largest, err_msg=name
                )
