"""Which implementation of attention an audio encoder uses: the formula, or the fused kernel of torch."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Attention = Literal["auto", "eager", "sdpa"]


def is_fused(attention: Attention, like: Tensor) -> bool:
    """Whether attention over `like` uses the fused kernel: by default on a GPU, where it is faster."""
    return attention == "sdpa" or (attention == "auto" and like.is_cuda)
