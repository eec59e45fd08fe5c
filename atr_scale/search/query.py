"""Queries to an index: sounds or captions that a text or a sound is closest to.

Shape suffixes: q queries, k candidates, d width of the embeddings.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from atr_scale.errors import UserError
from atr_scale.inference import Audio, TrainedModel, load_trained
from atr_scale.run_checkpoints import newest_first
from atr_scale.search.embed import need_embeddings
from atr_scale.search.index import CAPTIONS, SOUNDS, IndexInfo, refuse_other_model, table_file
from atr_scale.search.nearest import Nearest
from atr_scale.search.sources import item_audio
from atr_scale.search.vectors import Item, ItemLines, ModelId

logger = logging.getLogger(__name__)

MOST = 20_000  # windows that are looked at to find enough recordings


@dataclass(frozen=True, slots=True)
class Hit:
    """One result. score: cosine, or the score of the model that re-ranked; higher is better.

    path: as in `Item`. start and stop: of a window, in seconds; None for a whole clip. caption: the first one of the
    sound, or the caption that was found; None if there is none.
    """

    id: str
    score: float
    path: str
    start: float | None
    stop: float | None
    caption: str | None


class Searcher:
    """An index with its model. Several threads may use it at once.

    model: of the index. reranker: the model that scores candidates again, or None. info: what index.json says.
    items: the sounds, in the order of the index.
    """

    def __init__(
        self,
        index_dir: str | Path,
        run: str | Path | None = None,
        rerank: str | Path | None = None,
        candidates: int = 50,
        device: str | None = None,
        plugins: Sequence[str] = (),
    ) -> None:
        """run: where the model is now, by default the checkpoint that the index names. rerank: a run that scores the
        best `candidates` of every query again, on their audio. Raises UserError if the model is another one.
        """
        if candidates < 1:
            raise UserError(f"candidates = {candidates}: give a number of at least 1")
        self.folder, self.info, self.candidates = Path(index_dir), IndexInfo.read(index_dir), candidates
        try:
            self.model = load_trained(run or self.info.model.run, device, plugins)
        except UserError as error:
            if run is not None:
                raise
            raise UserError(self._without_model(error)) from None
        need_embeddings(self.model, run or self.info.model.run)
        refuse_other_model(
            self.info.model,
            ModelId.of(run or self.info.model.run, self.model),
            f"{index_dir} holds vectors",
            "give the checkpoint of the index, or build the index again",
        )
        self.reranker: TrainedModel | None = load_trained(rerank, device, plugins) if rerank is not None else None
        self._models = threading.Lock()  # tokenizers are not made for several threads
        self._sets = {name: self._open(name) for name in self.info.sets}

    def _without_model(self, error: UserError) -> str:
        """Why the model of the index cannot be loaded, and what to do."""
        checkpoint = Path(self.info.model.run)
        run = checkpoint.parent.parent
        if not checkpoint.exists() and newest_first(run):
            return (
                f"{self.folder} holds vectors of {checkpoint.name}, which {run} no longer has: build the index again "
                "with that run, or name a copy of the checkpoint by --run"
            )
        return f"the model of {self.folder} cannot be loaded ({error}): give its place by --run"

    @property
    def models(self) -> list[TrainedModel]:
        """The re-ranker, if there is one, and the model of the index."""
        return [model for model in (self.reranker, self.model) if model is not None]

    @property
    def locator(self) -> TrainedModel | None:
        """The first of `models` that tells the moments of a text."""
        return next((model for model in self.models if model.locates), None)

    @property
    def items(self) -> ItemLines:
        return self._sets[SOUNDS][1]

    def by_text(
        self, queries: Sequence[str], top: int = 10, captions: bool = False, all_windows: bool = False
    ) -> list[list[Hit]]:
        """The `top` best hits of every text, best first.

        captions: find captions in place of sounds. all_windows: a recording may be found more than once, by several
        of its windows. Raises UserError for an empty text, and as `atr_scale.load(...).embed_text` does.
        """
        with self._models:
            vectors = self.model.embed_text(queries)
        found = self._nearest(vectors, top, captions, all_windows)
        if self.reranker is None:
            return found
        if captions:
            raise UserError("a text against captions cannot be re-ranked: it needs a sound on one side")
        return [self._rerank_sounds(query, hits)[:top] for query, hits in zip(queries, found, strict=True)]

    def by_audio(
        self,
        audio: Sequence[Audio],
        top: int = 10,
        sample_rate: int | None = None,
        captions: bool = False,
        all_windows: bool = False,
    ) -> list[list[Hit]]:
        """The same for sounds: audio files, or mono waveforms [samples] of `sample_rate` Hz."""
        if self.reranker is not None and not captions:
            raise UserError("a sound against sounds cannot be re-ranked: it needs a text on one side")
        with self._models:
            vectors = self.model.embed_audio(audio, sample_rate)
        found = self._nearest(vectors, top, captions, all_windows)
        if self.reranker is None:
            return found
        reranked = []
        for sound, hits in zip(audio, found, strict=True):
            with self._models:
                scores = self.reranker.similarity([str(hit.caption) for hit in hits], [sound], sample_rate)[:, 0]
            reranked.append(_in_order(hits, scores)[:top])
        return reranked

    def _open(self, name: str) -> tuple[Nearest, ItemLines]:
        one = self.info.sets[name]
        path = self.folder / f"{name}.npy"
        try:
            vectors = np.load(path, mmap_mode="r", allow_pickle=False)
            items = ItemLines(path.with_suffix(".jsonl"), np.load(table_file(path), "r", allow_pickle=False))
        except (OSError, ValueError, EOFError) as error:  # EOFError: of an empty file
            raise UserError(f"{path} cannot be read ({error}): build the index again") from None
        if vectors.shape != (one.count, self.info.model.dim) or len(items) != one.count:
            raise UserError(f"{path} does not have the {one.count} vectors of the index: build the index again")
        return Nearest(vectors, (path.with_suffix(".ivf"), one.lists.nprobe) if one.lists else None), items

    def _nearest(self, vectors: NDArray[np.float32], top: int, captions: bool, all_windows: bool) -> list[list[Hit]]:
        """The hits of every query [q, d], `candidates` of them if they are re-ranked."""
        if top < 1:
            raise UserError(f"top = {top}: give a number of at least 1")
        if not np.isfinite(vectors).all():
            raise UserError("the embedding of the query is not finite: check the weights of the model")
        if captions and CAPTIONS not in self._sets:
            raise UserError(f"{self.folder} has no captions: index a source with captions, such as shards or a table")
        wanted = max(top, self.candidates) if self.reranker is not None else top
        nearest, items = self._sets[CAPTIONS if captions else SOUNDS]
        found = []
        for vector in vectors:  # one by one: the result then does not depend on the other queries
            every, wider, k = all_windows or captions, 1, wanted
            hits = _hits(nearest, items, vector, k, every)
            while len(hits) < min(wanted, len(items)) and k < min(len(items), MOST):  # windows of few recordings
                wider, k = 2 * wider, 4 * k
                hits = _hits(nearest, items, vector, k, every, wider)
            found.append(hits[:wanted])
        return found

    def _rerank_sounds(self, query: str, hits: list[Hit]) -> list[Hit]:
        """The hits in the order of the reranker, which reads their audio. Hits whose audio is gone are left out."""
        assert self.reranker is not None
        sounds, there, gone = [], [], []
        for hit in hits:
            try:
                sounds.append(item_audio(Item(hit.id, hit.path, hit.start, hit.stop)))
                there.append(hit)
            except UserError as error:
                gone.append(str(error))
        if gone and not there:
            raise UserError(f"no candidate can be re-ranked: {gone[0]}")
        if gone:
            logger.warning("%d of %d candidates are left out of re-ranking: %s", len(gone), len(hits), gone[0])
        windows = [hit.stop - hit.start for hit in there if hit.start is not None and hit.stop is not None]
        seconds = max([self.reranker.config.data.evaluation_seconds, *windows])
        scores = np.zeros(len(there), np.float32)
        for rate in sorted({rate for _, rate in sounds}):
            places = [place for place, (_, own) in enumerate(sounds) if own == rate]
            with self._models:
                some = self.reranker.similarity([query], [sounds[i][0] for i in places], rate, seconds=seconds)
            scores[places] = some[0]
        return _in_order(there, scores)


def _hits(
    nearest: Nearest, items: Sequence[Item], vector: NDArray[np.float32], k: int, every: bool, wider: int = 1
) -> list[Hit]:
    """The k nearest items; of those with one path only the best, unless `every`."""
    scores, numbers = nearest.search(vector[None], k, wider)
    hits, paths = [], set()
    for score, number in zip(scores[0].tolist(), numbers[0].tolist(), strict=True):
        if number < 0:
            break
        item = items[number]
        if every or item.path not in paths:
            paths.add(item.path)
            caption = item.captions[0] if item.captions else None
            hits.append(Hit(item.id, score, item.path, item.start, item.stop, caption))
    return hits


def _in_order(hits: list[Hit], scores: NDArray[np.float32]) -> list[Hit]:
    """The hits with new scores, best first; equal scores stay in their order."""
    return [
        Hit(hit.id, float(scores[i]), hit.path, hit.start, hit.stop, hit.caption)
        for i in np.argsort(-scores, kind="stable").tolist()
        for hit in [hits[i]]
    ]
