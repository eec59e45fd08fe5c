"""What every scorer is: texts against audios.

Shape suffixes: B texts, b audios of this rank, L words, T frames, D width.

Texts travel, audio stays: a rank scores all texts of the global batch against its own audios.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from atr_scale.batch import TokenSequence
from atr_scale.distributed.world import World
from atr_scale.errors import UserError
from atr_scale.score_block import ScoreBlock, StoredScores, at_least_fp32
from atr_scale.sections import Section


class Scorer(nn.Module, ABC):
    """Scores any text against any audio; a pair's score depends on nothing but the pair.

    The constructor takes `dim`, the width of the token sequences, and the fields of `Options`. Parameters belong to
    submodules and are used in their forward, where ZeRO-3 gathers them.
    """

    Options: ClassVar[type[Section]] = Section
    reads_audio_tokens = True  # whether the tokens of audio are read
    reads_text_tokens = False  # whether the tokens of text are read
    is_dual_encoder = False  # whether a caption and a clip are one unit vector each, which an index can hold

    @abstractmethod
    def scores(self, text: TokenSequence, audio: TokenSequence) -> Tensor:
        """[texts, audios] for any two sets in one process; differentiable, fp32 or wider whatever the autocast."""

    def block(self, text: TokenSequence, audio: TokenSequence, world: World | None = None) -> ScoreBlock:
        """All texts of the global batch [B, ...] against this rank's audios [b, ...]. Audio never travels."""
        world = world or World.current()
        return StoredScores(self.scores(gather_sequence(text, world, self.reads_text_tokens), audio), world)

    def embed_text(self, text: TokenSequence) -> Tensor:
        """Unit vectors [B, D] of a dual encoder. Raises UserError if a score needs both sides at once."""
        raise self._needs_pairs()

    def embed_audio(self, audio: TokenSequence) -> Tensor:
        """Unit vectors [b, D] of a dual encoder. Raises UserError if a score needs both sides at once."""
        raise self._needs_pairs()

    def _needs_pairs(self) -> UserError:
        return UserError(
            f"{type(self).__name__} scores pairs and has no vectors to index: use its scores(), or another scorer"
        )


def gather_sequence(own: TokenSequence, world: World, with_tokens: bool) -> TokenSequence:
    """The rows of all ranks in rank order, differentiable; without tokens the token axis comes back empty.

    Rows are padded to the longest of any rank. Pooled vectors travel in fp32 or wider, tokens in their own dtype.
    """
    pooled = world.gather(at_least_fp32(own.pooled))
    if not with_tokens:
        empty = own.tokens.new_zeros(len(pooled), 0, own.tokens.shape[-1])
        return TokenSequence(empty, own.mask.new_zeros(len(pooled), 0), pooled)
    extra = world.max_int(own.tokens.shape[1]) - own.tokens.shape[1]
    tokens = world.gather(pad(own.tokens, (0, 0, 0, extra)))
    mask = world.gather(pad(own.mask, (0, extra)).byte()).bool()
    return TokenSequence(tokens, mask, pooled)


def without_autocast(like: Tensor) -> torch.autocast:
    """Scores are computed in the dtype of their inputs, fp32 or wider, also inside an autocast region."""
    return torch.autocast(like.device.type, enabled=False)
