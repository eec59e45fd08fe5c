"""Ranks of vectors, tile by tile: the whole score matrix is never in memory.

Shape suffixes: T texts, A audios, d width, n lines (rows or columns) of a tile.

A rank is 1 + how many scores come before the positive's, so nothing is sorted. One tile of scores serves both
directions. A tile is computed coarsely and decides all pairs but those that lie within its margin of the positive
(`Coarse`); these are scored exactly, in float64. So ranks depend on no precision, tile or number of ranks, and captions
of one wording are equal wherever they stand. `metrics.ranks` says the same of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atr_scale.distributed.world import World
from atr_scale.errors import UserError
from atr_scale.evaluation.coarse import (
    AT_LEAST,
    GREATER,
    Precision,
    compare,
    exact_block,
    exact_pairs,
    levels,
    places,
    tie,
)
from atr_scale.evaluation.lists import nearest
from atr_scale.evaluation.metrics import Ids, Ranks, Scores, as_int64, positions, ranks, rounds
from atr_scale.score_block import ALL, at_least_fp32

ROWS, COLUMNS = 1024, 2048  # products of this size are fast, and a tile stays in the cache
BYTES = 128  # truth values added in one byte, see `_count`; it divides ROWS and COLUMNS / 8
FEW = 128  # a line with more than 1 / FEW of its scores undecided is computed again, more finely
T2A, A2T = 0, 1


def vector_ranks(
    text: Tensor,
    audio: Tensor,
    text_audio_ids: Ids,
    audio_ids: Ids,
    world: World | None = None,
    precision: Precision = "fp32",
) -> Ranks:
    """`metrics.ranks` of text @ audio.T, shared by the ranks of `world`; all of them call this with the same vectors.

    text [T, d], audio [A, d] on one device; ids as in `metrics.ranks`. precision: that of the tiles; any gives the same
    ranks, those of the exact scores, where scores that float64 cannot tell apart are equal. Raises UserError as
    `metrics.ranks` does, and where a vector is not finite.
    """
    world = world or World()
    clips = as_int64(audio_ids)
    clip = positions(as_int64(text_audio_ids), clips)
    text, audio = at_least_fp32(text.detach()), at_least_fp32(audio.detach())
    if not all(extreme.isfinite() for vectors in (text, audio) for extreme in vectors.aminmax()):
        raise UserError(
            "retrieval scores: vectors are not finite, the model has diverged; evaluate an earlier checkpoint"
        )
    t2a, a2t = _Counter(text, audio, clip, world, precision).ranks()
    return Ranks(t2a=t2a, a2t=a2t, clip=clip, audio_ids=clips)


class VectorScores:
    """Scores text @ audio.T [T, A] of which only what is asked for is computed."""

    def __init__(self, text: Tensor, audio: Tensor, precision: Precision = "fp32") -> None:
        self.text, self.audio = at_least_fp32(text.detach()), at_least_fp32(audio.detach())
        self.shape, self.precision = (len(text), len(audio)), precision

    @property
    def T(self) -> VectorScores:
        """With the sides exchanged."""
        return VectorScores(self.audio, self.text, self.precision)

    def ranks(self, text_audio_ids: Ids, audio_ids: Ids, world: World | None = None) -> Ranks:
        """As `vector_ranks`."""
        return vector_ranks(self.text, self.audio, text_audio_ids, audio_ids, world, self.precision)

    def row(self, text: int) -> Tensor:
        """[A]"""
        return self.audio @ self.text[text]

    def column(self, audio: int) -> Tensor:
        """[T]"""
        return self.text @ self.audio[audio]

    def block(self, texts: Tensor, audios: Tensor) -> Tensor:
        """[texts, audios] of chosen rows and columns."""
        return self.text[texts] @ self.audio[audios].T

    def lists(self, k: int, texts: slice = ALL) -> Tensor:
        """[n, k] int64: the best k audios of these texts, best first; of equal ones the lower index."""
        return nearest(self.text[texts], self.audio, k, self.precision)


class MatrixScores:
    """The same of scores [T, A] that are all there, as a scorer of pairs gives them."""

    def __init__(self, scores: Scores) -> None:
        self.scores = torch.as_tensor(scores).detach()
        self.shape = tuple(self.scores.shape)

    @property
    def T(self) -> MatrixScores:
        """With the sides exchanged."""
        return MatrixScores(self.scores.T)

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

    def lists(self, k: int, texts: slice = ALL) -> Tensor:
        """[n, k] int64: the best k audios of these texts, best first; of equal ones the lower index."""
        return torch.sort(self.scores[texts], dim=1, descending=True, stable=True).indices[:, :k]


class _Counter:
    """One rank's share: every W-th stripe of ROWS texts against all audios.

    A line of a tile holds scores of one query: rows in the direction T2A, columns in A2T. A text stands for the pair of
    itself and its clip in both.
    """

    def __init__(self, text: Tensor, audio: Tensor, clip: NDArray[np.int64], world: World, precision: Precision):
        self.sides, self.world = (text, audio), world
        self.stripes = range(world.rank * ROWS, len(text), world.size * ROWS)
        device = text.device
        texts, self.clip = torch.arange(len(text), device=device), torch.from_numpy(clip).to(device)
        self.query, self.positive = (texts, self.clip), (self.clip, texts)
        # Each round holds one caption of every clip that still has one; where its texts of a column stripe begin.
        edges = np.arange(0, len(audio) + COLUMNS, COLUMNS)
        self.rounds = [
            (torch.from_numpy(texts).to(device), np.searchsorted(clip[texts], edges).tolist()) for texts in rounds(clip)
        ]
        self.own, self.tie = exact_pairs(text, audio, texts, self.clip), tie(text, audio)
        self.coarse = levels(text, audio, precision)
        self.thresholds = [
            [
                coarse.thresholds(self.own - self.tie - margin, self.own + self.tie + margin)
                for margin in (coarse.margins[0], coarse.margins[1][self.clip])
            ]
            for coarse in self.coarse
        ]
        self.buffer = torch.empty(ROWS * COLUMNS, dtype=self.coarse[0].dtype, device=device)
        self.mask = torch.zeros(ROWS, COLUMNS, dtype=torch.bool, device=device)

    def ranks(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """t2a [T], a2t [T]."""
        t2a, a2t = torch.zeros(2, len(self.own), dtype=torch.int64, device=self.own.device)
        text, audio = self.coarse[0].sides
        for row in self.stripes:
            lines = self.query[T2A][row : row + ROWS]
            for column in range(0, len(audio), COLUMNS):
                tile = self.coarse[0].product(text[row : row + ROWS], audio[column : column + COLUMNS], self.buffer)
                t2a[lines] += self._before(0, T2A, lines, tile, column)
                for texts, edges in self.rounds:
                    first, last = edges[column // COLUMNS : column // COLUMNS + 2]
                    if first < last:
                        some = texts[first:last]
                        part = tile if len(some) == tile.shape[1] else tile[:, self.clip[some] - column]
                        a2t[some] += self._before(0, A2T, some, part, row)
        return self._sum(t2a).cpu().numpy() + 1, self._sum(a2t).cpu().numpy() + 1

    def _before(self, level: int, direction: int, texts: Tensor, tile: Tensor, first: int) -> Tensor:
        """[n]: for each of the n texts, how many scores of its line of the tile come before its own score.

        tile: as `self.coarse[level]` gives it, one line a text; first: the index of its first item.
        """
        low, high = (threshold[texts] for threshold in self.thresholds[level][direction])
        size, positive = tile.shape[1 - direction], self.positive[direction][texts]
        # The positive is one of those that lie too close to tell, and comes not before itself.
        inside = (positive >= first) & (positive < first + size)
        before = self._count(AT_LEAST, tile, low, direction) - inside.long()
        lines = before.nonzero().squeeze(1)  # few of a good model
        if len(lines) == 0:
            return before
        if 2 * len(lines) < len(texts):
            sure = self._count(GREATER, tile.index_select(direction, lines), high[lines], direction)
        else:
            sure = self._count(GREATER, tile, high, direction)[lines]
        undecided = before[lines] - sure
        before[lines] = sure
        many = undecided > size // FEW
        some = lines[(undecided > 0) & ~many]
        before[some] += self._among_pairs(
            direction, texts[some], tile.index_select(direction, some), low[some], high[some], first
        )
        if many.any():
            many = lines[many]
            before[many] = self._again(level + 1, direction, texts[many], slice(first, first + size))
        return before

    def _among_pairs(
        self, direction: int, texts: Tensor, tile: Tensor, low: Tensor, high: Tensor, first: int
    ) -> Tensor:
        """[n]: how many of the scores between the thresholds low and high [n] of their lines come before, exactly."""
        if direction == A2T:
            tile = tile.T.contiguous()
        possible, sure = torch.empty(2, *tile.shape, dtype=torch.bool, device=tile.device)
        compare(AT_LEAST, tile, low[:, None], possible)
        compare(GREATER, tile, high[:, None], sure)
        line, item = places(possible ^ sure)
        item += first
        other = item != self.positive[direction][texts[line]]
        line, item = line[other], item[other]
        query = self.query[direction][texts[line]]
        scores = exact_pairs(*self.sides, *((query, item) if direction == T2A else (item, query)))
        return torch.bincount(line[self._comes_before(direction, texts[line], scores, item)], minlength=len(texts))

    def _again(self, level: int, direction: int, texts: Tensor, items: slice) -> Tensor:
        """[n]: `_before` of these lines and items in the next finer precision."""
        last = level == len(self.coarse)
        text, audio = self.sides if last else self.coarse[level].sides
        queries = self.query[direction][texts]
        text, audio = (text[queries], audio[items]) if direction == T2A else (text[items], audio[queries])
        if not last:
            return self._before(level, direction, texts, self.coarse[level].product(text, audio), items.start)
        scores = exact_block(text, audio)
        indices = torch.arange(items.start, items.stop, device=text.device)
        return self._comes_before(direction, texts, scores if direction == T2A else scores.T, indices).sum(1)

    def _comes_before(self, direction: int, texts: Tensor, scores: Tensor, items: Tensor) -> Tensor:
        """Whether exact scores [n] or [n, m] of `items` [n] or [m] come before those of the n texts' own pairs."""
        shape = (-1,) + (1,) * (scores.dim() - 1)
        own, positive = self.own[texts].view(shape), self.positive[direction][texts].view(shape)
        return (scores > own + self.tie) | ((scores >= own - self.tie) & (items < positive))

    def _count(self, how: tuple[Any, Callable], tile: Tensor, threshold: Tensor, lines: int) -> Tensor:
        """[n]: how many scores of each line (dim `lines` of the tile) stand so to its threshold [n]."""
        mask, (num_rows, width) = self.mask, tile.shape
        compare(how, tile, threshold[:, None] if lines == T2A else threshold, mask[:num_rows, :width])
        # A truth value is a byte: as 64-bit words eight are added at once, and up to 255 words before a byte is full.
        if lines == T2A:
            mask[:num_rows, width:] = False
            bytes_ = mask[:num_rows].view(torch.int64).reshape(-1, BYTES).sum(1).view(torch.uint8)
            return bytes_.view(num_rows, -1).sum(1)
        whole = -(-num_rows // BYTES) * BYTES
        mask[num_rows:whole] = False
        words = mask[:whole].view(torch.int64)
        bytes_ = words.view(-1, BYTES, words.shape[1]).sum(1).view(torch.uint8)
        return bytes_.sum(0)[:width]

    def _sum(self, value: Tensor) -> Tensor:
        return self.world.sum(value.to(self.world.device)).to(value.device) if self.world.size > 1 else value
