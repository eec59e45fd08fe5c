"""Pairwise scorers, forward and backward, against plain implementations where these fit, and against their products."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from atr_scale.batch import TokenSequence
from atr_scale.scorers import build_scorer
from tools.bench.scorers import naive_local_global, naive_pooling
from tools.gpu_check.loss_speed import PRODUCTS
from tools.gpu_check.measure import measured, median_ms
from tools.gpu_check.rows import Case, Row, Skip
from tools.gpu_check.runner import Setting

WORDS, FRAMES = 20, 32


class _Head(NamedTuple):
    """A scorer: its width, options, sizes (a side), and a plain implementation that fits at the first size.

    quick: options and size of a quick run.
    """

    width: int
    options: dict[str, Any]
    sizes: tuple[int, ...]
    quick: tuple[dict[str, Any], int]
    naive: Callable[[Any, TokenSequence, TokenSequence], Tensor] | None


HEADS = {
    "tap": _Head(1024, {"attention_dim": 512}, (384, 4096), ({}, 24), naive_pooling),
    "lgmm": _Head(512, {}, (128, 2048), ({}, 12), naive_local_global),
    "coattention": _Head(768, {"dropout": 0.0}, (64,), ({"depth": 1, "width": 64, "ffn_width": 64}, 2), None),
}


def cases(setting: Setting) -> Iterator[Case]:
    for name, head in HEADS.items():
        for size in head.sizes if not setting.quick else [head.quick[1]]:
            for products in PRODUCTS:
                yield f"{name}, {size} x {size}, {products}", partial(row, setting, name, size, products)


def row(setting: Setting, name: str, size: int, products: str) -> Row:
    if products == "tf32" and not setting.cuda:
        raise Skip("needs CUDA")
    head = HEADS[name]
    options = head.options | (head.quick[0] if setting.quick else {})
    scorer: Any = build_scorer(name, head.width, **options).to(setting.device)
    scorer.products = products

    def step(scores: Callable[..., Tensor], text: TokenSequence, audio: TokenSequence) -> None:
        scores(text, audio).square().sum().backward()
        scorer.zero_grad()

    def fresh(number: int) -> tuple[TokenSequence, TokenSequence]:
        return (_sequence(setting, size, WORDS, head.width, number),
                _sequence(setting, size, FRAMES, head.width, 99 + number))  # fmt: skip

    found = measured(setting, partial(step, scorer.scores), fresh, products, repeats=3)
    if head.naive and size <= head.sizes[0] and products == "ieee":
        plain = partial(step, partial(head.naive, scorer))
        plain(*fresh(0))
        found.reference["a vector a pair"] = median_ms(plain, fresh, repeats=3)
    return found


def _sequence(setting: Setting, rows: int, tokens: int, width: int, seed: int) -> TokenSequence:
    generator = torch.Generator(setting.device).manual_seed(seed)
    values = torch.randn(rows, tokens + 1, width, generator=generator, device=setting.device)
    mask = torch.ones(rows, tokens, dtype=torch.bool, device=setting.device)
    return TokenSequence(values[:, 1:].clone().requires_grad_(), mask, values[:, 0].clone().requires_grad_())
