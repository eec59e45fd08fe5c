"""Scores of all pairs, tile by tile, computed again in the backward pass: memory is that of one tile.

Shape suffixes: B sequences, T tokens, D width; R rows and C columns of all scores, r and c those of a tile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from atr_scale.batch import TokenSequence
from atr_scale.score_block import at_least_fp32

Tensors = tuple[Tensor, ...]


def for_device(sizes: dict[str, int], device: torch.device) -> int:
    """The entry for a type of device; a type without one is taken for an accelerator like a GPU."""
    return sizes[device.type if device.type in sizes else "cuda"]


def real_tokens(sequence: TokenSequence) -> tuple[Tensor, Tensor]:
    """Tokens [B, T, D], fp32 or wider and zero if padded, and their mask [B, T].

    A sequence without any real token counts as one zero token, so that every softmax has something to choose from.
    """
    tokens = at_least_fp32(sequence.tokens).masked_fill(~sequence.mask.unsqueeze(-1), 0)
    first = torch.arange(sequence.mask.shape[1], device=tokens.device) == 0
    return tokens, sequence.mask | (first & ~sequence.mask.any(1, keepdim=True))


def score_tiles(
    function: Callable[[Tensors, Tensors], Tensor], rows: Tensors, columns: Tensors, tile: tuple[int, int]
) -> Tensor:
    """[R, C] from function(rows of a tile, columns of a tile) -> [r, c].

    rows, columns: tensors whose first axis is that of the scores; `tile` is the largest (r, c). Random numbers are
    replayed in the backward pass. The last tile is not computed again: it comes first there, before any other is alive.
    """
    stripes, parts = split(rows, tile[0]), split(columns, tile[1])
    *tiles, last = [(r, c) for r in stripes for c in parts]
    scores = [*(recomputed(function, r, c) for r, c in tiles), function(*last)]
    return torch.cat([torch.cat(scores[k : k + len(parts)], 1) for k in range(0, len(scores), len(parts))])


def in_groups(function: Callable[..., Tensors], tensors: Tensors, rows: int) -> Tensors:
    """function(*tensors), row by row of the first axis, at most `rows` rows at once."""
    groups = [recomputed(function, *group) for group in split(tensors, rows)]
    return tuple(torch.cat(parts) for parts in zip(*groups, strict=True))


def split(tensors: Tensors, rows: int) -> list[Tensors]:
    """Consecutive groups of at most `rows` rows of all tensors."""
    return list(zip(*(tensor.split(rows) for tensor in tensors), strict=True))


def recomputed(function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments), of which only the arguments are kept for the backward pass."""
    return checkpoint(function, *arguments, use_reentrant=False)
