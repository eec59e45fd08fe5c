"""The sounds of an index and the models that search them, as the page uses them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atr_scale.errors import UserError
from atr_scale.inference import TrainedModel
from atr_scale.search.index import CAPTIONS
from atr_scale.search.query import Hit, Searcher
from atr_scale.search.serve.answers import Result, WordMoments
from atr_scale.search.sources import item_audio
from atr_scale.search.vectors import Item


class IndexLibrary:
    """What `app.Library` asks for, of an index on the disk."""

    def __init__(self, searcher: Searcher) -> None:
        self.searcher, self.name = searcher, str(searcher.folder)
        self.items: Sequence[Item] = searcher.items
        self.has_captions = CAPTIONS in searcher.info.sets
        self.sample_rate = searcher.model.sample_rate
        models = [model for model in (searcher.reranker, searcher.model) if model is not None]
        self._locator = next((model for model in models if _locates(model)), None)
        self.has_moments = self._locator is not None

    def by_text(self, queries: list[str], top: int, captions: bool) -> list[list[Result]]:
        return _results(self.searcher.by_text(queries, top, captions))

    def by_audio(self, waveforms: list[NDArray[np.float32]], top: int, captions: bool) -> list[list[Result]]:
        return _results(self.searcher.by_audio(waveforms, top, self.sample_rate, captions))

    def audio(self, item: Item) -> tuple[NDArray[np.float32], int]:
        return item_audio(item)

    def moments(self, text: str, waveform: NDArray[np.float32], rate: int) -> WordMoments:
        model: Any = self._locator
        found = model.moments(text, waveform, sample_rate=rate)
        return WordMoments(
            words=list(found.words),
            times=np.asarray(found.times).tolist(),
            weights=np.asarray(found.weights).round(4).tolist(),
            spans=[{"start": span.start, "stop": span.stop, "score": span.score} for span in found.spans],
        )


def _locates(model: TrainedModel) -> bool:
    """Whether a model tells the moments of words: its scorer has attention over frames."""
    try:
        noise = np.random.default_rng(0).normal(0, 0.1, model.sample_rate).astype(np.float32)
        getattr(model, "moments")("sound", noise, sample_rate=model.sample_rate)  # noqa: B009
    except (AttributeError, UserError):
        return False
    return True


def _results(found: list[list[Hit]]) -> list[list[Result]]:
    return [[Result(**asdict(hit)) for hit in hits] for hits in found]
