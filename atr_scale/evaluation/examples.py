"""Queries of an evaluation with their retrieved items: examples at fixed places, and the worst misses."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from atr_scale.evaluation.metrics import Ranks
from atr_scale.evaluation.retrieval_scores import RetrievalScores

NUM_EXAMPLES = 6
NUM_MISSES = 6  # of each direction
NUM_RETRIEVED = 5
COMMON = 0.1  # a word in more captions than this fraction says little about a clip
SHOWN_WORDS = 5


@dataclass(frozen=True)
class Retrieved:
    """An item of a result list: caption or clip id, index among the candidates, score, whether it is relevant."""

    name: str
    index: int
    score: float
    hit: bool


@dataclass(frozen=True)
class Example:
    """A query (in "t2a" a caption, in "a2t" a clip id), the rank of its first relevant item, and its best items.

    index: of the query among captions or clips. match: its first relevant item. Both are None in results of version 0.5
    and older. why: of a miss, what may explain it.
    """

    direction: str
    query: str
    rank: int
    retrieved: tuple[Retrieved, ...]
    index: int | None = None
    match: Retrieved | None = None
    why: str = ""

    @classmethod
    def of(
        cls,
        direction: str,
        query: str,
        index: int,
        rank: int,
        scores: torch.Tensor,
        names: Sequence[str],
        relevant: NDArray[np.int64],
    ) -> Self:
        """scores [candidates] of the query; names [candidates]; relevant: indices."""
        # A stable sort keeps the metrics' rule for ties: the lower index comes first.
        top = torch.sort(scores.float(), descending=True, stable=True).indices[:NUM_RETRIEVED].tolist()
        wanted = set(relevant.tolist())
        found = tuple(Retrieved(names[i], i, float(scores[i]), i in wanted) for i in top)
        first = int(relevant[int(scores[torch.from_numpy(relevant)].argmax())])
        match = Retrieved(names[first], first, float(scores[first]), True)
        return cls(direction, query, rank, found, int(index), match)

    @classmethod
    def read(cls, table: Mapping[str, Any]) -> Self:
        """The inverse of `dataclasses.asdict`."""
        match = table.get("match")
        retrieved = tuple(Retrieved(**item) for item in table["retrieved"])
        return cls(**{**table, "retrieved": retrieved, "match": match and Retrieved(**match)})

    @property
    def clips(self) -> list[int]:
        """Indices of the clips to listen to: those retrieved and the right one, or the query itself."""
        if self.direction == "a2t":
            return [] if self.index is None else [self.index]
        found = [*self.retrieved, *([self.match] if self.match else [])]
        return list(dict.fromkeys(item.index for item in found))


def spread(count: int, wanted: int) -> NDArray[np.int64]:
    """Evenly spread indices, so that examples are not chosen by their scores and are the same at every step."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).round().astype(np.int64))


class RetrievalExamples:
    """Examples of a retrieval evaluation. captions [T], clip_names [A]: shown."""

    def __init__(
        self, scores: RetrievalScores, ranks: Ranks, captions: Sequence[str], clip_names: Sequence[str]
    ) -> None:
        self.scores, self.ranks, self.captions, self.clip_names = scores, ranks, captions, clip_names
        self.first_text = np.unique(ranks.clip, return_index=True)[1]

    def typical(self) -> tuple[Example, ...]:
        """Queries at fixed places of the split."""
        texts = spread(len(self.captions), NUM_EXAMPLES)
        clips = self.ranks.clip[self.first_text[spread(len(self.first_text), NUM_EXAMPLES // 2)]]
        return (*map(self._of_text, texts), *map(self._of_clip, clips))

    def misses(self) -> tuple[Example, ...]:
        """The queries whose right item has the worst ranks, worst first: of each clip at most one caption."""
        found: list[Example] = []
        order = np.argsort(-self.ranks.t2a, kind="stable")
        first = np.sort(np.unique(self.ranks.clip[order], return_index=True)[1])  # the worst caption of each clip
        for text in order[first][:NUM_MISSES]:
            if self.ranks.t2a[text] > 1:
                found.append(self._explained(self._of_text(text)))
        clips, best = self.ranks.clip[self.first_text], self.ranks.best_a2t()
        for place in np.argsort(-best, kind="stable")[:NUM_MISSES]:
            if best[place] > 1:
                found.append(self._explained(self._of_clip(clips[place])))
        return tuple(found)

    def _of_text(self, text: int) -> Example:
        relevant, rank = self.ranks.clip[text : text + 1], int(self.ranks.t2a[text])
        return Example.of("t2a", self.captions[text], text, rank, self.scores.row(int(text)), self.clip_names, relevant)

    def _of_clip(self, clip: int) -> Example:
        relevant = self._texts_of(clip)
        rank = int(self.ranks.a2t[relevant].min())
        return Example.of(
            "a2t", self.clip_names[clip], clip, rank, self.scores.column(int(clip)), self.captions, relevant
        )

    def _texts_of(self, clip: int) -> NDArray[np.int64]:
        return np.flatnonzero(self.ranks.clip == clip)

    def _explained(self, example: Example) -> Example:
        assert example.index is not None and example.match is not None
        first = example.retrieved[0]
        told = [f"the right one scores {first.score - example.match.score:.3f} less than the first"]
        if example.direction == "t2a":
            shared = self._words[example.index] & self._words_of(first.index)
            others = np.setdiff1d(self._texts_of(example.match.index), example.index)
            if len(others):
                rank = float(np.median(self.ranks.t2a[others]))
                told.append(f"other captions of the right clip find it at rank {rank:g} (median)")
        else:
            shared = self._words_of(example.index) & self._words[first.index]
        if shared:
            rarest = sorted(shared, key=lambda word: (self._counts[word], word))[:SHOWN_WORDS]
            told.append(f"the query shares with the first: {', '.join(rarest)}")
        else:
            told.append("the query shares no rare word with the first")
        return Example(**{**vars(example), "why": "; ".join(told)})

    @cached_property
    def _counts(self) -> Counter[str]:
        return Counter(word for caption in self.captions for word in _words(caption))

    @cached_property
    def _words(self) -> list[set[str]]:
        """The words of every caption that are not in many of them."""
        most = max(1.0, COMMON * len(self.captions))
        return [{word for word in _words(caption) if self._counts[word] <= most} for caption in self.captions]

    def _words_of(self, clip: int) -> set[str]:
        return set().union(*(self._words[text] for text in self._texts_of(clip)))


def _words(caption: str) -> set[str]:
    return set(re.findall(r"\w{3,}", caption.lower()))
