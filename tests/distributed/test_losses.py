"""The global-batch losses: 1, 2 and 3 ranks against one process and the dense formulas, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from atr_scale import score_block as blocks
from atr_scale.distributed.world import World
from atr_scale.losses import dense, tiled
from atr_scale.losses.temperature import Temperature
from atr_scale.losses.tiled import tiles
from atr_scale.score_block import EmbeddingScores, StoredScores
from tests.losses import BLOCKS, CASES, dense_loss, tiled_loss, unit
from tools.ranks import run_ranks

B = 12


class Towers(nn.Module):
    """Two small encoders with biases, a norm and a learned temperature: everything a gradient can go wrong in."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.text = nn.Sequential(nn.Linear(7, 16), nn.Tanh(), nn.LayerNorm(16), nn.Linear(16, 6))
        self.audio = nn.Sequential(nn.Linear(9, 16), nn.Tanh(), nn.Linear(16, 6))
        self.temperature = Temperature(0.1, 0.01, 1.0, True)
        self.double()

    def embed(self, text: Tensor, audio: Tensor) -> tuple[Tensor, Tensor]:
        return normalize(self.text(text), dim=-1), normalize(self.audio(audio), dim=-1)


def data() -> tuple[Tensor, Tensor, Tensor]:
    """Texts, audios and ids [B, 2]; clip 0 comes three times and falls on every rank, and two clips share a caption."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(B, 7, generator=generator, dtype=torch.float64)
    audio = torch.randn(B, 9, generator=generator, dtype=torch.float64)
    clip = torch.arange(B)
    clip[[4, 9]] = 0
    audio[[4, 9]] = audio[0].clone()
    caption = torch.arange(B) + 100
    caption[7] = caption[2]
    text[7] = text[2].clone()
    return text, audio, torch.stack([clip, caption], 1)


def gradients(model: nn.Module) -> list[np.ndarray]:
    return [p.grad.numpy().copy() for p in model.parameters()]  # type: ignore[union-attr]


def averaged(model: nn.Module, size: int) -> list[np.ndarray]:
    """What data parallel training makes of the ranks' gradients."""
    for parameter in model.parameters():
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad)
        parameter.grad.div_(size)
    return gradients(model)


def global_loss(case: str, kind: str, with_ids: bool) -> tuple[float, list[np.ndarray]]:
    """One rank's part of the recipe: texts gathered, audio kept, world size times the global mean loss."""
    blocks.STRIPE_COLUMNS = 3  # several stripes, the last one not full
    tiles.TILE_ROWS = 5
    world = World.current()
    model = Towers()
    share = B // world.size
    mine = slice(world.rank * share, (world.rank + 1) * share)
    text, audio, ids = (x[mine] for x in data())
    teacher = unit(B, 5, 98)[mine], unit(B, 5, 99)[mine]
    positives = (ids, ids) if with_ids else None
    loss = tiled_loss(case, BLOCKS[kind], *model.embed(text, audio), model.temperature(), positives, teacher)
    (world.size * loss).backward()
    return loss.item(), averaged(model, world.size) if world.size > 1 else gradients(model)


def dense_of_towers(case: str, with_ids: bool) -> tuple[float, list[np.ndarray]]:
    model = Towers()
    text, audio, ids = data()
    teacher = unit(B, 5, 98), unit(B, 5, 99)
    positives = (ids, ids) if with_ids else None
    loss = dense_loss(case, *model.embed(text, audio), model.temperature(), positives, teacher)
    loss.backward()
    return loss.item(), gradients(model)


def largest(a: list[np.ndarray], b: list[np.ndarray]) -> float:
    return max(float(np.abs(x - y).max()) for x, y in zip(a, b, strict=True))


def all_cases() -> list[tuple[str, str, bool]]:
    return [(case, kind, ids) for case in CASES for kind in BLOCKS for ids in (False, True)]


def on_rank() -> dict[Any, tuple[float, list[np.ndarray]]]:
    return {key: global_loss(*key) for key in all_cases()}


@pytest.mark.parametrize("size", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_gradients_equal_one_process(size: int) -> None:
    """The temperature's too, with duplicated clips and captions across ranks."""
    ranks = run_ranks(on_rank, size) if size > 1 else [on_rank()]
    for case, kind, ids in all_cases():
        loss, grads = dense_of_towers(case, ids)
        for rank in ranks:
            got_loss, got = rank[case, kind, ids]
            assert abs(got_loss - loss) < 1e-12, (case, kind, ids)
            # A sharp prior multiplies the last bits of a score, which are those of the processor's products, by 120.
            assert largest(got, grads) < (5e-12 if case == "pmr_sharp" else 1e-12), (case, kind, ids)


# The recipes that are common and wrong, and by how much (SCALE of the error: relative to the largest gradient).


def wrong_recipes() -> dict[str, list[np.ndarray]]:
    world = World.current()
    text, audio, _ = data()
    share = B // world.size
    mine = slice(world.rank * share, (world.rank + 1) * share)
    out = {}

    def run(name: str, loss_of: Any) -> None:
        model = Towers()
        loss_of(model, *model.embed(text[mine], audio[mine])).backward()
        out[name] = averaged(model, world.size)

    def plain_gather(x: Tensor) -> Tensor:
        parts = [torch.zeros_like(x) for _ in range(world.size)]
        dist.all_gather(parts, x.detach())
        return torch.cat([x if i == world.rank else part for i, part in enumerate(parts)])

    run("local loss without gather", lambda m, t, a: dense.nt_xent(t @ a.T, m.temperature()))

    def detached(m: Towers, t: Tensor, a: Tensor) -> Tensor:
        logits = plain_gather(t) @ plain_gather(a).T / m.temperature()
        target = torch.arange(B)
        mine_only = cross_entropy(logits[mine], target[mine]) + cross_entropy(logits.T[mine], target[mine])
        return mine_only / 2

    run("gather without gradient", detached)
    run(
        "global loss without the factor of the world's size",
        lambda m, t, a: tiled.nt_xent(EmbeddingScores(world.gather(t), a), m.temperature()),
    )
    run(
        "texts gathered without gradient",
        lambda m, t, a: world.size * tiled.nt_xent(EmbeddingScores(plain_gather(t), a), m.temperature()),
    )
    run(
        "the right recipe",
        lambda m, t, a: world.size * tiled.nt_xent(EmbeddingScores(world.gather(t), a), m.temperature()),
    )
    return out


def test_wrong_recipes_fail() -> None:
    _, right = dense_of_towers("nt_xent", with_ids=False)
    scale = max(float(np.abs(g).max()) for g in right)
    errors = {name: largest(grads, right) / scale for name, grads in run_ranks(wrong_recipes, 3)[0].items()}
    assert errors.pop("the right recipe") < 1e-12
    for name, error in errors.items():
        assert error > 0.05, f"{name}: relative error {error:.3f}"


def lonely_scores() -> Tensor:
    """A clip far from all captions: the sum of its column is lost under the shift that suits all others."""
    scores = 10 * torch.randn(B, B, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    scores[:, B - 1] -= 90
    return scores.requires_grad_()


def losses_of_a_lonely_clip() -> dict[str, tuple[float, np.ndarray]]:
    world, share = World.current(), B // World.current().size
    mine = slice(world.rank * share, (world.rank + 1) * share)
    found = {}
    for name, options in {"nt_xent": {}, "pmr": {"omega": 0.5}}.items():
        scores = lonely_scores().detach()[:, mine].requires_grad_()
        loss = getattr(tiled, name)(StoredScores(scores), 0.1, **options)
        loss.backward()
        assert scores.grad is not None
        found[name] = loss.item(), scores.grad.numpy()
    return found


def test_ranks_agree_where_one_alone_needs_the_maxima() -> None:
    ranks = run_ranks(losses_of_a_lonely_clip, 2)
    for name, options in {"nt_xent": {}, "pmr": {"omega": 0.5}}.items():
        scores = lonely_scores()
        loss = getattr(dense, name)(scores, 0.1, **options)
        loss.backward()
        assert scores.grad is not None
        assert all(abs(rank[name][0] - loss.item()) < 1e-11 * abs(loss.item()) for rank in ranks), name
        gradient = np.concatenate([rank[name][1] for rank in ranks], 1)
        assert np.abs(gradient - scores.grad.numpy()).max() < 1e-12, name
