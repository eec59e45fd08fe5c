"""The base class of scorers.

Shape suffixes: B texts of the global batch, b texts or audios of this rank, L tokens of a text, T frames, D width.

Texts travel between ranks, audio does not: a rank scores all texts of the global batch against its own audios.
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
from atr_scale.products import HeadProducts
from atr_scale.score_block import ScoreBlock, StoredScores, at_least_fp32
from atr_scale.sections import Section


class Scorer(nn.Module, ABC):
    """Scores any text against any audio. The score of a pair depends on the pair alone, not on the rest of the batch.

    A subclass has

    - `Options`: a `Section` with its options, which a configuration gives as `model.scorer.options`.
    - `__init__(self, dim, **options)`: `dim` is the width D of the token sequences, after `model.projection`; `options`
      are the fields of `Options`, by keyword.
    - `scores`: all pairs of two sets, differentiable. Inputs have tokens [n, T, D], mask [n, T] (True for real tokens,
      to be honoured) and pooled [n, D]. Scores are of the order of a cosine: losses divide them by the temperature.
    - `largest`: no score is larger in absolute value, whatever the parameters; 1 for cosines, None if there is no such
      number, which costs each loss a wait for the GPU.
    - `reads_audio_tokens` and `reads_text_tokens`: whether `scores` uses tokens and mask of that side, or `pooled`
      alone. Tokens that are not read are not projected and, for texts, not sent between ranks: they arrive empty.
    - A dual encoder sets `is_dual_encoder`, has `embed_text` and `embed_audio`, and overrides `block` to return
      `EmbeddingScores`; `CosineScorer` does all of this and needs a function that pools the frames.

    Parameters belong to submodules and are used in the forward method of these, where ZeRO stage 3 gathers them. Scores
    are computed in fp32 or wider even under autocast, see `without_autocast`. An entry in `SCORERS` gives the scorer
    its name.
    """

    Options: ClassVar[type[Section]] = Section
    reads_audio_tokens = True  # whether the tokens of audio are read
    reads_text_tokens = False  # whether the tokens of text are read
    is_dual_encoder = False  # whether scores are dot products of embeddings
    largest: float | None = None  # bound of the absolute value of a score
    products: HeadProducts = "ieee"  # precision of large fp32 products, `train.head_products`; a Retriever sets it

    @abstractmethod
    def scores(self, text: TokenSequence, audio: TokenSequence) -> Tensor:
        """[texts, audios] for any two sets in one process; differentiable, fp32 or wider even under autocast."""

    def block(self, text: TokenSequence, audio: TokenSequence, world: World | None = None) -> ScoreBlock:
        """Scores [B, b] of all texts of the global batch against this rank's audios.

        text, audio: this rank's sequences [b, ...]. world: by default the default process group.
        """
        world = world or World.current()
        scores = self.scores(gather_sequence(text, world, self.reads_text_tokens), audio)
        return StoredScores(scores, world, self.products, self.largest)

    def embed_text(self, text: TokenSequence) -> Tensor:
        """Embeddings [n, D] of unit length, fp32 or wider. Raises UserError for a pairwise scorer."""
        raise self._needs_pairs()

    def embed_audio(self, audio: TokenSequence) -> Tensor:
        """Embeddings [n, D] of unit length, fp32 or wider. Raises UserError for a pairwise scorer."""
        raise self._needs_pairs()

    def _needs_pairs(self) -> UserError:
        return UserError(
            f"{type(self).__name__} is a pairwise scorer, without embeddings: use its scores(), or a dual encoder"
        )


def gather_sequence(own: TokenSequence, world: World, with_tokens: bool) -> TokenSequence:
    """The sequences of all ranks in rank order, differentiable; without tokens the token axis is empty.

    Sequences are padded to the longest of any rank. `pooled` is sent in fp32 or wider, tokens in their own dtype.
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
    """A context without autocast on the device of `like`, so that scores are computed in the dtype of their inputs."""
    return torch.autocast(like.device.type, enabled=False)
