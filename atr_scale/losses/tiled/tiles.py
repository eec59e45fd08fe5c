"""Tiles of a score block: their place in the block, the positive pairs inside them, and memory to compute them in.

Shape suffixes: B texts of the global batch, b audios of this rank, m rows and n columns of a tile, P pairs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from atr_scale import score_block
from atr_scale.batch import on_device
from atr_scale.losses.targets import Pairs
from atr_scale.memory import free_device_memory
from atr_scale.score_block import ScoreBlock, slices

# Rows of a tile on a CPU, where it fits in the cache of a core and its matrix products still run at full speed.
TILE_ROWS = 512
# Bytes of the gradients and of the tiles kept from the forward pass to the backward pass, together, on a CPU. A kept
# tile saves a matrix product. The size is fixed so that memory grows with the batch and not with its square: the
# gradients alone take this much at 37,000 pairs of width 512.
LOSS_BYTES = 144 * 2**20
# Part of a GPU's memory that is free at the first loss, which a loss may use: half for what it keeps, as on a CPU, and
# the rest for TILES_AT_ONCE buffers of a tile's size.
FREE_SHARE = 1 / 8
TILES_AT_ONCE = 8
MOST_ELEMENTS = 2**30  # of a tile: a BLAS counts in 32 bits


@cache
def loss_bytes(device: torch.device) -> int:
    """Bytes that a loss may keep from its forward pass to its backward pass: see LOSS_BYTES and FREE_SHARE.

    On a GPU a power of two, so that tiles, and with them the last bits of a loss, do not follow small changes in free
    memory.
    """
    if device.type == "cpu":
        return LOSS_BYTES
    return 1 << int(math.log2(free_device_memory(device) * FREE_SHARE / 2))


@dataclass(frozen=True)
class Tile:
    """Some rows and some columns of a block; `number` counts tiles in the order of visits."""

    number: int
    rows: slice
    columns: slice

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start


@dataclass(frozen=True)
class Stripe:
    """Some columns of a block with all B rows, as tiles from the first row to the last."""

    columns: slice
    tiles: tuple[Tile, ...]

    @property
    def rows(self) -> slice:
        return slice(0, self.tiles[-1].rows.stop)

    @property
    def shape(self) -> tuple[int, int]:
        """(B, n)."""
        return self.rows.stop, self.columns.stop - self.columns.start


def stripes_of(block: ScoreBlock, times_smaller: int = 1) -> list[Stripe]:
    """All of a block in tiles.

    On a CPU they have TILE_ROWS / times_smaller rows and STRIPE_COLUMNS columns, on a GPU as many as memory allows.
    """
    rows, columns = _tile_shape(block, times_smaller)
    number = itertools.count()
    return [
        Stripe(part, tuple(Tile(next(number), each, part) for each in slices(0, block.shape[0], rows)))
        for part in slices(0, block.shape[1], columns)
    ]


def _tile_shape(block: ScoreBlock, times_smaller: int) -> tuple[int, int]:
    if block.device.type == "cpu":
        return max(1, TILE_ROWS // times_smaller), score_block.STRIPE_COLUMNS
    elements = min(loss_bytes(block.device) // (TILES_AT_ONCE * block.dtype.itemsize), MOST_ELEMENTS)
    rows = min(block.shape[0], elements)
    return rows, max(1, min(block.shape[1], elements // rows))


def tiles_of(stripes: Sequence[Stripe]) -> list[Tile]:
    """The tiles of all stripes in the order of visits."""
    return [tile for stripe in stripes for tile in stripe.tiles]


class PairsByTile:
    """Pairs of a block, sorted by the tile that they lie in, on the block's device.

    rows, columns: [P] indices in the block.
    """

    def __init__(self, pairs: Pairs, tiles: Sequence[Tile], device: torch.device) -> None:
        row_starts, column_starts = (
            np.unique(np.array(starts, np.int64))
            for starts in ([t.rows.start for t in tiles], [t.columns.start for t in tiles])
        )
        part, stripe = (
            np.searchsorted(starts, index, side="right") - 1
            for starts, index in ((row_starts, pairs.rows), (column_starts, pairs.columns))
        )
        number = stripe * len(row_starts) + part
        places = np.stack(
            [pairs.rows, pairs.columns, pairs.rows - row_starts[part], pairs.columns - column_starts[stripe]]
        )
        self.rows, self.columns, *self._within = on_device(places[:, np.argsort(number, kind="stable")], device)
        self._ends = [0, *np.bincount(number, minlength=len(tiles)).cumsum().tolist()]

    def of(self, tile: Tile) -> slice:
        """The tile's part of the P pairs."""
        return slice(self._ends[tile.number], self._ends[tile.number + 1])

    def within(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """(rows, columns) of the tile's pairs, counted from the tile's first row and column."""
        rows, columns = self._within
        return rows[self.of(tile)], columns[self.of(tile)]


class Workspace:
    """Buffers in the block's dtype. Each has a name that states its content; their memory is allocated once."""

    def __init__(self, block: ScoreBlock) -> None:
        self._like = torch.empty(0, dtype=block.dtype, device=block.device)
        self._buffers: dict[str, Tensor] = {}
        self._free: list[Tensor] = []

    def start_sweep(self) -> None:
        """Forget all contents and names, and keep the memory for the names of the next sweep."""
        self._free = sorted([*self._free, *self._buffers.values()], key=Tensor.numel)
        self._buffers.clear()

    def clear(self) -> None:
        """Release all memory, so that none is held between the forward and the backward pass."""
        self._buffers.clear()
        self._free.clear()

    def get(self, name: str, place: Tile | Stripe) -> Tensor:
        """The buffer `name` in the shape of `place`, with the values of its last use in it."""
        rows, columns = place.shape
        size = rows * columns
        if name not in self._buffers or self._buffers[name].numel() < size:
            fitting = next((n for n, memory in enumerate(self._free) if memory.numel() >= size), None)
            self._buffers[name] = self._like.new_empty(size) if fitting is None else self._free.pop(fitting)
        return self._buffers[name][:size].view(rows, columns)


class KeptTiles:
    """What is kept of tiles for the backward pass, together with the gradients, in `budget` bytes.

    Logits of as many tiles as fit, each of which saves a matrix product; and exponentials of as many as fit beside the
    logits of all tiles. matrices: number of logits of a pair.
    """

    def __init__(self, block: ScoreBlock, budget: int, matrices: int) -> None:
        self._like = torch.empty(0, dtype=block.dtype, device=block.device)
        gradients = sum(tensor.numel() for tensor in block.tensors) * self._like.element_size()
        logits = matrices * math.prod(block.shape) * self._like.element_size()
        self._left = {"logits": budget - gradients, "exponentials": budget - gradients - logits}
        self._kept: dict[tuple[str, int], tuple[Tensor, ...]] = {}

    def reserve(self, content: str, tile: Tile, count: int) -> tuple[Tensor, ...]:
        """`count` new tensors [m, n] that are kept for the tile; an empty tuple if they do not fit."""
        m, n = tile.shape
        size = count * m * n * self._like.element_size()
        if size > self._left[content]:
            return ()
        self._left[content] -= size
        self._kept[content, tile.number] = tuple(self._like.new_empty(m, n) for _ in range(count))
        return self._kept[content, tile.number]

    def pop(self, content: str, tile: Tile) -> tuple[Tensor, ...]:
        """The tile's tensors, or an empty tuple. They are given up, so that the backward pass frees memory."""
        return self._kept.pop((content, tile.number), ())
