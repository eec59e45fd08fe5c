"""Co-attention between the words of a caption and the frames of a clip (Sun et al., 2024, arXiv 2412.20914), built of
the self-attention and guided-attention blocks of MCAN (Yu et al., CVPR 2019, arXiv 1906.10770).

Shape suffixes: B sequences, T tokens, D width of the input, W width inside, h heads, J width of the compared vectors;
in a tile every one of G guides (captions, say) meets every one of P guided sequences (clips).

A guided vector depends on its guide: a clip has one for every caption, and every pair is scored with its own. Were a
clip guided by its matching caption alone, its vector would give the answer away.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import normalize, scaled_dot_product_attention

from atr_scale.batch import TokenSequence
from atr_scale.score_block import at_least_fp32
from atr_scale.scorers.scorer import Scorer
from atr_scale.scorers.tiles import Tensors, in_groups, real_tokens, score_tiles
from atr_scale.sections import Count, Section


class CoAttentionOptions(Section):
    """Which sizes the authors used is not known: the defaults are those of MCAN's small model."""

    configuration: Literal["single", "stacking", "iterating"] = Field(
        "iterating",
        description="the guide of layer l: y_1 of a single layer, y_l (stacking) or the last y (iterating)",
    )
    depth: Count | None = Field(None, description="layers; default: 5, for single 1")
    guidance: Literal["t2a", "both"] = Field(
        "t2a", description="words guide frames; both: frames, after blocks of their own, guide words as well"
    )
    share_weights: bool = Field(False, description="each stack is one block applied `depth` times")
    width: Count = Field(512, description="of all blocks")
    heads: Count = Field(8, description="of each attention; a divisor of the width")
    ffn_width: Count = Field(2048, description="hidden layer of the feed-forward layers")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.1, description="of all blocks")
    pool_width: Count = Field(512, description="hidden layer of the pooling")
    joint: Count = Field(1024, description="width of the compared vectors")
    pairs_per_tile: Count = Field(
        256,
        description="pairs whose activations are alive at once (13 MB a pair at these sizes, 30 words and 32 frames in"
        " fp32); they are computed again in the backward pass",
    )

    @model_validator(mode="after")
    def fits_together(self) -> CoAttentionOptions:
        if self.configuration == "single" and self.depth not in (None, 1):
            raise ValueError(f"depth is {self.depth} but single has one layer: choose stacking or iterating")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of heads {self.heads}: change one of them")
        return self


class CoAttentionScorer(Scorer):
    """Cosine of the caption's vector and the clip's vector as guided by the caption.

    Guides pass self-attention blocks once a sequence, y_l = SA_l(y_(l-1)); the guided side passes guided blocks once a
    pair, x_l = SGA_l(x_(l-1), guide of layer l). Attention pooling and a projection make one vector of each side.
    """

    Options = CoAttentionOptions
    reads_text_tokens = True

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
        tile = max(1, math.isqrt(self.pairs_per_tile))
        return score_tiles(self._tile, self._prepare(self.text, text), self._prepare(self.audio, audio), (tile, tile))

    def _prepare(self, side: Side, sequence: TokenSequence) -> Tensors:
        """All that does not depend on the other side: mask [B, T], see Side.forward for the rest."""
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
    """One modality: what it passes through alone, and what it passes through under a guide."""

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
        """[B, T, D] -> what is to be compared, and the guides [B, T, W] (by layer, or one for all; none if not asked).

        To be compared: tokens [B, T, W] if this side will be guided, else the unit vector [B, J].
        """
        projected = self.projection(tokens)
        levels = [projected]
        for layer in range(self.depth if self.self_blocks else 0):
            levels.append(self.self_blocks[layer % len(self.self_blocks)](levels[-1], mask))
        own = projected if self.guided_blocks else self.pooling(levels[-1], mask)
        return own, *(levels[1:] if self.guide_by_layer else levels[1:][-1:])

    def guided(self, tokens: Tensor, mask: Tensor, guides: list[Tensor], guide_mask: Tensor) -> Tensor:
        """[P, T, W] under each of G guides -> unit vectors [G, P, J]."""
        x = tokens.unsqueeze(0)  # as yet the same for all guides
        for layer in range(self.depth):
            block = self.guided_blocks[layer % len(self.guided_blocks)]
            x = block(x, mask, guides[layer % len(guides)], guide_mask)
        return self.pooling(x, mask)


class SelfAttentionBlock(nn.Module):
    """SA of MCAN: attention of a sequence over itself, then a feed-forward layer, each added and normalised."""

    def __init__(self, width: int, heads: int, ffn_width: int, dropout: float) -> None:
        super().__init__()
        self.attention, self.attention_norm = MultiHeadAttention(width, heads, dropout), nn.LayerNorm(width)
        self.feed_forward, self.feed_forward_norm = _feed_forward(width, ffn_width, width, dropout), nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[B, T, W] with mask [B, T] -> [B, T, W]."""
        x = self.attention_norm(x + self.dropout(self.attention(x, x, mask)))
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))


class GuidedAttentionBlock(nn.Module):
    """SGA of MCAN: as SA, with attention over the guide between the two."""

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
        flat = x.flatten(0, 1)
        own = self.self_attention(flat, flat, mask.repeat(len(x), 1)).view_as(x)
        x = self.self_attention_norm(x + self.dropout(own))
        # To their guide, the tokens of all P sequences are so many queries.
        found = self.guided_attention(x.flatten(1, 2), guide, guide_mask).unflatten(1, x.shape[1:3])
        x = self.guided_attention_norm(x + self.dropout(found))
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))


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
        return self.output(found.transpose(1, 2).flatten(2))

    def _by_head(self, x: Tensor) -> Tensor:
        """[B, T, W] -> [B, h, T, W / h]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class AttFlat(nn.Module):
    """The pooling of MCAN with one glimpse: tokens averaged with learned weights, then projected."""

    def __init__(self, width: int, hidden: int, joint: int, dropout: float) -> None:
        super().__init__()
        self.weight, self.projection = _feed_forward(width, hidden, 1, dropout), nn.Linear(width, joint)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[..., P, T, W] with mask [P, T] -> unit vectors [..., P, J], fp32 or wider whatever the autocast."""
        logits = at_least_fp32(self.weight(x).squeeze(-1)).masked_fill(~mask, -math.inf)
        pooled = (logits.softmax(-1).unsqueeze(-1) * x).sum(-2)
        return normalize(at_least_fp32(self.projection(pooled)), dim=-1)


def _feed_forward(width: int, hidden: int, out: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, out))
