"""Ranks and result lists of two sets of vectors.

Rank counting computes the scores of one plain product, both directions from one tile, and keeps none of them. Ranks and
lists are those of exact scores, whatever precision the tiles have. Tiles in bfloat16 leave more pairs to be scored
again, the more so the worse a model ranks: hence the rows of a weak model, which finds half of the clips first. The
product in bfloat16 alone is the floor of what bfloat16 can save; without units for it (AVX512-BF16, AMX, a GPU) a
processor saves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from atr_scale.evaluation.coarse import Precision
from atr_scale.evaluation.lists import nearest
from atr_scale.evaluation.rank_counts import vector_ranks
from torch import Tensor
from torch.nn.functional import normalize

from atr_scale.evaluation.metrics import Ranks
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

    coarse = text.bfloat16(), audio.bfloat16()
    search = faiss_search(text, audio)
    fp32, bf16, gemm, coarse_gemm, *faiss = seconds(
        ranks(text, audio, "fp32"),
        ranks(text, audio, "bf16"),
        product,
        lambda: coarse[0] @ coarse[1].T,
        *search,
        repeats=3,
    )
    yield Row(f"ranks, both directions, {size}", fp32, gemm, gemm_is, "CPU s", 1.0)
    yield Row("the same by bfloat16", bf16, gemm, gemm_is, "CPU s", 0.30)
    yield Row("product in bfloat16", coarse_gemm, gemm, "in float32", "CPU s")
    for theirs in faiss:
        yield Row(f"ranks, both directions, {size}", fp32, theirs, faiss_is, "CPU s", 1.0)
        yield Row("the same by bfloat16", bf16, theirs, faiss_is, "CPU s", 1.0)

    found = lists(text, audio, "fp32"), lists(text, audio, "bf16")
    fp32, bf16, gemm = seconds(*found, product, repeats=1)
    yield Row(f"best {K} of every text, {size}", fp32, gemm, gemm_is, "CPU s")
    yield Row("the same by bfloat16", bf16, gemm, gemm_is, "CPU s")
    matrix = peak_mib(product)
    yield Row("memory of ranks", peak_mib(ranks(text, audio, "fp32")), matrix, "the score matrix", "MiB")
    yield Row(f"memory of the best {K} by bfloat16", peak_mib(found[1]), matrix, "the score matrix", "MiB")

    text, audio = vectors(noise=6.0, spread=0.5)
    first = np.mean(ranks(text, audio, "fp32")().t2a == 1)
    fp32, bf16, gemm = seconds(ranks(text, audio, "fp32"), ranks(text, audio, "bf16"), product, repeats=1)
    yield Row(f"ranks of a weak model, t2a/R@1 {first:.2f}, {size}", fp32, gemm, gemm_is, "CPU s", 1.0)
    yield Row("the same by bfloat16", bf16, gemm, gemm_is, "CPU s")


def vectors(noise: float, spread: float = 0.0) -> tuple[Tensor, Tensor]:
    """Unit vectors; a caption lies near its clip, and with a spread not all equally near."""
    generator = torch.Generator().manual_seed(0)
    audio = torch.randn(AUDIOS, WIDTH, generator=generator)
    scale = noise * (spread * torch.randn(TEXTS, 1, generator=generator)).exp()
    text = audio[:TEXTS] + scale * torch.randn(TEXTS, WIDTH, generator=generator)
    return normalize(text, dim=1), normalize(audio, dim=1)


def ranks(text: Tensor, audio: Tensor, precision: Precision) -> Callable[[], Ranks]:
    return lambda: vector_ranks(text, audio, np.arange(TEXTS), np.arange(AUDIOS), precision=precision)


def lists(text: Tensor, audio: Tensor, precision: Precision) -> Callable[[], Tensor]:
    return lambda: nearest(text, audio, K, precision)


def faiss_search(text: Tensor, audio: Tensor) -> list[Callable[[], object]]:
    """The best K in both directions by exact search; none where faiss is not installed."""
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
