"""Ranks and result lists of vectors, tile by tile: the whole score matrix is never in memory.

Shape suffixes: T texts, A audios, d width, R and W rows and columns of a tile, k places of a list.

A rank is 1 + how many scores come before the positive's, so nothing is sorted. One tile of scores serves both
directions. The positive's own score is read from the very tile that it is compared with: computed in another way it
could differ in the last bit, and equal scores (captions of one wording, say) would change places. `metrics.ranks` says
the same of a matrix.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atr_scale.errors import UserError
from atr_scale.evaluation.metrics import Ids, Ranks, as_int64, positions, rounds
from atr_scale.parallel.blocks import at_least_fp32
from atr_scale.parallel.world import World

ROWS, COLUMNS = 256, 1024  # a tile of 1 MiB stays in the cache; both are multiples of 8, for `_count`
KEPT_TILES = 256  # tiles with positives that are computed once and not twice
COARSE = 10  # a list is drawn in bfloat16 with this many times its places, and then scored exactly


def vector_ranks(text: Tensor, audio: Tensor, text_audio_ids: Ids, audio_ids: Ids, world: World | None = None) -> Ranks:
    """`metrics.ranks` of text @ audio.T, shared by the ranks of `world`; all of them call this with the same vectors.

    text [T, d], audio [A, d] on one device; ids as in `metrics.ranks`. Any number of ranks gives the same. Raises
    UserError as `metrics.ranks` does, and where a vector is not finite.
    """
    world = world or World()
    clips = as_int64(audio_ids)
    clip = positions(as_int64(text_audio_ids), clips)
    text, audio = at_least_fp32(text.detach()), at_least_fp32(audio.detach())
    if not (text.isfinite().all() and audio.isfinite().all()):
        raise UserError(
            "retrieval scores: vectors are not finite, the model has diverged; evaluate an earlier checkpoint"
        )
    t2a, a2t = _Counter(text, audio, clip, world).ranks()
    return Ranks(t2a=t2a, a2t=a2t, clip=clip, audio_ids=clips)


class _Counter:
    """One rank's share: every W-th stripe of ROWS texts against all audios."""

    def __init__(self, text: Tensor, audio: Tensor, clip: NDArray[np.int64], world: World) -> None:
        self.text, self.audio, self.world = text, audio, world
        self.clip = torch.from_numpy(clip).to(text.device)
        self.stripes = range(world.rank * ROWS, len(text), world.size * ROWS)
        # Each round holds one caption of every clip that still has one; where its texts of a column stripe begin.
        edges = np.arange(0, len(audio) + COLUMNS, COLUMNS)
        self.rounds = [
            (torch.from_numpy(texts).to(text.device), np.searchsorted(clip[texts], edges).tolist())
            for texts in rounds(clip)
        ]
        self.buffer = text.new_empty(ROWS, COLUMNS)
        self.mask = torch.zeros(ROWS, COLUMNS, dtype=torch.bool, device=text.device)
        self.kept: dict[tuple[int, int], Tensor] = {}
        self.own = self._own_scores()
        # greater than the next number below = equal or greater
        self.below = torch.nextafter(self.own, self.own.new_tensor(-torch.inf))

    def ranks(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """t2a [T], a2t [T]."""
        t2a, a2t = torch.zeros(2, len(self.text), dtype=torch.int64, device=self.text.device)
        for row in self.stripes:
            for column in range(0, len(self.audio), COLUMNS):
                kept = self.kept.pop((row, column), None)
                tile = self._tile(row, column, self.buffer) if kept is None else kept
                t2a[row : row + len(tile)] += self._before_in_rows(tile, row, column)
                for texts, edges in self.rounds:
                    first, last = edges[column // COLUMNS : column // COLUMNS + 2]
                    if first < last:
                        a2t[texts[first:last]] += self._before_in_columns(tile, row, column, texts[first:last])
        return self._sum(t2a).cpu().numpy() + 1, self._sum(a2t).cpu().numpy() + 1

    def _own_scores(self) -> Tensor:
        """[T], each from the tile that holds it."""
        own = self.text.new_zeros(len(self.text))
        for row in self.stripes:
            clip = self.clip[row : row + ROWS]
            for column in (clip // COLUMNS).unique().tolist():
                tile = self._tile(row, column * COLUMNS, torch.empty_like(self.buffer))
                here = (clip // COLUMNS == column).nonzero().squeeze(1)
                own[row + here] = tile[here, clip[here] - column * COLUMNS]
                if len(self.kept) < KEPT_TILES:
                    self.kept[row, column * COLUMNS] = tile
        return self._sum(own)

    def _before_in_rows(self, tile: Tensor, row: int, column: int) -> Tensor:
        """[R]: scores of each row that come before its positive's."""
        num_rows, width = tile.shape
        clip, own = self.clip[row : row + num_rows], self.own[row : row + num_rows]
        passed = clip >= column + width  # all of the tile has a lower index than the positive
        threshold = torch.where(passed, self.below[row : row + num_rows], own)
        count = self._count(tile, threshold[:, None], dim=1)
        inside = ((clip >= column) & ~passed).nonzero().squeeze(1)
        if len(inside):
            lower = torch.arange(width, device=tile.device) < (clip[inside] - column)[:, None]
            count[inside] += ((tile[inside] == own[inside, None]) & lower).sum(1)
        return count

    def _before_in_columns(self, tile: Tensor, row: int, column: int, texts: Tensor) -> Tensor:
        """[n]: for texts [n] of n audios of the tile, scores of the audio's column that come before the text's."""
        columns = self.clip[texts] - column
        part = tile if len(texts) == tile.shape[1] else tile[:, columns]
        own = self.own[texts]
        passed = texts >= row + len(tile)
        count = self._count(part, torch.where(passed, self.below[texts], own), dim=0)
        inside = ((texts >= row) & ~passed).nonzero().squeeze(1)
        if len(inside):
            lower = torch.arange(len(tile), device=tile.device)[:, None] < texts[inside] - row
            count[inside] += ((part[:, inside] == own[inside]) & lower).sum(0)
        return count

    def _count(self, tile: Tensor, threshold: Tensor, dim: int) -> Tensor:
        """How many of the tile are above the threshold, in each row (dim 1) or column (dim 0)."""
        num_rows, width = tile.shape
        if width % 8 or num_rows < ROWS:
            self.mask.zero_()
        _greater(tile, threshold, self.mask[:num_rows, :width])
        # Truth values are bytes: added as 64-bit words, eight at a time, up to 255 of them before a byte is full.
        words = self.mask.view(torch.int64)
        if dim == 1:
            return words[:num_rows, : -(-width // 8)].sum(1).view(torch.uint8).view(num_rows, 8).sum(1)
        halves = words[:, : -(-width // 8)].reshape(2, ROWS // 2, -1).sum(1)
        return halves.view(torch.uint8).view(2, -1).sum(0)[:width]

    def _tile(self, row: int, column: int, buffer: Tensor) -> Tensor:
        """[R, W] in the buffer: the same call for the same tile, hence the same bits."""
        text, audio = self.text[row : row + ROWS], self.audio[column : column + COLUMNS]
        return torch.mm(text, audio.T, out=buffer[: len(text), : len(audio)])

    def _sum(self, value: Tensor) -> Tensor:
        return self.world.sum(value.to(self.world.device)).to(value.device) if self.world.size > 1 else value


def _greater(tile: Tensor, threshold: Tensor, out: Tensor) -> None:
    if tile.device.type == "cpu":  # numpy compares twice as fast as torch
        np.greater(tile.numpy(), threshold.numpy(), out=out.numpy())
    else:
        torch.gt(tile, threshold, out=out)
