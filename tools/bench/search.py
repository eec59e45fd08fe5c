"""Search among 1,000,000 vectors of width 512: time of a query, recall, build time and memory, flat and by lists.

The vectors are a mixture like embeddings of sounds: clusters of Zipf sizes whose spread lies in 32 directions each has
its own mixture of, with noise in all directions. Queries by text are vectors with an offset that all texts share (the
gap between the modalities) and noise. A query is one vector at a time, as in a terminal or on a page; times are wall
clock, the files are in the page cache. Memory is what the process holds beside memory-mapped files. The items of an
index name its sounds; `search` and `serve` open them at their start.
"""

from __future__ import annotations

import json
import resource
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from atr_scale.search.nearest import BLOCK, FLAT_MAX, Nearest, build_ivf, import_faiss
from atr_scale.search.vectors import Item, ItemLines
from tools.bench.table import Row, run

COUNT, WIDTH, CLUSTERS, RANK, TEXTS = 1_000_000, 512, 5_000, 32, 1_000
QUERIES = 50  # that are timed
TARGET_MS = 50.0


def rows() -> Iterator[Row]:
    import_faiss().omp_set_num_threads(2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = clustered(folder / "vectors.npy")
        vectors = np.load(folder / "vectors.npy", mmap_mode="r")
        size, queries = f"{COUNT:,} x {WIDTH}", texts[-QUERIES:]
        small_ms, flat_ms = (milliseconds(Nearest(some), queries) for some in (vectors[:FLAT_MAX], vectors))
        yield Row(f"flat, {FLAT_MAX:,} x {WIDTH}, a query", small_ms, TARGET_MS, "the target", "ms", 1.0)
        yield Row(f"flat, {size}, a query", flat_ms, TARGET_MS, "the target", "ms")
        with AnonymousMemory() as built:
            start = time.perf_counter()
            lists = build_ivf(vectors, folder / "ivf", texts[:-QUERIES])
            seconds = time.perf_counter() - start
        mib = vectors.nbytes / 2**20
        yield Row(f"IVF, {size}, build", seconds, seconds, "itself", "s")
        yield Row(f"IVF, {size}, memory of the build", built.mib, mib, "the vectors", "MiB", 0.5)
        ivf = Nearest(vectors, (folder / "ivf", lists.nprobe))
        ivf_ms = milliseconds(ivf, queries)
        name = f"IVF, {size}, a query, {lists.nprobe} of {lists.nlist} lists"
        yield Row(name, ivf_ms, TARGET_MS, "the target", "ms", 1.0)
        yield Row(name, ivf_ms, flat_ms, "flat", "ms", 1.0)
        found, right = (
            np.concatenate([one.search(query[None], 10)[1] for query in queries]) for one in (ivf, Nearest(vectors))
        )
        recall = float(np.mean([np.isin(a, b).mean() for a, b in zip(right, found, strict=True)]))
        yield Row(f"IVF, {size}, recall@10 of other queries", recall, 1.0, "flat", "", 0.93, at_least=True)
        yield from opened(folder / "items.jsonl")


def opened(path: Path) -> Iterator[Row]:
    """The items of an index against a dictionary of all of them."""
    windows = (
        Item(f"recording-{n}.wav#t={10 * k},{10 * k + 10}", f"/archive/recording-{n}.wav", 10.0 * k, 10.0 * k + 10)
        for n in range(COUNT // 5)
        for k in range(5)
    )
    with path.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(item.to_json()) + "\n" for item in windows)
    np.save(path.with_suffix(".npy"), ItemLines(path).table())
    with AnonymousMemory() as ours:
        start = time.perf_counter()
        items = ItemLines(path, np.load(path.with_suffix(".npy"), "r"))
        opening = time.perf_counter() - start
        found = items.find("recording-77777.wav#t=20,30")
        finding = time.perf_counter() - start - opening
    with AnonymousMemory() as other:
        start = time.perf_counter()
        everything = {item.id: item for item in items}
        parsing = time.perf_counter() - start
    assert found is not None and everything[found.id] == found
    yield Row(f"items of {COUNT:,} sounds, opening", opening, parsing, "all parsed", "s", 0.05)
    yield Row(f"items of {COUNT:,} sounds, memory", ours.mib, other.mib, "all parsed", "MiB", 0.05)
    yield Row("one of them by its id", 1e3 * finding, TARGET_MS, "the target of a query", "ms", 1.0)


def clustered(path: Path) -> NDArray[np.float32]:
    """Write COUNT vectors of unit length to `path`. Returns queries [TEXTS, WIDTH]."""
    rng = np.random.default_rng(0)
    sizes = 1 / np.arange(1, CLUSTERS + 1) ** 0.8
    centres = _normal(rng, CLUSTERS)
    directions = _normal(rng, RANK)
    stretch = rng.uniform(0.05, 0.35, (CLUSTERS, RANK)).astype(np.float32)
    out = np.lib.format.open_memmap(path, "w+", np.float32, (COUNT, WIDTH))
    for start in range(0, COUNT, BLOCK):
        n = min(BLOCK, COUNT - start)
        cluster = rng.choice(CLUSTERS, n, p=sizes / sizes.sum())
        spread = (rng.standard_normal((n, RANK), np.float32) * stretch[cluster]) @ directions
        out[start : start + n] = _unit(centres[cluster] + 0.5 * spread + 0.5 * _normal(rng, n))
    chosen = out[rng.choice(COUNT, TEXTS, replace=False)]
    return _unit(chosen + 0.5 * _normal(rng, 1) + 0.5 * _normal(rng, TEXTS))


def milliseconds(nearest: Nearest, queries: NDArray[np.float32]) -> float:
    """Median wall time of a query, after all have been asked once."""
    times: list[float] = []
    for _ in range(2):
        times.clear()
        for query in queries:
            start = time.perf_counter()
            nearest.search(query[None], 10)
            times.append(1e3 * (time.perf_counter() - start))
    return float(np.median(times))


class AnonymousMemory:
    """The largest growth of the memory that is not of a file, in MiB, while the block runs."""

    def __enter__(self) -> AnonymousMemory:
        self.first, self.most, self.stop = _anonymous(), 0, threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()
        self.mib = max(0, self.most - self.first) / 2**20

    def _watch(self) -> None:
        while not self.stop.wait(0.02):
            self.most = max(self.most, _anonymous())


def _anonymous() -> int:
    resident, shared = map(int, Path("/proc/self/statm").read_text(encoding="ascii").split()[1:3])
    return (resident - shared) * resource.getpagesize()


def _normal(rng: np.random.Generator, n: int) -> NDArray[np.float32]:
    return _unit(rng.standard_normal((n, WIDTH), np.float32))


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


if __name__ == "__main__":
    run(__doc__ or "", rows)
