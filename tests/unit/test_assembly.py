"""A batch from pieces is the batch in one piece, to the bit: rows, padding, ids, and copies for unreadable rows."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import pairwise

import pytest
import torch

from atr_scale.batch import FULL_SCALE, Batch, DroppedSample, count_reasons
from atr_scale.data.assembly import Piece, batch_of
from atr_scale.data.sample import READ_FAULTS
from atr_scale.data.tokenizer import CaptionTokenizer
from atr_scale.errors import Failure, UserError

PAD, WIDTH, SIZE = 9, 8, 7


class Tokenizer(CaptionTokenizer):
    """One id for each word, and padding."""

    def __init__(self) -> None:
        pass

    def __call__(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        counts = torch.tensor([len(caption.split()) for caption in captions])
        mask = torch.arange(int(counts.max())) < counts[:, None]
        return torch.where(mask, 1, PAD), mask.long()


def piece(places: list[int], dtype: torch.dtype = torch.int16, bad: int = 0) -> Piece:
    """Rows as a worker sends them, cut to their longest clip and caption. Row k has 1 + k samples and words."""
    numbers = torch.tensor(places, dtype=torch.int64)
    longest = max(places, default=0) + 1
    mask = torch.arange(longest) <= numbers[:, None]
    values = torch.where(mask, 100 * numbers[:, None] + torch.arange(longest), 0)
    waveform = values.to(torch.int16) if dtype == torch.int16 else values * FULL_SCALE
    ids = torch.where(mask, 1, PAD)
    rows = Batch(waveform, numbers + 1, ids, mask.long(), *(numbers,) * 4, [str(place) for place in places])
    return Piece(places, replace(rows, dropped=bad * [DroppedSample("corpus/shard/key", "broken", "")]))


def joined(*pieces: Piece) -> Batch:
    return batch_of(iter(pieces), SIZE, WIDTH, Tokenizer(), pin=False)


def assert_equal(found: Batch, expected: Batch) -> None:
    for field in fields(Batch)[:-2]:
        assert torch.equal(getattr(found, field.name), getattr(expected, field.name)), field.name
    assert found.waveform.is_contiguous() and found.keys == expected.keys


@pytest.mark.parametrize("cuts", [[3], [1, 2, 6], [6]])
def test_pieces_give_the_batch(cuts: list[int]) -> None:
    whole = piece(list(range(SIZE)))
    edges = [0, *cuts, SIZE]
    pieces = [piece(list(range(first, last))) for first, last in pairwise(edges)]
    assert_equal(joined(*pieces), whole.rows)
    assert joined(whole) is whole.rows, "a batch in one piece is used where it was decoded"


def test_one_clip_that_is_not_16_bit_makes_the_batch_float32() -> None:
    whole = piece(list(range(SIZE)), torch.float32).rows
    for kinds in ((torch.int16, torch.float32, torch.int16), (torch.float32, torch.int16, torch.int16)):
        pieces = [piece(places, kind) for places, kind in zip(([0, 1], [2, 3, 4], [5, 6]), kinds, strict=True)]
        assert_equal(joined(*pieces), whole)


def test_unreadable_rows_are_copies_of_readable_ones() -> None:
    """As in a batch of one piece: row k of the batch shows readable row number k modulo their count."""
    found = joined(piece([0, 2], bad=1), piece([], bad=2), piece([5, 6]))
    shown = [0, 2, 2, 6, 0, 5, 6]  # readable: 0, 2, 5, 6
    whole = piece(list(range(SIZE))).rows
    assert_equal(found, whole.take(torch.tensor(shown)))
    assert count_reasons(found.dropped) == {"broken": 3}
    assert_equal(joined(piece([0, 2, 5, 6], bad=3)), found)


def test_no_readable_row_is_one_line() -> None:
    with pytest.raises(UserError, match=r"all 7 samples of a batch are unreadable \(\{'broken': 7\}\)"):
        joined(piece([], bad=3), piece([], bad=4))


def test_errors_of_reading_are_not_the_users_mistake() -> None:
    """Also if other samples of the batch are damaged."""
    bad = piece([], bad=SIZE)
    for reason in READ_FAULTS:
        dropped = [bad.rows.dropped[0]._replace(reason=reason, detail="reset"), *bad.rows.dropped[1:]]
        with pytest.raises(Failure, match=rf"all 7 samples of a batch are unreadable .*'{reason}': 1.*: reset; check"):
            joined(Piece([], replace(bad.rows, dropped=dropped)))


def test_a_piece_is_free_before_the_next_is_awaited() -> None:
    """Its buffer is: a worker may need it for the next piece."""
    alive: list[weakref.ref] = []

    def pieces() -> Iterator[Piece]:
        for places in ([0, 1, 2], [3, 4], [5, 6]):
            assert all(memory() is None for memory in alive)
            memory = piece(places).rows.waveform.numpy().copy()
            alive.append(weakref.ref(memory))
            made = piece(places)._replace(rows=replace(piece(places).rows, waveform=torch.from_numpy(memory)))
            del memory
            yield made
            del made

    assert len(batch_of(pieces(), SIZE, WIDTH, Tokenizer(), pin=False).keys) == SIZE and len(alive) == 3
