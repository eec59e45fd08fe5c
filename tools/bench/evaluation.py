"""Ranks and result lists of two sets of vectors, in both directions.

Rank counting computes the same scores as one plain product and keeps none of them. The lists are the best 10 of every
caption and of every clip. The bfloat16 row compares two plain products: without matrix units for it (AMX, a GPU) a
processor computes bfloat16 no faster, and evaluation stays in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from atr_scale.evaluation.rank_counts import vector_ranks
from tools.bench.measure import peak_mib, seconds
from tools.bench.table import Row, run

TEXTS, AUDIOS, WIDTH = 20_000, 20_000, 512
SMALL = 4_000  # of each, where bfloat16 is slow
K = 10


def rows() -> Iterator[Row]:
    torch.set_num_threads(1)
    text, audio = vectors(TEXTS, AUDIOS)
    ids = np.arange(AUDIOS)

    def count() -> object:
        return vector_ranks(text, audio, ids, ids)

    def product() -> object:
        return text @ audio.T

    ours, gemm = seconds(count, product, repeats=3)
    size = f"{TEXTS} x {AUDIOS}, d = {WIDTH}"
    yield Row(f"ranks, both directions, {size}", ours, gemm, "the plain product alone", "CPU s", 1.0)
    yield Row(f"memory of ranks, {size}", peak_mib(count), peak_mib(product), "the score matrix", "MiB")
    search = faiss_search(text, audio)
    if search is not None:
        (theirs,) = seconds(search, repeats=1)
        yield Row(f"ranks, both directions, {size}", ours, theirs, f"faiss, top {K} twice", "CPU s", 1.0)
    text, audio = text[:SMALL], audio[:SMALL]
    coarse = text.bfloat16(), audio.bfloat16()
    bf16, fp32 = seconds(lambda: coarse[0] @ coarse[1].T, lambda: text @ audio.T, repeats=3)
    yield Row(f"product in bfloat16, {SMALL} x {SMALL}", bf16, fp32, "in float32", "CPU s", 0.30)


def vectors(texts: int, audios: int) -> tuple[Tensor, Tensor]:
    """Unit vectors; a caption lies near its clip."""
    generator = torch.Generator().manual_seed(0)
    audio = torch.randn(audios, WIDTH, generator=generator)
    text = audio[:texts] + 4 * torch.randn(texts, WIDTH, generator=generator)
    return normalize(text, dim=1), normalize(audio, dim=1)


def faiss_search(text: Tensor, audio: Tensor) -> Callable[[], object] | None:
    """The best K in both directions by exact search; None where faiss is not installed."""
    try:
        import faiss
    except ImportError:
        return None
    faiss.omp_set_num_threads(1)
    sides = text.numpy(), audio.numpy()
    indexes = [faiss.IndexFlatIP(WIDTH) for _ in sides]
    for index, side in zip(indexes, sides, strict=True):
        index.add(side)
    return lambda: (indexes[1].search(sides[0], K), indexes[0].search(sides[1], K))


if __name__ == "__main__":
    run(__doc__, rows)
