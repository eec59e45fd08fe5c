"""What loss terms are computed from: a rank's part for the tiled form, whole matrices for the dense one.

Shape suffixes: B texts (and audios) of the global batch, b rows of this rank, k id columns, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from atr_scale.batch import TokenSequence
from atr_scale.losses.targets import Ids, positives_mask
from atr_scale.score_block import ModalityScores, ScoreBlock


@dataclass(frozen=True)
class LossInputs:
    """One rank's part of a global batch. What is given as a function is made when a term asks for it, on all ranks.

    block:       scores [B, b] of all texts against this rank's audios.
    temperature: (1,).
    own_ids:     [b, k] int64 of this rank's rows, (clip, caption text); a pair is positive if any column agrees.
    text, audio: one unit vector [b, D] for each caption and each clip of this rank.
    text_tokens, audio_tokens: token sequences [B, T, D] of all ranks.
    teacher:     scores [B, b] of the teachers.
    step:        updates made so far.
    """

    block: ScoreBlock
    temperature: Tensor
    own_ids: Tensor
    text: Callable[[], Tensor]
    audio: Callable[[], Tensor]
    text_tokens: Callable[[], TokenSequence]
    audio_tokens: Callable[[], TokenSequence]
    teacher: Callable[[], ScoreBlock]
    step: int = 0

    @cached_property
    def ids(self) -> Ids:
        """(of all rows [B, k], of this rank's [b, k]), as the tiled losses take positives."""
        return self.block.world.gather(self.own_ids), self.own_ids

    @cached_property
    def text_block(self) -> ScoreBlock:
        """Cosines [B, b] of all captions against this rank's."""
        return ModalityScores(self.text(), self.block.world)

    @cached_property
    def audio_block(self) -> ScoreBlock:
        """Cosines [B, b] of all clips against this rank's."""
        return ModalityScores(self.audio(), self.block.world)

    @cached_property
    def teacher_block(self) -> ScoreBlock:
        return self.teacher()

    @cached_property
    def whole(self) -> WholeInputs:
        """The same as whole matrices, shared by all terms."""
        return WholeInputs(self)


class WholeInputs:
    """The inputs of dense formulas: the whole global batch, the same on every rank.

    Each is made on first use and kept, so that terms share what was gathered. Gathers have a gradient: what a rank
    holds receives the sum of what all ranks send back.

    scores:         [B, B], every text against every audio, at least fp32.
    temperature:    (1,), of the softmax over scores.
    positives:      [B, B] bool, pairs of one clip or of one caption text. Row i of the texts belongs to row i of the
                    audios, so these are the pairs inside a modality, too.
    text_scores, audio_scores: [B, B], cosines inside a modality, with a gradient.
    teacher_scores: [B, B], the teachers' scores, constant.
    clip_ids, caption_ids: [B] int64, stable ids of the clips and of the captions' texts.
    text_embeddings, audio_embeddings: [B, D], unit vectors, one for each caption and each clip.
    text_tokens, audio_tokens: TokenSequence [B, T, D], words and frames.
    step:           int, updates made so far.
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
        ids, _ = self._inputs.ids
        return positives_mask(ids, ids)

    @cached_property
    def text_scores(self) -> Tensor:
        return self.text_embeddings @ self.text_embeddings.T

    @cached_property
    def audio_scores(self) -> Tensor:
        return self.audio_embeddings @ self.audio_embeddings.T

    @cached_property
    def teacher_scores(self) -> Tensor:
        return self._inputs.teacher_block.whole().detach()

    @cached_property
    def clip_ids(self) -> Tensor:
        return self._inputs.ids[0][:, 0]

    @cached_property
    def caption_ids(self) -> Tensor:
        return self._inputs.ids[0][:, 1]

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
