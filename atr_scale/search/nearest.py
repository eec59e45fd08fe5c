"""The nearest vectors by inner product, with faiss: all of them compared, or inverted lists (IVF) above FLAT_MAX.

The vectors stay in their memory-mapped file. A flat search reads that file. IVF reads a few of its lists, from a file
that holds the vectors once more in the order of the lists.

Shape suffixes: n vectors, d their width, q queries, k neighbours of a query.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atr_scale.errors import UserError, one_line

FLAT_MAX = 100_000  # vectors; with more, reading all of them takes most of the time of a query
RECALL = 0.95  # of the ten nearest vectors that a flat search finds, IVF is to find this share
NEIGHBOURS = 10  # of the recall
QUERIES = 256  # vectors the recall is measured with
SAMPLE = 48  # vectors a list that the lists are trained on
BLOCK = 65_536  # vectors that are added at once
PART = 1 << 18  # vectors in a file of inverted lists, and in memory while they are written

Found = tuple[NDArray[np.float32], NDArray[np.int64]]  # scores and numbers of vectors, [q, k] each, best first


@dataclass(frozen=True)
class Lists:
    """Inverted lists: number of lists, lists that a query reads, and recall@10 against flat by kind of query."""

    nlist: int
    nprobe: int
    recall: dict[str, float]


class Nearest:
    """Searches vectors [n, d]. Several threads may search at once. ivf: the file that `build_ivf` wrote, and nprobe."""

    def __init__(self, vectors: NDArray[np.float32], ivf: tuple[Path, int] | None = None) -> None:
        self.faiss, self.vectors = import_faiss(), vectors
        self.ivf = read_ivf(ivf[0]) if ivf else None
        self.nprobe = ivf[1] if ivf else 0

    def search(self, queries: NDArray[np.float32], k: int, wider: int = 1) -> Found:
        """The k nearest vectors of every query [q, d], fewer if there are fewer. IVF fills what it did not find by -1.

        wider: IVF reads this many times more lists. Equal scores are in the order of the vectors.
        """
        queries, k = np.ascontiguousarray(queries, np.float32), min(k, len(self.vectors))
        if self.ivf is None:
            scores, found = self.faiss.knn(queries, self.vectors, k, metric=self.faiss.METRIC_INNER_PRODUCT)
        else:
            chosen = self.faiss.SearchParametersIVF(nprobe=min(wider * self.nprobe, self.ivf.nlist))
            scores, found = self.ivf.search(queries, k, params=chosen)
        order = np.lexsort((found, -scores), axis=1)
        return np.take_along_axis(scores, order, 1), np.take_along_axis(found, order, 1)


def import_faiss() -> Any:
    """The module faiss. Raises UserError if it is not installed."""
    logging.getLogger("faiss.loader").setLevel(logging.WARNING)  # it tells which of its libraries it tries
    try:
        import faiss
    except ImportError:
        raise UserError('an index needs faiss: pip install "atr-scale[search]"') from None
    return faiss


def read_ivf(path: Path) -> Any:
    """The index that `build_ivf` wrote, memory-mapped. Raises UserError if it cannot be read."""
    faiss = import_faiss()
    try:
        parts: list[Any] = []
        while (file := path.with_name(f"{path.name}.{len(parts)}")).exists() or not parts:
            parts.append(faiss.read_index(str(file), faiss.IO_FLAG_MMAP))
    except RuntimeError as error:
        raise UserError(f"{path}.{len(parts)} cannot be read ({one_line(error)}): build the index again") from None
    pointers = faiss.InvertedListsPtrVector()
    for part in parts:
        pointers.push_back(part.invlists)
    lists = faiss.HStackInvertedLists(pointers.size(), pointers.data())
    index = faiss.IndexIVFFlat(parts[0].quantizer, parts[0].d, parts[0].nlist, faiss.METRIC_INNER_PRODUCT)
    index.replace_invlists(lists)
    index.ntotal = sum(part.ntotal for part in parts)
    index.referenced_objects = [*parts, lists]  # faiss holds pointers to them
    return index


def build_ivf(vectors: NDArray[np.float32], path: Path, texts: NDArray[np.float32] | None = None) -> Lists:
    """Write inverted lists of vectors [n, d] to `path`.0, `path`.1, ..., PART vectors a file.

    There are 4 * sqrt(n) lists, from spherical k-means of SAMPLE vectors a list. nprobe is doubled until recall@10
    against a flat search reaches RECALL, for QUERIES of the vectors, each without itself, and for QUERIES of `texts`
    [m, d]. In memory are the sample, or the vectors of one file.
    """
    faiss = import_faiss()
    count, dim = vectors.shape
    nlist = max(1, min(round(4 * math.sqrt(count)), count // SAMPLE))
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, nlist, faiss.METRIC_INNER_PRODUCT)
    index.cp.spherical = True
    index.train(np.ascontiguousarray(vectors[_some(count, nlist * SAMPLE)]))
    for part, start in enumerate(range(0, count, PART)):
        for first in range(start, min(start + PART, count), BLOCK):
            block = np.ascontiguousarray(vectors[first : min(first + BLOCK, start + PART)])
            index.add_with_ids(block, np.arange(first, first + len(block)))
        with path.with_name(f"{path.name}.{part}").open("wb") as file:  # faiss itself does not tell a full disk
            faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))
        index.reset()
    own = _some(count, QUERIES)
    sets = {"sounds": (vectors[own], own)}
    if texts is not None:
        sets["captions"] = (texts[_some(len(texts), QUERIES)], np.full(min(len(texts), QUERIES), -1))
    return _raise_nprobe(vectors, path, nlist, sets)


def _raise_nprobe(
    vectors: NDArray[np.float32],
    path: Path,
    nlist: int,
    sets: dict[str, tuple[NDArray[np.float32], NDArray[np.int64]]],
) -> Lists:
    """sets: queries [q, d] and the vector that each is itself, which does not count; -1 for none."""
    flat = Nearest(vectors)
    right = {name: flat.search(queries, NEIGHBOURS + 1)[1] for name, (queries, _) in sets.items()}
    nprobe = 1
    while True:
        ivf = Nearest(vectors, (path, nprobe))
        recall = {}
        for name, (queries, own) in sets.items():
            found = ivf.search(queries, NEIGHBOURS + 1)[1]
            recall[name] = round(float(np.mean(list(map(_share, found, right[name], own)))), 4)
        if nprobe == nlist or min(recall.values()) >= RECALL:
            return Lists(nlist, nprobe, recall)
        nprobe = min(2 * nprobe, nlist)


def _share(found: NDArray[np.int64], right: NDArray[np.int64], own: np.int64) -> float:
    """The share of the ten right neighbours that were found."""
    wanted = right[right != own][:NEIGHBOURS]
    return float(np.isin(wanted, found[found != own][:NEIGHBOURS]).mean())


def _some(count: int, wanted: int) -> NDArray[np.int64]:
    """At most `wanted` of the numbers below `count`, the same every time, in ascending order."""
    return np.sort(np.random.default_rng(0).choice(count, min(count, wanted), replace=False))
