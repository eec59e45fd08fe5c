"""Token sequences with random contents, for tests of scorers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from atr_scale.batch import TokenSequence


def random_sequence(
    lengths: Sequence[int], dim: int, seed: int, extra: int = 0, filler: float = 50.0, gradient: bool = False
) -> TokenSequence:
    """Float64 sequences of `lengths` real tokens; padding, `extra` columns of it beyond the longest, holds `filler`.

    The contents depend on the seed and the lengths alone.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.full((len(lengths), max(lengths) + extra, dim), filler, dtype=torch.float64)
    mask = torch.zeros(tokens.shape[:2], dtype=torch.bool)
    for row, length in enumerate(lengths):
        tokens[row, :length] = torch.randn(length, dim, generator=generator, dtype=torch.float64)
        mask[row, :length] = True
    pooled = torch.randn(len(lengths), dim, generator=generator, dtype=torch.float64)
    return TokenSequence(tokens.requires_grad_(gradient), mask, pooled)


def kept_numbers(function: Callable[[], Tensor]) -> int:
    """How many numbers `function` keeps for its backward pass, outside of what it recomputes."""
    count = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal count
        count += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        function()
    return count
