"""How exact the tiled losses are in fp32, by the precision of their products and in hard cases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from atr_scale.losses import dense, tiled
from atr_scale.losses.targets import positives_mask
from atr_scale.products import HeadProducts
from atr_scale.score_block import EmbeddingScores, ScoreBlock, StoredScores

Loss = Callable[..., Tensor]
BATCH, WIDTH = 256, 64
LOSSES: dict[str, dict[str, Any]] = {"nt_xent": {}, "pmr": {"omega": 14.3}}


def vectors(rows: int, seed: int) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matching() -> tuple[Tensor, Tensor]:
    """Texts and audios of one pair are about as near each other as those of a trained model; unit vectors of fp32."""
    common = vectors(BATCH, 3)
    text, audio = (normalize(common + vectors(BATCH, seed), dim=1).float() for seed in (1, 2))
    return text, audio


def gradients(loss: Loss, *inputs: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(loss(*leaves), leaves)


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def errors(name: str, tau: float, make: Callable[[Tensor, Tensor], ScoreBlock]) -> list[float]:
    """Relative errors of the gradients of texts, of audios and of the temperature against float64."""
    options, inputs = LOSSES[name], (*matching(), torch.tensor([tau]))
    exact = gradients(lambda t, a, h: getattr(dense, name)(t @ a.T, h, **options), *(x.double() for x in inputs))
    found = gradients(lambda t, a, h: getattr(tiled, name)(make(t, a), h, **options), *inputs)
    return [relative(x, y) for x, y in zip(found, exact, strict=True)]


# On a CPU tf32 is fp32; what it costs on a GPU only a GPU shows.
@pytest.mark.parametrize("kind, bound", [("ieee", 4e-6), ("tf32", 4e-6), ("bf16x3", 2e-5)])
@pytest.mark.parametrize("tau", [0.05, 0.01])
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_by_the_precision_of_products(name: str, tau: float, kind: HeadProducts, bound: float) -> None:
    assert max(errors(name, tau, lambda t, a: EmbeddingScores(t, a, products=kind))) <= bound


@pytest.mark.parametrize("name", LOSSES)
def test_products_of_bf16_alone_are_why_they_are_not_offered(name: str) -> None:
    def rounded(text: Tensor, audio: Tensor) -> EmbeddingScores:
        return EmbeddingScores(text.bfloat16().float(), audio.bfloat16().float())

    assert errors(name, 0.05, rounded)[0] > 2e-3 and errors(name, 0.01, rounded)[0] > 5e-3


def nearly_equal_scores() -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """fp32 scores of vectors that differ by 2 %, as at a collapsed start, and ids with several positives a query."""
    torch.manual_seed(160)
    common = torch.randn(1, WIDTH)
    text, audio = (normalize(0.02 * torch.randn(rows, WIDTH) + 0.98 * common, dim=1) for rows in (90, 70))
    first, second = (torch.randint(40, (rows, 2)) + torch.tensor([0, 1000]) for rows in (90, 70))
    return text @ audio.T, (first, second)


@pytest.mark.parametrize("kept", [0, 2**20])
@pytest.mark.parametrize("tau", [2**-6, 2**-4, 1.0])  # by which dividing rounds nothing
def test_gradient_of_the_temperature_at_nearly_equal_scores(tau: float, kept: int) -> None:
    """It is a difference that is 10^-5 of its terms: it was up to 4e-2 off."""
    scores, ids = nearly_equal_scores()
    temperature, mask = torch.tensor([tau]), positives_mask(*ids)
    _, exact = gradients(lambda s, h: dense.nt_xent(s, h, mask), scores.double(), temperature.double())
    _, found = gradients(lambda s, h: tiled.nt_xent(StoredScores(s), h, ids, kept), scores, temperature)
    assert relative(found, exact) < 1e-4


@pytest.mark.parametrize("omega", [14.3, 60.0, 120.0])
def test_a_sharp_prior_at_the_lowest_temperature(omega: float) -> None:
    """Revised logits are up to 100. Their last bits differed between the sweeps: gradients were 5e-5 to 9e-5 off."""
    text, audio = matching()
    scores, temperature = text @ audio.T, torch.tensor([0.01])
    exact, _ = gradients(lambda s, h: dense.pmr(s, h, omega), scores.double(), temperature.double())
    found, _ = gradients(lambda s, h: tiled.pmr(StoredScores(s), h, omega), scores, temperature)
    assert relative(found, exact) < 5e-6
