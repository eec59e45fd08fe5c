"""Ranks and best-k lists of two sets of embeddings.

Rank counting computes the scores of one plain product and keeps none of them; one tile serves both directions. Pairs
that float32 cannot decide are scored again in float64: one or two for each text of a good model, more of a weak model,
which finds half of the clips first, and about twenty of random embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from atr_scale.evaluation.metrics import Ranks
from atr_scale.evaluation.ranks import best_items, embedding_ranks
from tools.bench.measure import peak_mib, seconds
from tools.bench.table import Row, run

TEXTS, AUDIOS, WIDTH = 20_000, 20_000, 512
K = 10


def rows() -> Iterator[Row]:
    torch.set_num_threads(1)
    text, audio = vectors(noise=4.0)
    size = f"{TEXTS} x {AUDIOS}, d = {WIDTH}"
    gemm_is, faiss_is = "the plain product alone", f"faiss, top {K} twice"

    def product() -> Tensor:
        return text @ audio.T

    counted, listed, gemm, *faiss = seconds(
        ranks(text, audio), lambda: best_items(text, audio, K), product, *faiss_search(text, audio), repeats=3
    )
    yield Row(f"ranks, both directions, {size}", counted, gemm, gemm_is, "CPU s", 1.0)
    for theirs in faiss:
        yield Row(f"ranks, both directions, {size}", counted, theirs, faiss_is, "CPU s", 1.0)
    yield Row(f"best {K} of every text, {size}", listed, gemm, gemm_is, "CPU s")
    matrix = peak_mib(product)
    yield Row("memory of ranks", peak_mib(ranks(text, audio)), matrix, "the score matrix", "MiB")
    lists_peak = peak_mib(lambda: best_items(text, audio, K))
    yield Row(f"memory of the best {K}", lists_peak, matrix, "the score matrix", "MiB")

    text, audio = vectors(noise=6.0, spread=0.5)
    first = np.mean(ranks(text, audio)().t2a == 1)
    counted, gemm = seconds(ranks(text, audio), product, repeats=3)
    yield Row(f"ranks of a weak model, t2a/R@1 {first:.2f}, {size}", counted, gemm, gemm_is, "CPU s", 1.0)
    text, audio = vectors(noise=1e6)
    counted, gemm = seconds(ranks(text, audio), product, repeats=3)
    yield Row(f"ranks of random embeddings, {size}", counted, gemm, gemm_is, "CPU s")


def vectors(noise: float, spread: float = 0.0) -> tuple[Tensor, Tensor]:
    """Unit vectors. A caption lies near its clip; with a spread, not all captions lie equally near."""
    generator = torch.Generator().manual_seed(0)
    audio = torch.randn(AUDIOS, WIDTH, generator=generator)
    scale = noise * (spread * torch.randn(TEXTS, 1, generator=generator)).exp()
    text = audio[:TEXTS] + scale * torch.randn(TEXTS, WIDTH, generator=generator)
    return normalize(text, dim=1), normalize(audio, dim=1)


def ranks(text: Tensor, audio: Tensor) -> Callable[[], Ranks]:
    return lambda: embedding_ranks(text, audio, np.arange(TEXTS), np.arange(AUDIOS))


def faiss_search(text: Tensor, audio: Tensor) -> list[Callable[[], object]]:
    """Exact search of the best K in both directions; an empty list if faiss is not installed."""
    try:
        import faiss
    except ImportError:
        return []
    faiss.omp_set_num_threads(1)
    sides = text.numpy(), audio.numpy()
    indexes = [faiss.IndexFlatIP(WIDTH) for _ in sides]
    for index, side in zip(indexes, sides, strict=True):
        index.add(side)
    return [lambda: (indexes[1].search(sides[0], K), indexes[0].search(sides[1], K))]


if __name__ == "__main__":
    run(__doc__, rows)
