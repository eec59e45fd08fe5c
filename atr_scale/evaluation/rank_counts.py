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
from atr_scale.evaluation.metrics import Ids, Ranks, Scores, as_int64, positions, ranks, rounds
from atr_scale.parallel.blocks import at_least_fp32
from atr_scale.parallel.world import World

ROWS, COLUMNS = 512, 1024  # a tile stays in the cache
BYTES = 128  # truth values added in one byte, see `_count`; it divides ROWS and COLUMNS / 8
KEPT_TILES = 256  # tiles with positives that are computed once and not twice


def vector_ranks(text: Tensor, audio: Tensor, text_audio_ids: Ids, audio_ids: Ids, world: World | None = None) -> Ranks:
    """`metrics.ranks` of text @ audio.T, shared by the ranks of `world`; all of them call this with the same vectors.

    text [T, d], audio [A, d] on one device; ids as in `metrics.ranks`. Any number of ranks gives the same. Raises
    UserError as `metrics.ranks` does, and where a vector is not finite.
    """
    world = world or World()
    clips = as_int64(audio_ids)
    clip = positions(as_int64(text_audio_ids), clips)
    text, audio = at_least_fp32(text.detach()), at_least_fp32(audio.detach())
    if not all(extreme.isfinite() for vectors in (text, audio) for extreme in vectors.aminmax()):
        raise UserError(
            "retrieval scores: vectors are not finite, the model has diverged; evaluate an earlier checkpoint"
        )
    t2a, a2t = _Counter(text, audio, clip, world).ranks()
    return Ranks(t2a=t2a, a2t=a2t, clip=clip, audio_ids=clips)


class VectorScores:
    """Scores text @ audio.T [T, A] of which only what is asked for is computed."""

    def __init__(self, text: Tensor, audio: Tensor) -> None:
        self.text, self.audio = at_least_fp32(text.detach()), at_least_fp32(audio.detach())
        self.shape = (len(text), len(audio))

    def ranks(self, text_audio_ids: Ids, audio_ids: Ids, world: World | None = None) -> Ranks:
        """As `vector_ranks`."""
        return vector_ranks(self.text, self.audio, text_audio_ids, audio_ids, world)

    def row(self, text: int) -> Tensor:
        """[A]"""
        return self.audio @ self.text[text]

    def column(self, audio: int) -> Tensor:
        """[T]"""
        return self.text @ self.audio[audio]

    def block(self, texts: Tensor, audios: Tensor) -> Tensor:
        """[texts, audios] of chosen rows and columns."""
        return self.text[texts] @ self.audio[audios].T

    def lists(self, k: int) -> Tensor:
        """[T, k] int64: the best k audios of every text, best first; of equal ones the lower index."""
        return torch.cat([best(self.text[t : t + ROWS] @ self.audio.T, k) for t in range(0, len(self.text), ROWS)])


class MatrixScores:
    """The same of scores [T, A] that are all there, as a scorer of pairs gives them."""

    def __init__(self, scores: Scores) -> None:
        self.scores = torch.as_tensor(scores).detach()
        self.shape = tuple(self.scores.shape)

    def ranks(self, text_audio_ids: Ids, audio_ids: Ids, world: World | None = None) -> Ranks:
        """As `metrics.ranks`; one rank is enough."""
        return ranks(self.scores, text_audio_ids, audio_ids)

    def row(self, text: int) -> Tensor:
        """[A]"""
        return self.scores[text]

    def column(self, audio: int) -> Tensor:
        """[T]"""
        return self.scores[:, audio]

    def block(self, texts: Tensor, audios: Tensor) -> Tensor:
        """[texts, audios] of chosen rows and columns."""
        return self.scores[texts][:, audios]

    def lists(self, k: int) -> Tensor:
        """[T, k] int64: the best k audios of every text, best first; of equal ones the lower index."""
        return best(self.scores, k)


def best(scores: Tensor, k: int) -> Tensor:
    """[Q, k] int64: the best items of each row of scores [Q, n], the lower index first among equal ones."""
    return torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :k]


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
        self.with_positives: set[tuple[int, int]] = set()
        self.kept: dict[tuple[int, int], Tensor] = {}
        self.own = self._own_scores()
        # greater than the next number below = equal or greater
        self.below = torch.nextafter(self.own, self.own.new_tensor(-torch.inf))

    def ranks(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """t2a [T], a2t [T]."""
        t2a, a2t = torch.zeros(2, len(self.text), dtype=torch.int64, device=self.text.device)
        for row in self.stripes:
            rows = slice(row, row + ROWS)
            for column in range(0, len(self.audio), COLUMNS):
                kept = self.kept.pop((row, column), None)
                tile = self._tile(row, column, self.buffer) if kept is None else kept
                positives = (row, column) in self.with_positives
                t2a[rows] += self._before(tile, 1, rows, self.clip[rows] - column, positives)
                for texts, edges in self.rounds:
                    first, last = edges[column // COLUMNS : column // COLUMNS + 2]
                    if first < last:
                        some = texts[first:last]
                        part = tile if len(some) == tile.shape[1] else tile[:, self.clip[some] - column]
                        a2t[some] += self._before(part, 0, some, some - row, positives)
        return self._sum(t2a).cpu().numpy() + 1, self._sum(a2t).cpu().numpy() + 1

    def _own_scores(self) -> Tensor:
        """[T], each from the tile that holds it."""
        own = self.text.new_zeros(len(self.text))
        for row in self.stripes:
            clip = self.clip[row : row + ROWS]
            for column in (clip // COLUMNS * COLUMNS).unique().tolist():
                tile = self._tile(row, column, torch.empty_like(self.buffer))
                here = (clip // COLUMNS == column // COLUMNS).nonzero().squeeze(1)
                own[row + here] = tile[here, clip[here] - column]
                self.with_positives.add((row, column))
                if len(self.kept) < KEPT_TILES:
                    self.kept[row, column] = tile
        return self._sum(own)

    def _before(self, tile: Tensor, dim: int, texts: Tensor | slice, place: Tensor, positives: bool) -> Tensor:
        """[n]: for each line of the tile (rows: dim 1, columns: dim 0), how many of its scores come before the own
        score of the text that is asked for; these are the n `texts`.

        place [n]: where the positive lies along the line, counted from the tile's first score. positives: whether any
        lies inside the tile.
        """
        size, own, below = tile.shape[dim], self.own[texts], self.below[texts]
        # Equal scores count where all of the tile has a lower index than the positive.
        count = self._count(tile, torch.where(place >= size, below, own), dim)
        if positives:
            inside = (place >= 0) & (place < size)
            equal = self._count(tile, below, dim) - count  # the positive itself is one of them
            tied = (inside & (equal > 1)).nonzero().squeeze(1)
            lines = tile[tied] if dim == 1 else tile[:, tied].T
            lower = torch.arange(size, device=tile.device) < place[tied, None]
            count[tied] += ((lines == own[tied, None]) & lower).sum(1)
        return count

    def _count(self, tile: Tensor, threshold: Tensor, dim: int) -> Tensor:
        """[n]: how many scores of each line are above its threshold [n]."""
        num_rows, width = tile.shape
        if width < COLUMNS or num_rows < ROWS:
            self.mask.zero_()
        _greater(tile, threshold[:, None] if dim == 1 else threshold, self.mask[:num_rows, :width])
        # A truth value is a byte: as 64-bit words eight are added at once, and up to 255 words before a byte is full.
        words = self.mask.view(torch.int64)
        if dim == 1:
            bytes_ = words[:num_rows].reshape(-1, BYTES).sum(1).view(torch.uint8)
            return bytes_.view(num_rows, -1).sum(1)
        bytes_ = words.view(-1, BYTES, words.shape[1]).sum(1).view(torch.uint8)
        return bytes_.sum(0)[:width]

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
