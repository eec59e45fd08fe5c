"""Scores of all pairs by gradient checkpointing of tiles: activations take the memory of one tile.

Shape suffixes: B sequences, T tokens, D width; R rows and C columns of all scores, r and c those of a tile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from atr_scale.batch import TokenSequence
from atr_scale.memory import free_device_memory
from atr_scale.score_block import at_least_fp32, slices

Tensors = tuple[Tensor, ...]


# Of a CPU: numbers in a tensor of a tile, as many as its caches hold, and bytes of tiles kept for the backward pass.
CPU_TILE_NUMBERS, CPU_KEPT_BYTES = 2**19, 2**26
# Of a GPU's free memory: the share of a tensor of a tile, of which about eight exist at once, and that of kept tiles.
TILE_SHARE, KEPT_SHARE = 1 / 64, 1 / 2
CPU_TEXTS_PER_TILE = 1024


def tile_numbers(like: Tensor) -> int:
    """Numbers of `like` in a tensor of a tile. On a GPU a power of two, lest every run adds up in another order."""
    if like.device.type == "cpu":
        return CPU_TILE_NUMBERS
    share = int(free_device_memory(like.device) * TILE_SHARE) // like.element_size()
    return 1 << max(0, share.bit_length() - 1)


def kept_bytes(device: torch.device) -> int:
    """Bytes of tiles that may be kept for the backward pass."""
    return CPU_KEPT_BYTES if device.type == "cpu" else int(free_device_memory(device) * KEPT_SHARE)


def pair_tiles(texts: int, clips: int, numbers_per_pair: int, like: Tensor) -> list[tuple[slice, slice]]:
    """(texts, clips) of the tiles of [texts, clips], clips outside. A GPU's tiles have all texts, if they fit."""
    numbers = tile_numbers(like) // numbers_per_pair
    rows = min(texts, max(1, numbers), CPU_TEXTS_PER_TILE if like.device.type == "cpu" else texts)
    columns = max(1, numbers // max(1, rows))
    return [(r, c) for c in slices(0, clips, columns) for r in slices(0, texts, max(1, rows))]


def real_tokens(sequence: TokenSequence) -> tuple[Tensor, Tensor]:
    """Tokens [B, T, D], fp32 or wider and zero if padded, and their mask [B, T].

    A sequence without real tokens counts as one zero token, so that no softmax is over an empty set.
    """
    tokens = at_least_fp32(sequence.tokens).masked_fill(~sequence.mask.unsqueeze(-1), 0)
    first = torch.arange(sequence.mask.shape[1], device=tokens.device) == 0
    return tokens, sequence.mask | (first & ~sequence.mask.any(1, keepdim=True))


def score_tiles(
    function: Callable[[Tensors, Tensors], Tensor], rows: Tensors, columns: Tensors, tile: tuple[int, int]
) -> Tensor:
    """[R, C] from function(rows of a tile, columns of a tile) -> [r, c].

    rows, columns: tensors whose first axis is that of the scores. tile: the largest (r, c). Tiles are computed again in
    the backward pass, with the same random numbers. The last tile is not: the backward pass starts with it, when the
    activations of no other tile exist.
    """
    stripes, parts = split(rows, tile[0]), split(columns, tile[1])
    *tiles, last = [(r, c) for r in stripes for c in parts]
    scores = [*(recomputed(function, r, c) for r, c in tiles), function(*last)]
    return torch.cat([torch.cat(scores[k : k + len(parts)], 1) for k in range(0, len(scores), len(parts))])


def in_groups(function: Callable[..., Tensors], tensors: Tensors, rows: int) -> Tensors:
    """function(*tensors), for at most `rows` rows of the first axis at once, computed again in the backward pass."""
    groups = [recomputed(function, *group) for group in split(tensors, rows)]
    return tuple(torch.cat(parts) for parts in zip(*groups, strict=True))


def split(tensors: Tensors, rows: int) -> list[Tensors]:
    """Consecutive groups of at most `rows` rows of all tensors."""
    return list(zip(*(tensor.split(rows) for tensor in tensors), strict=True))


def recomputed(function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments) with gradient checkpointing: only the arguments are kept for the backward pass."""
    return checkpoint(function, *arguments, use_reentrant=False)
