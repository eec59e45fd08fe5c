"""Every scorer on the device in fp32 against itself in float64 on the CPU: scores, and gradients of all its inputs."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from atr_scale.batch import TokenSequence
from atr_scale.scorers import SCORERS, build_scorer
from atr_scale.scorers.scorer import Scorer
from tools.gpu_check.losses import relative
from tools.gpu_check.rows import Case, Row, Skip, compared
from tools.gpu_check.runner import Setting

WIDTH = 64
TEXTS, CLIPS, WORDS, FRAMES = 21, 10, 12, 30
OPTIONS: dict[str, dict[str, Any]] = {
    "tap": {"attention_dim": 32, "residual": True},
    "coattention": {"depth": 2, "width": 64, "heads": 2, "ffn_width": 64, "pool_width": 32, "joint": 64},
}
BOUNDS = {"ieee": 5e-5, "tf32": 2e-2, "bf16x3": 5e-4}


def cases(setting: Setting) -> Iterator[Case]:
    for name in SCORERS:
        kinds = ("ieee",) if getattr(build_scorer(name, WIDTH), "is_dual_encoder", False) else tuple(BOUNDS)
        for products in kinds:
            yield f"{name}, {products}", partial(scored, setting, name, products)


def scored(setting: Setting, name: str, products: str) -> Row:
    if products == "tf32" and not setting.cuda:
        raise Skip("needs CUDA")
    torch.manual_seed(0)
    scorer: Any = build_scorer(name, WIDTH, **OPTIONS.get(name, {})).eval()  # without dropout
    exact = copy.deepcopy(scorer).double()
    inputs = sequence(TEXTS, WORDS, 1), sequence(CLIPS, FRAMES, 2)
    expected = gradients(exact, *inputs)
    if products != "ieee":
        scorer.products = products
    found = gradients(scorer.to(setting.device), *(_moved(side, setting.device) for side in inputs))
    errors = {kind: relative(found[kind], expected[kind]) for kind in expected}
    note = ", ".join(f"{kind} {error:.1e}" for kind, error in errors.items())
    return compared(max(errors.values()), BOUNDS[products], note=note)


def sequence(rows: int, tokens: int, seed: int) -> TokenSequence:
    """Float64 sequences of unequal lengths whose values fp32 holds; padding is not zero."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, tokens, WIDTH, generator=generator).double()
    lengths = torch.randint(1, tokens + 1, (rows, 1), generator=generator)
    pooled = torch.randn(rows, WIDTH, generator=generator).double()
    return TokenSequence(values, torch.arange(tokens) < lengths, pooled)


def _moved(side: TokenSequence, device: str) -> TokenSequence:
    return TokenSequence(side.tokens.to(device).float(), side.mask.to(device), side.pooled.to(device).float())


def gradients(scorer: Scorer, text: TokenSequence, audio: TokenSequence) -> dict[str, Tensor]:
    """The scores, and the gradients of a weighted sum of them by texts, audios and all parameters together."""
    text, audio = (TokenSequence(x.tokens.clone().requires_grad_(), x.mask, x.pooled.clone().requires_grad_())
                   for x in (text, audio))  # fmt: skip
    scores = scorer.scores(text, audio)
    weight = torch.randn(scores.shape, generator=torch.Generator().manual_seed(3)).to(scores)
    parameters: list[nn.Parameter] = list(scorer.parameters())
    leaves = [text.tokens, text.pooled, audio.tokens, audio.pooled, *parameters]
    found = torch.autograd.grad((scores * weight).sum(), leaves, allow_unused=True)
    parts = {"texts": found[:2], "audios": found[2:4], "parameters": found[4:]}
    flat = {name: [g.flatten().double() for g in part if g is not None] for name, part in parts.items()}
    return {"scores": scores.detach(), **{name: torch.cat(part) for name, part in flat.items() if part}}
