"""Scores of a split, all captions with all clips, from which evaluation reads ranks, best-k lists and excerpts."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from atr_scale.distributed.world import World
from atr_scale.evaluation.metrics import Ids, Ranks, Scores, ranks
from atr_scale.evaluation.ranks import best_items, embedding_ranks
from atr_scale.products import fp32_products
from atr_scale.score_block import ALL, at_least_fp32


class RetrievalScores(ABC):
    """Scores [texts, audios] of a split. `method` says in a report which pairs were scored."""

    shape: tuple[int, int]
    method = "every pair scored"

    @abstractmethod
    def ranks(self, text_audio_ids: Ids, audio_ids: Ids, world: World | None = None) -> Ranks:
        """Ranks as `metrics.ranks` defines them. All processes of `world` call this and divide the work."""

    @abstractmethod
    def row(self, text: int) -> Tensor:
        """[audios]: scores of a text."""

    @abstractmethod
    def column(self, audio: int) -> Tensor:
        """[texts]: scores of an audio."""

    @abstractmethod
    def block(self, texts: Tensor, audios: Tensor) -> Tensor:
        """[n, m]: scores of n chosen texts with m chosen audios."""

    @abstractmethod
    def lists(self, k: int, texts: slice = ALL) -> Tensor:
        """[n, k] int64: the best k audios of these texts, best first; among equal scores the lower index first."""


class DualEncoderScores(RetrievalScores):
    """Scores text @ audio.T of embeddings text [texts, d] and audio [audios, d]; the matrix is never computed."""

    def __init__(self, text: Tensor, audio: Tensor) -> None:
        self.text, self.audio = at_least_fp32(text.detach()), at_least_fp32(audio.detach())
        self.shape = (len(text), len(audio))

    @property
    def T(self) -> DualEncoderScores:
        """The transposed scores [audios, texts]."""
        return DualEncoderScores(self.audio, self.text)

    def ranks(self, text_audio_ids: Ids, audio_ids: Ids, world: World | None = None) -> Ranks:
        return embedding_ranks(self.text, self.audio, text_audio_ids, audio_ids, world)

    @fp32_products("ieee")
    def row(self, text: int) -> Tensor:
        return self.audio @ self.text[text]

    @fp32_products("ieee")
    def column(self, audio: int) -> Tensor:
        return self.text @ self.audio[audio]

    @fp32_products("ieee")
    def block(self, texts: Tensor, audios: Tensor) -> Tensor:
        return self.text[texts] @ self.audio[audios].T

    def lists(self, k: int, texts: slice = ALL) -> Tensor:
        return best_items(self.text[texts], self.audio, k)


class ScoreMatrix(RetrievalScores):
    """Scores [texts, audios] in memory, of a pairwise scorer."""

    def __init__(self, scores: Scores) -> None:
        self.scores = torch.as_tensor(scores).detach()
        self.shape = (self.scores.shape[0], self.scores.shape[1])

    @property
    def T(self) -> ScoreMatrix:
        """The transposed scores [audios, texts]."""
        return ScoreMatrix(self.scores.T)

    def ranks(self, text_audio_ids: Ids, audio_ids: Ids, world: World | None = None) -> Ranks:
        return ranks(self.scores, text_audio_ids, audio_ids)  # every process has the matrix and counts alone

    def row(self, text: int) -> Tensor:
        return self.scores[text]

    def column(self, audio: int) -> Tensor:
        return self.scores[:, audio]

    def block(self, texts: Tensor, audios: Tensor) -> Tensor:
        return self.scores[texts][:, audios]

    def lists(self, k: int, texts: slice = ALL) -> Tensor:
        return torch.sort(self.scores[texts], dim=1, descending=True, stable=True).indices[:, :k]
