"""The base class of scorers.

Shape suffixes: B texts of the global batch, b texts or audios of this rank, L tokens of a text, T frames, D width.

Texts travel between ranks, audio does not: a rank scores all texts of the global batch against its own audios.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from atr_scale.batch import TokenSequence
from atr_scale.distributed.world import World
from atr_scale.errors import UserError
from atr_scale.precision import Precision
from atr_scale.products import HeadProducts, fp32_products
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
    - `attention`, if there is attention over the frames: `TrainedModel.moments` reads it.
    - A dual encoder sets `is_dual_encoder`, has `embed_text` and `embed_audio`, and overrides `start_gather` and
      `block_of` (or `block` alone) to return `EmbeddingScores`; `CosineScorer` does all of this and needs a function
      that pools the frames.

    Parameters belong to submodules and are used in the forward method of these, where ZeRO stage 3 gathers them. Scores
    are computed in fp32 or wider even under autocast, see `exact_products`. An entry in `SCORERS` gives the scorer
    its name.
    """

    Options: ClassVar[type[Section]] = Section
    reads_audio_tokens = True  # whether the tokens of audio are read
    reads_text_tokens = False  # whether the tokens of text are read
    is_dual_encoder = False  # whether scores are dot products of embeddings
    largest: float | None = None  # bound of the absolute value of a score
    products: HeadProducts = "ieee"  # precision of large fp32 products, `train.head_products`; a Retriever sets it
    precision = Precision()  # of a scorer that is a network over pairs, as of encoders; a Retriever sets it

    @abstractmethod
    def scores(self, text: TokenSequence, audio: TokenSequence) -> Tensor:
        """[texts, audios] for any two sets in one process; differentiable, fp32 or wider even under autocast."""

    def block(self, text: TokenSequence, audio: TokenSequence, world: World | None = None) -> ScoreBlock:
        """Scores [B, b] of all texts of the global batch against this rank's audios.

        text, audio: this rank's sequences [b, ...]. world: by default the default process group.
        """
        world = world or World.current()
        return self.block_of(self.start_gather(text, world)(), audio, world)

    def start_gather(self, text: TokenSequence, world: World) -> Callable[[], Any]:
        """Start to gather what `block_of` reads of the texts of all ranks; the function waits for it."""
        return start_gather_sequence(text, world, self.reads_text_tokens)

    def block_of(self, texts: Any, audio: TokenSequence, world: World) -> ScoreBlock:
        """`block` of what `start_gather` has gathered."""
        return StoredScores(self.scores(texts, audio), world, self.products, self.largest)

    def embed_text(self, text: TokenSequence) -> Tensor:
        """Embeddings [n, D] of unit length, fp32 or wider. Raises UserError for a pairwise scorer."""
        raise self._needs_pairs()

    def embed_audio(self, audio: TokenSequence) -> Tensor:
        """Embeddings [n, D] of unit length, fp32 or wider. Raises UserError for a pairwise scorer."""
        raise self._needs_pairs()

    @property
    def attends_over_frames(self) -> bool:
        """Whether the scorer has an `attention` of its own."""
        return type(self).attention is not Scorer.attention

    def attention(self, text: TokenSequence, audio: TokenSequence) -> Tensor:
        """[L, F]: attention of each token of one text over the frames of one clip, not negative, fp32 or wider.

        text: tokens [1, L, D] and pooled [1, D]. If the scorer does not read tokens of texts, they are the pooled
        embeddings of the words, each encoded as a text of its own. audio: tokens [1, F, D]. Padding is honoured as in
        `scores`; rows and columns of padding mean nothing. docs/math/moments.md has the rule of each scorer.
        Only a scorer with attention over the frames has it, see `attends_over_frames`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no attention over frames")

    def scores_of_frames(self, text: TokenSequence, audio: TokenSequence) -> Tensor:
        """[F]: the score of one text with each frame of one clip, as if the clip were this frame alone."""
        tokens, mask = audio.tokens[0].unsqueeze(1), audio.mask[0].unsqueeze(1)
        return self.scores(text, TokenSequence(tokens, mask, audio.pooled.expand(len(mask), -1)))[0]

    def _needs_pairs(self) -> UserError:
        return UserError(
            f"{type(self).__name__} is a pairwise scorer, without embeddings: use its scores(), or a dual encoder"
        )


def gather_sequence(own: TokenSequence, world: World, with_tokens: bool) -> TokenSequence:
    """The sequences of all ranks in rank order, differentiable; without tokens the token axis is empty.

    Sequences are padded to the longest of any rank. `pooled` is sent in fp32 or wider, tokens in their own dtype.
    """
    return start_gather_sequence(own, world, with_tokens)()


def start_gather_sequence(own: TokenSequence, world: World, with_tokens: bool) -> Callable[[], TokenSequence]:
    """`gather_sequence` in two halves, see `World.start_gather`."""
    pooled = world.start_gather(at_least_fp32(own.pooled))
    extra = world.max_int(own.tokens.shape[1]) - own.tokens.shape[1] if with_tokens else 0
    tokens = world.start_gather(pad(own.tokens, (0, 0, 0, extra))) if with_tokens else None
    mask = world.start_gather(pad(own.mask, (0, extra)).byte()) if with_tokens else None

    def finish() -> TokenSequence:
        all_pooled = pooled()
        if tokens is None or mask is None:
            empty = own.tokens.new_zeros(len(all_pooled), 0, own.tokens.shape[-1])
            return TokenSequence(empty, own.mask.new_zeros(len(all_pooled), 0), all_pooled)
        return TokenSequence(tokens(), mask().bool(), all_pooled)

    return finish


@contextmanager
def exact_products(like: Tensor) -> Iterator[None]:
    """Inside, scores on the device of `like` are computed in the dtype of their inputs: no autocast, no TF32."""
    with fp32_products("ieee"), torch.autocast(like.device.type, enabled=False):
        yield
