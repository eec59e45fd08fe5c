"""Ranks and best-k lists are exact on the device, also in a process that allows TF32 for its encoders."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from atr_scale.evaluation.metrics import Ranks
from atr_scale.evaluation.ranks import best_items, embedding_ranks
from atr_scale.products import fp32_products
from tools.gpu_check.measure import median_ms
from tools.gpu_check.rows import Case, Row, compared
from tools.gpu_check.runner import Setting

WIDTH, K = 512, 10
NOISE = {"good model": 4.0, "random embeddings": 1e6}


def cases(setting: Setting) -> Iterator[Case]:
    for kind in NOISE:
        yield f"ranks, {kind}", partial(ranks, setting, kind)
        yield f"best {K}, {kind}", partial(best, setting, kind)


def ranks(setting: Setting, kind: str) -> Row:
    """Against the count of float64 scores above that of the clip; `error` is the share of ranks that differ."""
    text, audio = _vectors(setting, kind)
    size = len(text)
    scores = text.double() @ audio.double().T
    own = scores.diagonal()
    expected = [1 + (scores > own[:, None]).sum(1).numpy(), 1 + (scores > own[None]).sum(0).numpy()]
    text, audio = (x.to(setting.device) for x in (text, audio))

    def count() -> Ranks:
        return embedding_ranks(text, audio, np.arange(size), np.arange(size))

    with fp32_products("tf32"):
        found = count()
        ms = median_ms(count, lambda _: (), 3)
    with fp32_products("ieee"):
        product = median_ms(lambda: text @ audio.T, lambda _: (), 3)
    wrong = np.mean([*(found.t2a != expected[0]), *(found.a2t != expected[1])])
    return compared(float(wrong), 0.0, ms=ms, reference={"the plain product alone": product})


def best(setting: Setting, kind: str) -> Row:
    """Against the sorted float64 scores; `error` is the share of places that differ."""
    text, audio = _vectors(setting, kind)
    expected = (text.double() @ audio.double().T).topk(K).indices
    text, audio = (x.to(setting.device) for x in (text, audio))
    with fp32_products("tf32"):
        found = best_items(text, audio, K)
        ms = median_ms(lambda: best_items(text, audio, K), lambda _: (), 3)
    return compared((found.cpu() != expected).double().mean().item(), 0.0, ms=ms)


def _vectors(setting: Setting, kind: str) -> tuple[Tensor, Tensor]:
    """Unit vectors [n, d] of texts and audios; text i lies near audio i. No two scores are equal."""
    size = 300 if setting.quick else 8000
    generator = torch.Generator().manual_seed(0)
    audio = torch.randn(size, WIDTH, generator=generator)
    text = audio + NOISE[kind] * torch.randn(size, WIDTH, generator=generator)
    return normalize(text, dim=1), normalize(audio, dim=1)
