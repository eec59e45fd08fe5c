"""Tiles of a score block: their place in the block, the positive pairs inside them, and memory to compute them in.

Shape suffixes: B texts of the global batch, b audios of this rank, m rows and n columns of a tile, P pairs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from atr_scale.losses.targets import Pairs
from atr_scale.score_block import ScoreBlock, slices

# Rows of a tile. On a CPU a tile fits in the cache of a core and its matrix products still run at full speed. A GPU
# gets few and large kernels instead.
TILE_ROWS = {"cpu": 512, "cuda": 2**14}
# Bytes of the gradients and of the tiles kept from the forward pass to the backward pass, together. Every kept tile
# saves a matrix product. The size is fixed so that memory grows with the batch and not with its square: the gradients
# alone take this much at 37,000 pairs of width 512.
LOSS_BYTES = 144 * 2**20


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
    """All of a block, in tiles of TILE_ROWS / times_smaller rows."""
    kind = block.device.type
    tile_rows = max(1, TILE_ROWS[kind if kind in TILE_ROWS else "cuda"] // times_smaller)
    number = itertools.count()
    return [
        Stripe(columns, tuple(Tile(next(number), rows, columns) for rows in slices(0, block.shape[0], tile_rows)))
        for columns in block.stripes()
    ]


def tiles_of(stripes: Sequence[Stripe]) -> list[Tile]:
    """The tiles of all stripes in the order of visits."""
    return [tile for stripe in stripes for tile in stripe.tiles]


class PairsByTile:
    """Pairs of a block, sorted by the tile that they lie in.

    rows, columns: [P] indices in the block.
    """

    def __init__(self, pairs: Pairs, tiles: Sequence[Tile]) -> None:
        row_starts, column_starts = (
            torch.tensor(sorted(set(starts)), device=pairs.rows.device)
            for starts in ([t.rows.start for t in tiles], [t.columns.start for t in tiles])
        )
        stripe = torch.bucketize(pairs.columns, column_starts, right=True) - 1
        number = stripe * len(row_starts) + torch.bucketize(pairs.rows, row_starts, right=True) - 1
        order = torch.argsort(number, stable=True)
        self.rows, self.columns = pairs.rows[order], pairs.columns[order]
        self._ends = [0, *torch.bincount(number, minlength=len(tiles)).cumsum(0).tolist()]

    def of(self, tile: Tile) -> slice:
        """The tile's part of the P pairs."""
        return slice(self._ends[tile.number], self._ends[tile.number + 1])

    def within(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """(rows, columns) of the tile's pairs, counted from the tile's first row and column."""
        own = self.of(tile)
        return self.rows[own] - tile.rows.start, self.columns[own] - tile.columns.start


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
    """Exponentials of as many tiles as fit, together with the gradients, in `budget` bytes."""

    def __init__(self, block: ScoreBlock, budget: int) -> None:
        self._like = torch.empty(0, dtype=block.dtype, device=block.device)
        gradients = sum(tensor.numel() for tensor in block.tensors) * self._like.element_size()
        self._left = budget - gradients
        self._kept: dict[int, tuple[Tensor, ...]] = {}

    def reserve(self, tile: Tile, count: int) -> tuple[Tensor, ...]:
        """`count` new tensors [m, n] that are kept for the tile; an empty tuple if they do not fit."""
        m, n = tile.shape
        size = count * m * n * self._like.element_size()
        if size > self._left:
            return ()
        self._left -= size
        self._kept[tile.number] = tuple(self._like.new_empty(m, n) for _ in range(count))
        return self._kept[tile.number]

    def pop(self, tile: Tile) -> tuple[Tensor, ...]:
        """The tile's tensors, or an empty tuple. They are given up, so that the backward pass frees memory."""
        return self._kept.pop(tile.number, ())
