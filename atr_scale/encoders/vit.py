"""The pre-norm transformer layer that PaSST and ATST-Frame share; module names follow the keys of their checkpoints.

Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021 (arXiv 2010.11929), equations 2 and 3.

Shape suffixes: B batch, N tokens, D width, H heads, E width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from atr_scale.encoders.attention import Attention, is_fused

EPSILON = 1e-6


class PatchAttention(nn.Module):
    """Multi-head self-attention over all tokens."""

    def __init__(self, dim: int, heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BND: Tensor, attention: Attention) -> Tensor:
        q_BHNE, k_BHNE, v_BHNE = self.qkv(x_BND).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if is_fused(attention, x_BND):
            mixed_BHNE = scaled_dot_product_attention(q_BHNE, k_BHNE, v_BHNE)
        else:
            scores_BHNN = (q_BHNE * q_BHNE.shape[3] ** -0.5) @ k_BHNE.transpose(2, 3)
            mixed_BHNE = scores_BHNN.softmax(3).to(v_BHNE.dtype) @ v_BHNE
        projected_BND: Tensor = self.proj(mixed_BHNE.transpose(1, 2).flatten(2))
        return projected_BND


class MLP(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x_BND: Tensor) -> Tensor:
        y_BND: Tensor = self.fc2(nn.functional.gelu(self.fc1(x_BND)))
        return y_BND


class Block(nn.Module):
    """A pre-norm layer: attention, then a network of two linear layers.

    attention: its implementation. The result is the same up to rounding.
    """

    def __init__(self, dim: int, heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, EPSILON)
        self.attn = PatchAttention(dim, heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim, EPSILON)
        self.mlp = MLP(dim)

    def forward(self, x_BND: Tensor, attention: Attention) -> Tensor:
        x_BND = x_BND + self.attn(self.norm1(x_BND), attention)
        y_BND: Tensor = x_BND + self.mlp(self.norm2(x_BND))
        return y_BND


def embedding(*shape: int) -> nn.Parameter:
    """A learned token or position."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=0.02))


def initialise(encoder: nn.Module) -> None:
    """Draw the weights of linear layers and patch projections with Glorot's scale; set biases to zero."""
    for layer in encoder.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight.detach().flatten(1))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
