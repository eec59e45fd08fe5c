"""Tiles of a score block: where they lie, which pairs fall into them, and the memory they are computed in.

Shape suffixes: B texts of the global batch, b audios of this rank, m rows and n columns of a part, P pairs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from atr_scale.losses.targets import Pairs
from atr_scale.score_block import ScoreBlock, slices

# Rows of a tile, so that matrix products run at full speed, and of a part, so that all else that is done with a tile
# finds it in the cache of a core. A GPU gets few and large kernels instead.
TILE_ROWS = {"cpu": 1024, "cuda": 2**16}
PART_ROWS = {"cpu": 256, "cuda": 2**16}
# What gradients and tiles kept from the forward pass to the backward pass may take together; every kept tile spares a
# matrix product. A fixed size, so that memory grows with the batch and not with its square: the gradients alone take it
# from 37,000 pairs of width 512 on.
LOSS_BYTES = 144 * 2**20


@dataclass(frozen=True)
class Part:
    """Some rows of a stripe of columns of a block; `number` counts them in the order of visits."""

    number: int
    rows: slice
    columns: slice

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start


@dataclass(frozen=True)
class Tile(Part):
    """A part of a block that is made of smaller ones."""

    parts: tuple[Part, ...]

    def of(self, tile: Tensor, part: Part) -> Tensor:
        """The rows of `tile` that are the part's."""
        return tile[part.rows.start - self.rows.start : part.rows.stop - self.rows.start]


def tiles_of(block: ScoreBlock, whole_columns: bool = False) -> list[Tile]:
    """All of a block, stripe by stripe; whole_columns: every tile is a stripe."""
    kind = block.device.type
    tile_rows, part_rows = (sizes[kind if kind in sizes else "cuda"] for sizes in (TILE_ROWS, PART_ROWS))
    tiles: list[Tile] = []
    count = itertools.count()
    for columns in block.stripes():
        for rows in slices(0, block.shape[0], block.shape[0] if whole_columns else tile_rows):
            parts = (Part(next(count), part, columns) for part in slices(rows.start, rows.stop, part_rows))
            tiles.append(Tile(len(tiles), rows, columns, tuple(parts)))
    return tiles


def parts_of(tiles: Sequence[Tile]) -> list[Part]:
    """Those of all tiles."""
    return [part for tile in tiles for part in tile.parts]


class PairsByPart:
    """Pairs in the order of the parts of a block that they lie in.

    rows, columns: [P] in the block.
    """

    def __init__(self, pairs: Pairs, parts: Sequence[Part]) -> None:
        row_starts, column_starts = (
            torch.tensor(sorted(set(starts)), device=pairs.rows.device)
            for starts in ([p.rows.start for p in parts], [p.columns.start for p in parts])
        )
        stripe = torch.bucketize(pairs.columns, column_starts, right=True) - 1
        number = stripe * len(row_starts) + torch.bucketize(pairs.rows, row_starts, right=True) - 1
        order = torch.argsort(number, stable=True)
        self.rows, self.columns = pairs.rows[order], pairs.columns[order]
        self._ends = [0, *torch.bincount(number, minlength=len(parts)).cumsum(0).tolist()]

    def of(self, part: Part) -> slice:
        """Which pairs a part has."""
        return slice(self._ends[part.number], self._ends[part.number + 1])

    def within(self, part: Part) -> tuple[Tensor, Tensor]:
        """(row, column) of them inside the part."""
        own = self.of(part)
        return self.rows[own] - part.rows.start, self.columns[own] - part.columns.start


class Workspace:
    """Memory for one part of a block at a time, by name, made once."""

    def __init__(self, block: ScoreBlock) -> None:
        self._like = torch.empty(0, dtype=block.dtype, device=block.device)
        self._buffers: dict[str, Tensor] = {}

    def get(self, name: str, part: Part) -> Tensor:
        """[m, n], its contents left from before."""
        m, n = part.shape
        if name not in self._buffers or self._buffers[name].numel() < m * n:
            self._buffers[name] = self._like.new_empty(m * n)
        return self._buffers[name][: m * n].view(m, n)


class KeptTiles:
    """Tensors of as many tiles as fit in `budget` bytes beside the gradients."""

    def __init__(self, block: ScoreBlock, budget: int) -> None:
        self._like = torch.empty(0, dtype=block.dtype, device=block.device)
        gradients = sum(tensor.numel() for tensor in block.tensors) * self._like.element_size()
        self._left = budget - gradients
        self._kept: dict[int, tuple[Tensor, ...]] = {}

    def reserve(self, tile: Tile, count: int) -> tuple[Tensor, ...]:
        """`count` new tensors [m, n] that are kept for the tile; none where they do not fit."""
        m, n = tile.shape
        size = count * m * n * self._like.element_size()
        if size > self._left:
            return ()
        self._left -= size
        self._kept[tile.number] = tuple(self._like.new_empty(m, n) for _ in range(count))
        return self._kept[tile.number]

    def pop(self, tile: Tile) -> tuple[Tensor, ...]:
        """What was reserved for the tile, or nothing; given up, so that the backward pass frees memory as it goes."""
        return self._kept.pop(tile.number, ())
