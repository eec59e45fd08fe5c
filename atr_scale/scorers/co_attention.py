"""Co-attention between the tokens of a caption and the frames of a clip (Sun et al., 2024, arXiv 2412.20914).

A cross-encoder made of the self-attention and guided-attention blocks of MCAN (Yu et al., CVPR 2019, arXiv 1906.10770).

Shape suffixes: B sequences, T tokens, D width of the input, W width of the blocks, h heads, J width of the compared
embeddings. A tile is every one of G guides (for example captions) with every one of P guided sequences (clips).

The embedding of a guided sequence depends on its guide: a clip has one for every caption, and each pair is scored with
its own. If a clip were guided by its matching caption alone, its embedding would reveal the match.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import normalize, scaled_dot_product_attention

from atr_scale.batch import TokenSequence
from atr_scale.precision import autocast, encoder_products
from atr_scale.score_block import at_least_fp32
from atr_scale.scorers.scorer import Scorer
from atr_scale.scorers.tiles import Tensors, in_groups, real_tokens, score_tiles
from atr_scale.sections import Count, Section


class CoAttentionOptions(Section):
    """Options of `coattention`. The paper's sizes are not known: the defaults are those of MCAN's small model."""

    configuration: Literal["single", "stacking", "iterating"] = Field(
        "iterating",
        description="guide of layer l: y_1 and one layer (single), y_l (stacking) or the last y (iterating)",
    )
    depth: Count | None = Field(None, description="number of layers; default: 5, or 1 for single")
    guidance: Literal["t2a", "both"] = Field(
        "t2a", description="t2a: tokens guide frames; both: frames also guide tokens"
    )
    share_weights: bool = Field(False, description="whether each stack is one block, applied `depth` times")
    width: Count = Field(512, description="width of all blocks")
    heads: Count = Field(8, description="heads of each attention; a divisor of the width")
    ffn_width: Count = Field(2048, description="width of the hidden layer of the feed-forward layers")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.1, description="dropout in all blocks")
    pool_width: Count = Field(512, description="width of the hidden layer of the pooling")
    joint: Count = Field(1024, description="width of the compared embeddings")
    pairs_per_tile: Count = Field(
        256,
        description="pairs whose activations are in memory at once (13 MB each by default, 30 tokens, 32 frames)",
    )

    @model_validator(mode="after")
    def fits_together(self) -> CoAttentionOptions:
        if self.configuration == "single" and self.depth not in (None, 1):
            raise ValueError(f"depth is {self.depth} but single has one layer: choose stacking or iterating")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of heads {self.heads}: change one of them")
        return self


class CoAttentionScorer(Scorer):
    """Cosine of the caption's embedding and the clip's embedding under the guidance of the caption.

    Guides pass the self-attention blocks once for each sequence, y_l = SA_l(y_(l-1)). Guided sequences pass the guided
    blocks once for each pair, x_l = SGA_l(x_(l-1), guide of layer l). Attention pooling and a projection make one
    embedding of each side. The arguments are `dim` and the fields of `CoAttentionOptions`.
    """

    Options = CoAttentionOptions
    reads_text_tokens = True
    largest = 1.0

    def __init__(
        self,
        dim: int,
        configuration: str,
        depth: int | None,
        guidance: str,
        share_weights: bool,
        width: int,
        heads: int,
        ffn_width: int,
        dropout: float,
        pool_width: int,
        joint: int,
        pairs_per_tile: int,
    ) -> None:
        super().__init__()
        layers = depth or (1 if configuration == "single" else 5)
        self.pairs_per_tile = pairs_per_tile
        self.mutual = guidance == "both"

        def side(guides: bool, guided: bool) -> Side:
            blocks = 1 if share_weights else layers
            return Side(
                nn.Linear(dim, width),
                [SelfAttentionBlock(width, heads, ffn_width, dropout) for _ in range(blocks if guides else 0)],
                [GuidedAttentionBlock(width, heads, ffn_width, dropout) for _ in range(blocks if guided else 0)],
                AttFlat(width, pool_width, joint, dropout),
                layers,
                guide_by_layer=configuration == "stacking",
            )

        self.text = side(guides=True, guided=self.mutual)
        self.audio = side(guides=self.mutual, guided=True)

    def scores(self, text: TokenSequence, audio: TokenSequence) -> Tensor:
        """See `Scorer`. The blocks run in the encoders' precision; embeddings and cosines are fp32 or wider."""
        tile = max(1, math.isqrt(self.pairs_per_tile))
        autocast_to, tf32 = self.precision
        with encoder_products(tf32), autocast(audio.tokens.device, autocast_to):
            text_part, audio_part = self._prepare(self.text, text), self._prepare(self.audio, audio)
            return score_tiles(self._tile, text_part, audio_part, (tile, tile))

    def attention(self, text: TokenSequence, audio: TokenSequence) -> Tensor:
        """See `Scorer`: the mean over the heads of the last guided layer.

        With mutual guidance it is that of tokens over frames, otherwise that of frames over tokens, read by token.
        """
        autocast_to, tf32 = self.precision
        with encoder_products(tf32), autocast(audio.tokens.device, autocast_to):
            text_mask, own_text, *text_guides = self._prepare(self.text, text)
            audio_mask, own_audio, *audio_guides = self._prepare(self.audio, audio)
            if self.mutual:
                return self.text.guided_weights(own_text, text_mask, audio_guides, audio_mask)
            return self.audio.guided_weights(own_audio, audio_mask, text_guides, text_mask).T

    def _prepare(self, side: Side, sequence: TokenSequence) -> Tensors:
        """The part of the computation that needs no other side: mask [B, T] and the results of Side.forward."""
        tokens, mask = real_tokens(sequence)
        return mask, *in_groups(side, (tokens, mask), self.pairs_per_tile)

    def _tile(self, text: Tensors, audio: Tensors) -> Tensor:
        (text_mask, own_text, *text_guides), (audio_mask, own_audio, *audio_guides) = text, audio
        audio_GPJ = self.audio.guided(own_audio, audio_mask, text_guides, text_mask)
        if not self.mutual:
            return (own_text.unsqueeze(1) * audio_GPJ).sum(-1)
        text_GPJ = self.text.guided(own_text, text_mask, audio_guides, audio_mask)
        return (text_GPJ.transpose(0, 1) * audio_GPJ).sum(-1)


class Side(nn.Module):
    """The modules of one modality: those that it passes alone, and those that it passes under a guide."""

    def __init__(
        self,
        projection: nn.Linear,
        self_blocks: list[SelfAttentionBlock],
        guided_blocks: list[GuidedAttentionBlock],
        pooling: AttFlat,
        depth: int,
        guide_by_layer: bool,
    ) -> None:
        super().__init__()
        self.projection, self.pooling = projection, pooling
        self.self_blocks, self.guided_blocks = nn.ModuleList(self_blocks), nn.ModuleList(guided_blocks)
        self.depth, self.guide_by_layer = depth, guide_by_layer

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensors:
        """[B, T, D] -> (own, *guides).

        own: tokens [B, T, W] if this side is guided, else its embedding [B, J] of unit length.
        guides: [B, T, W], one for each layer or one for all layers; none if this side does not guide.
        """
        projected = self.projection(tokens)
        levels = [projected]
        for layer in range(self.depth if self.self_blocks else 0):
            levels.append(self.self_blocks[layer % len(self.self_blocks)](levels[-1], mask))
        own = projected if self.guided_blocks else self.pooling(levels[-1], mask)
        return own, *(levels[1:] if self.guide_by_layer else levels[1:][-1:])

    def guided(self, tokens: Tensor, mask: Tensor, guides: list[Tensor], guide_mask: Tensor) -> Tensor:
        """[P, T, W] under each of G guides -> embeddings [G, P, J] of unit length."""
        embeddings: Tensor = self.pooling(self._after(self.depth, tokens, mask, guides, guide_mask), mask)
        return embeddings

    def guided_weights(self, tokens: Tensor, mask: Tensor, guides: list[Tensor], guide_mask: Tensor) -> Tensor:
        """Weights [T, T'] of the last layer's attention of one sequence [1, T, W] over its guide [1, T', W]."""
        last = self.depth - 1
        block: Any = self.guided_blocks[last % len(self.guided_blocks)]
        x = block.attend_to_itself(self._after(last, tokens, mask, guides, guide_mask), mask)
        weights: Tensor = block.guided_attention.weights(x.flatten(1, 2), guides[last % len(guides)], guide_mask)
        return weights[0]

    def _after(self, layers: int, tokens: Tensor, mask: Tensor, guides: list[Tensor], guide_mask: Tensor) -> Tensor:
        """[P, T, W] -> [G or 1, P, T, W] after this number of guided layers."""
        x = tokens.unsqueeze(0)  # the same for all guides before the first layer
        for layer in range(layers):
            block = self.guided_blocks[layer % len(self.guided_blocks)]
            x = block(x, mask, guides[layer % len(guides)], guide_mask)
        return x


class SelfAttentionBlock(nn.Module):
    """SA of MCAN: self-attention, then a feed-forward layer, each with a residual connection and a LayerNorm."""

    def __init__(self, width: int, heads: int, ffn_width: int, dropout: float) -> None:
        super().__init__()
        self.attention, self.attention_norm = MultiHeadAttention(width, heads, dropout), nn.LayerNorm(width)
        self.feed_forward, self.feed_forward_norm = _feed_forward(width, ffn_width, width, dropout), nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[B, T, W] with mask [B, T] -> [B, T, W]."""
        x = self.attention_norm(x + self.dropout(self.attention(x, x, mask)))
        y: Tensor = self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))
        return y


class GuidedAttentionBlock(nn.Module):
    """SGA of MCAN: like SA, with attention over the guide between the two."""

    def __init__(self, width: int, heads: int, ffn_width: int, dropout: float) -> None:
        super().__init__()
        self.self_attention, self.self_attention_norm = MultiHeadAttention(width, heads, dropout), nn.LayerNorm(width)
        self.guided_attention, self.guided_attention_norm = (
            MultiHeadAttention(width, heads, dropout),
            nn.LayerNorm(width),
        )
        self.feed_forward, self.feed_forward_norm = _feed_forward(width, ffn_width, width, dropout), nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor, guide: Tensor, guide_mask: Tensor) -> Tensor:
        """[G or 1, P, T, W] with mask [P, T], guides [G, T', W] with mask [G, T'] -> [G, P, T, W]."""
        x = self.attend_to_itself(x, mask)
        # The tokens of all P sequences are queries over the same guide.
        found = self.guided_attention(x.flatten(1, 2), guide, guide_mask).unflatten(1, x.shape[1:3])
        x = self.guided_attention_norm(x + self.dropout(found))
        y: Tensor = self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))
        return y

    def attend_to_itself(self, x: Tensor, mask: Tensor) -> Tensor:
        """The part before the guide, [G or 1, P, T, W] -> the same shape."""
        flat = x.flatten(0, 1)
        own = self.self_attention(flat, flat, mask.repeat(len(x), 1)).view_as(x)
        y: Tensor = self.self_attention_norm(x + self.dropout(own))
        return y


class MultiHeadAttention(nn.Module):
    """Multi-head scaled dot-product attention with dropout on its weights."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """Queries [B or 1, T, W] over contexts [B, T', W] with mask [B, T'] -> [B, T, W]."""
        query = self._by_head(self.query(x)).expand(len(context), -1, -1, -1)
        key, value = (self._by_head(part) for part in self.key_value(context).chunk(2, dim=-1))
        dropout = self.dropout if self.training else 0.0
        found = scaled_dot_product_attention(query, key, value, mask[:, None, None], dropout)
        y: Tensor = self.output(found.transpose(1, 2).flatten(2))
        return y

    def weights(self, x: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """The weights [B, T, T'] of `forward`, the mean over the heads, in fp32 or wider."""
        query, key = self._by_head(self.query(x)), self._by_head(self.key_value(context).chunk(2, dim=-1)[0])
        logits = at_least_fp32(query @ key.mT) / math.sqrt(query.shape[-1])
        return logits.masked_fill(~mask[:, None, None], -math.inf).softmax(-1).mean(1)

    def _by_head(self, x: Tensor) -> Tensor:
        """[B, T, W] -> [B, h, T, W / h]."""
        heads: Tensor = x.unflatten(-1, (self.heads, -1))
        return heads.transpose(1, 2)


class AttFlat(nn.Module):
    """The attention pooling of MCAN with one glimpse: a weighted mean of tokens with learned weights, projected."""

    def __init__(self, width: int, hidden: int, joint: int, dropout: float) -> None:
        super().__init__()
        self.weight, self.projection = _feed_forward(width, hidden, 1, dropout), nn.Linear(width, joint)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[..., P, T, W] with mask [P, T] -> unit vectors [..., P, J], fp32 or wider even under autocast."""
        logits = at_least_fp32(self.weight(x).squeeze(-1)).masked_fill(~mask, -math.inf)
        pooled = (logits.softmax(-1).unsqueeze(-1) * x).sum(-2)
        return normalize(at_least_fp32(self.projection(pooled)), dim=-1)


def _feed_forward(width: int, hidden: int, out: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, out))
