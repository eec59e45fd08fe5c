"""What every encoder returns.

Shape suffixes: B batch, T tokens (audio frames or words), D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class TokenSequence(NamedTuple):
    """A batch of encoded clips or captions.

    A tuple, so that DeepSpeed finds the tensors in it: parameters that a module uses itself, rather than in a
    submodule, are gathered for the backward pass by a hook on what it returns.

    tokens: [B, T, D] one vector a frame or word.
    mask:   [B, T] bool, True where the token is real; special tokens of a tokenizer are masked out.
    pooled: [B, D] the encoder's own summary of the whole clip or caption.
    """

    tokens: Tensor
    mask: Tensor
    pooled: Tensor

    def map(self, tokens: Callable[[Tensor], Tensor], pooled: Callable[[Tensor], Tensor]) -> TokenSequence:
        """The sequence with `tokens` and `pooled` passed through the given functions; the mask stays."""
        return TokenSequence(tokens(self.tokens), self.mask, pooled(self.pooled))

    def take(self, rows: Tensor) -> TokenSequence:
        """Rows `rows` (int64) of the batch."""
        return TokenSequence(self.tokens[rows], self.mask[rows], self.pooled[rows])

    def to(self, device: torch.device | str) -> TokenSequence:
        return TokenSequence(self.tokens.to(device), self.mask.to(device), self.pooled.to(device))

    @staticmethod
    def cat(parts: list[TokenSequence]) -> TokenSequence:
        """Batches joined along B; shorter token axes are padded with masked zeros."""
        length = max(part.tokens.shape[1] for part in parts)
        tokens = [torch.nn.functional.pad(p.tokens, (0, 0, 0, length - p.tokens.shape[1])) for p in parts]
        masks = [torch.nn.functional.pad(p.mask, (0, length - p.mask.shape[1])) for p in parts]
        return TokenSequence(torch.cat(tokens), torch.cat(masks), torch.cat([p.pooled for p in parts]))
