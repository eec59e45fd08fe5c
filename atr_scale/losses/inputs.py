"""Inputs of loss terms: one rank's part for tiled losses, whole matrices for dense ones.

Shape suffixes: B texts (and audios) of the global batch, b of this rank, k id columns, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from atr_scale.batch import TokenSequence, on_device
from atr_scale.losses.soft_labels import SoftLabels
from atr_scale.losses.targets import Positives, PositivesMean, PositivesRule, positives_mask
from atr_scale.losses.tiled.exponentials import largest_exponent
from atr_scale.products import product
from atr_scale.score_block import ModalityScores, ScoreBlock


@dataclass(frozen=True)
class LossInputs:
    """One rank's part of a global batch. A function is called when the first term needs its result, on all ranks.

    block:       scores [B, b] of all texts against this rank's audios.
    temperature: (1,), the model's.
    own_ids:     [b, 2] int64 of this rank's pairs, (clip, caption text); on the host, or a GPU is waited for.
    text, audio: embeddings [b, D] of unit length, one for each caption and each clip of this rank: the mean over the
                 tokens if the scorer reads them, else the pooled embedding.
    text_tokens, audio_tokens: token sequences [B, T, D] of all ranks.
    teacher:     soft labels of the batch, from the scores [B, b] of its teachers.
    step:        optimizer steps made so far.
    positives, positives_mean: which pairs are positives, and what a direction of a loss is the mean of, as the
    objective's options of these names say.
    least_temperature: the temperature is never below this number.
    """

    block: ScoreBlock
    temperature: Tensor
    own_ids: Tensor
    text: Callable[[], Tensor]
    audio: Callable[[], Tensor]
    text_tokens: Callable[[], TokenSequence]
    audio_tokens: Callable[[], TokenSequence]
    teacher: Callable[[], SoftLabels[ScoreBlock]]
    step: int = 0
    positives: PositivesRule = "clip_and_text"
    positives_mean: PositivesMean = "queries"
    least_temperature: float | None = None

    @cached_property
    def pairs(self) -> Positives:
        """The positive pairs of this rank's block, shared by all terms."""
        compared = slice(1) if self.positives == "clip" else slice(None)
        ids = self._ids[:, compared], self._own_ids[:, compared]
        return Positives.of(self.block, ids, self.positives_mean)

    @cached_property
    def all_ids(self) -> Tensor:
        """[B, 2] int64 of all pairs, (clip, caption text), on the block's device."""
        return on_device(self._ids, self.block.device)

    @cached_property
    def _own_ids(self) -> NDArray[np.int64]:
        ids: NDArray[np.int64] = self.own_ids.numpy(force=True)
        return ids

    @cached_property
    def _ids(self) -> NDArray[np.int64]:
        return self.block.world.gather_host(self._own_ids)

    @cached_property
    def lowest_temperature(self) -> float:
        """`least_temperature` if that alone tells that no sum of a softmax can be lost, else the temperature itself.

        The host waits for a GPU once a batch in the second case.
        """
        least = self.least_temperature
        if least is not None and 1 / least <= largest_exponent(self.block.dtype):
            return least
        return float(self.temperature.detach())

    @cached_property
    def text_block(self) -> ScoreBlock:
        """Cosines [B, b] of all captions against this rank's."""
        return ModalityScores(self.text(), self.block.world, self.block.products)

    @cached_property
    def audio_block(self) -> ScoreBlock:
        """Cosines [B, b] of all clips against this rank's."""
        return ModalityScores(self.audio(), self.block.world, self.block.products)

    @cached_property
    def soft_labels(self) -> SoftLabels[ScoreBlock]:
        """Soft labels of the batch, as blocks of teacher scores."""
        return self.teacher()

    @cached_property
    def whole(self) -> WholeInputs:
        """The same inputs as whole matrices, shared by all terms."""
        return WholeInputs(self)


class WholeInputs:
    """Inputs of the dense formulas: those of the whole global batch, the same on every rank.

    Each is computed on first use and kept, so that terms share it. Gathers have a gradient: in the backward pass, a
    rank's part receives the sum of the gradients of all ranks.

    scores:         [B, B], every text against every audio, at least fp32.
    temperature:    (1,), of the softmax over scores.
    positives:      [B, B] bool, pairs of one clip or, if the objective says so, of one caption text. Text i belongs to
                    audio i, so the same matrix marks equal clips and captions inside a modality.
    positives_mean: "queries" or "pairs", what a direction of a loss with several positives is the mean of.
    text_scores, audio_scores: [B, B], cosines inside a modality, with a gradient.
    teacher_scores: [B, B], the teachers' scores, their mean by weight, without a gradient; 0 for a pair without one.
    soft_labels:    SoftLabels, the teachers' scores one by one, as matrices [B, B] without a gradient.
    clip_ids, caption_ids: [B] int64, stable ids of clips and of caption texts.
    text_embeddings, audio_embeddings: [B, D] of unit length, one for each caption and each clip.
    text_tokens, audio_tokens: TokenSequence [B, T, D].
    step:           int, optimizer steps made so far.
    """

    def __init__(self, inputs: LossInputs) -> None:
        self._inputs, self._world = inputs, inputs.block.world

    @cached_property
    def scores(self) -> Tensor:
        return self._inputs.block.whole()

    @cached_property
    def temperature(self) -> Tensor:
        return self._inputs.temperature

    @cached_property
    def positives(self) -> Tensor:
        ids = self._inputs.all_ids[:, :1] if self._inputs.positives == "clip" else self._inputs.all_ids
        return positives_mask(ids, ids)

    @cached_property
    def positives_mean(self) -> PositivesMean:
        return self._inputs.positives_mean

    @cached_property
    def text_scores(self) -> Tensor:
        return product(self.text_embeddings, self.text_embeddings.T, self._inputs.block.products)

    @cached_property
    def audio_scores(self) -> Tensor:
        return product(self.audio_embeddings, self.audio_embeddings.T, self._inputs.block.products)

    @cached_property
    def teacher_scores(self) -> Tensor:
        return self.soft_labels.mean_scores()

    @cached_property
    def soft_labels(self) -> SoftLabels[Tensor]:
        return self._inputs.soft_labels.whole()

    @cached_property
    def clip_ids(self) -> Tensor:
        return self._inputs.all_ids[:, 0]

    @cached_property
    def caption_ids(self) -> Tensor:
        return self._inputs.all_ids[:, 1]

    @cached_property
    def text_embeddings(self) -> Tensor:
        return self._world.gather(self._inputs.text())

    @cached_property
    def audio_embeddings(self) -> Tensor:
        return self._world.gather(self._inputs.audio())

    @cached_property
    def text_tokens(self) -> TokenSequence:
        return self._inputs.text_tokens()

    @cached_property
    def audio_tokens(self) -> TokenSequence:
        return self._inputs.audio_tokens()

    @cached_property
    def step(self) -> int:
        return self._inputs.step


INPUTS = tuple(name for name, value in vars(WholeInputs).items() if isinstance(value, cached_property))
