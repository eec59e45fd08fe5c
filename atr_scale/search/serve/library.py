"""The sounds of an index and the models that search them, as the page uses them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray

from atr_scale.search.index import CAPTIONS
from atr_scale.search.query import Hit, Searcher
from atr_scale.search.serve.answers import MatchingPart, Result, WordMoments
from atr_scale.search.sources import item_audio
from atr_scale.search.vectors import Item


class IndexLibrary:
    """What `app.Library` asks for, of an index on the disk."""

    def __init__(self, searcher: Searcher) -> None:
        self.searcher, self.name = searcher, str(searcher.folder)
        self.items: Sequence[Item] = searcher.items
        self.has_captions = CAPTIONS in searcher.info.sets
        self.sample_rate = searcher.model.sample_rate
        self.has_moments = searcher.locator is not None

    def item(self, id: str) -> Item | None:
        return self.searcher.items.find(id)

    def by_text(self, queries: list[str], top: int, captions: bool) -> list[list[Result]]:
        return _results(self.searcher.by_text(queries, top, captions))

    def by_audio(self, waveforms: list[NDArray[np.float32]], top: int, captions: bool) -> list[list[Result]]:
        return _results(self.searcher.by_audio(waveforms, top, self.sample_rate, captions))

    def audio(self, item: Item) -> tuple[NDArray[np.float32], int]:
        return item_audio(item)

    def moments(self, text: str, waveform: NDArray[np.float32], rate: int) -> WordMoments:
        assert self.searcher.locator is not None, "the page asks for moments only if `has_moments`"
        found = self.searcher.locator.moments(text, waveform, sample_rate=rate)
        return WordMoments(
            words=found.words,
            times=found.times.tolist(),
            weights=found.weights.round(4).tolist(),
            spans=[MatchingPart(**asdict(span)) for span in found.spans],
        )


def _results(found: list[list[Hit]]) -> list[list[Result]]:
    return [[Result(**asdict(hit)) for hit in hits] for hits in found]
