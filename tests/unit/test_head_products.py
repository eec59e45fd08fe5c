"""Products of the pairwise scorers at every precision: scores and gradients within the bound that each promises."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from atr_scale.batch import TokenSequence
from atr_scale.products import HeadProducts
from atr_scale.scorers import build_scorer
from tests.sequences import random_sequence

DIM = 48
# Relative, of norms; tf32 is fp32 on a CPU. A gradient of TAP passes three products in a row: 2.3e-5 to 2.9e-5 here.
BOUNDS = {"ieee": 2e-6, "tf32": 2e-6, "bf16x3": 2e-5}
IN_A_ROW = {"tap": 2, "lgmm": 1}
SCORERS = {"tap": {"attention_dim": 32}, "lgmm": {}}


def found(name: str, kind: HeadProducts, dtype: torch.dtype, texts: int) -> list[Tensor]:
    torch.manual_seed(0)
    scorer = build_scorer(name, dim=DIM, **SCORERS[name]).to(dtype)
    scorer.products = kind
    text, audio = random_sequence([5, 3] * (texts // 2), DIM, 1), random_sequence([8, 6, 8], DIM, 2)
    text, audio = (
        TokenSequence(*(x if x.dtype == torch.bool else x.float().to(dtype) for x in s)) for s in (text, audio)
    )
    leaves = [x.requires_grad_() for x in (text.pooled if name == "tap" else text.tokens, audio.tokens)]
    scores = scorer.scores(text, audio)
    return [scores.detach(), *torch.autograd.grad((scores * 5).exp().sum(), [*leaves, *scorer.parameters()])]


@pytest.mark.parametrize("kind", get_args(HeadProducts))
@pytest.mark.parametrize(("name", "texts"), [("tap", 8), ("tap", 40), ("lgmm", 8)])  # few captions, many
def test_products_keep_their_bound(name: str, texts: int, kind: HeadProducts) -> None:
    exact, plain = found(name, "ieee", torch.float64, texts), found(name, "ieee", torch.float32, texts)
    for got, same, want in zip(found(name, kind, torch.float32, texts), plain, exact, strict=True):
        assert (got.double() - want).norm() <= IN_A_ROW[name] * BOUNDS[kind] * want.norm() + 1e-7
        assert kind == "bf16x3" or torch.equal(got, same)
    if kind == "bf16x3":
        assert all(torch.equal(a, b) for a, b in zip(found(name, kind, torch.float64, texts), exact, strict=True))
        assert not torch.equal(found(name, kind, torch.float32, texts)[0], plain[0])
