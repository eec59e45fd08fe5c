"""Puts the pieces of a local batch together, and fills the rows of unreadable samples.

Shape suffixes: b rows of the local batch, g readable ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from atr_scale.batch import FULL_SCALE, Batch, DroppedSample, count_reasons
from atr_scale.data.collate import close_rows
from atr_scale.data.sample import READ_FAULTS
from atr_scale.data.tokenizer import CaptionTokenizer
from atr_scale.errors import Failure, OneLineError, UserError, one_line


class Piece(NamedTuple):
    """Readable rows of a local batch, ascending: their places in it, and the rows as a batch."""

    places: list[int]
    rows: Batch


def batch_of(pieces: Iterable[Piece], size: int, width: int, tokenizer: CaptionTokenizer, *, pin: bool) -> Batch:
    """The local batch of `size` rows. No piece is kept while the next one is awaited.

    width: samples of the longest crop. pin: into page-locked memory. A row that no piece has gets a copy of one that is
    readable: the same clip again, so the two rows are positives of each other. If no row is readable, raises Failure
    if reading has failed, and UserError if all samples are damaged.
    """
    waveform, tables, places = torch.empty(0), list[Batch](), list[int]()
    for piece in pieces:
        if len(piece.places) == size:
            return piece.rows.pin_memory() if pin else piece.rows
        if not places and piece.places:
            waveform = torch.empty(size, width, dtype=piece.rows.waveform.dtype, pin_memory=pin)
        waveform = _put(waveform, piece, pin)
        tables.append(replace(piece.rows, waveform=torch.empty(len(piece.places), 0)))
        places += piece.places
        del piece  # its buffer is free for the worker
    table = _joined(tables, tokenizer)
    if not places:
        raise _nothing_readable(table.dropped)
    source = _sources(np.array(places), size)
    for row in np.setdiff1d(np.arange(size), places):
        waveform[row] = waveform[source[row]]
    table = table.take(torch.from_numpy(np.searchsorted(places, source)))
    longest = close_rows(waveform.numpy(), table.lengths.tolist())
    waveform = waveform.view(-1)[: size * longest].view(size, longest)
    return replace(table.pin_memory() if pin else table, waveform=waveform)


def _nothing_readable(dropped: list[DroppedSample]) -> OneLineError:
    """The error of a batch of which no row is readable. It is not the user's mistake if reading itself has failed."""
    counts = count_reasons(dropped)
    text = f"all {len(dropped)} samples of a batch are unreadable ({dict(counts)}): "
    unread = [sample for sample in dropped if sample.reason in READ_FAULTS]
    if unread:
        return Failure(
            f"{text}{unread[0].place}: {one_line(unread[0].detail, 160)}; check the place of the shards, its "
            "permissions and the network, and start the same command again"
        )
    return UserError(f"{text}run `atr-scale shards check` on data.train")


def _sources(places: np.ndarray, size: int) -> np.ndarray:
    """[b]: the row that each row shows: itself, or one of the readable rows `places` [g]."""
    rows = np.arange(size)
    return np.where(np.isin(rows, places), rows, places[rows % len(places)])


def _put(waveform: Tensor, piece: Piece, pin: bool) -> Tensor:
    """Copy the rows of `piece` to their places in `waveform`, which is returned; as float32 if it or they are."""
    rows = piece.rows.waveform
    if rows.dtype == torch.float32 and waveform.dtype == torch.int16:
        wide = torch.empty(waveform.shape, pin_memory=pin)
        waveform = torch.mul(waveform, FULL_SCALE, out=wide)
    for place, row in zip(piece.places, rows, strict=True):
        if row.dtype == waveform.dtype:
            waveform[place, : len(row)].copy_(row)
        else:
            torch.mul(row, FULL_SCALE, out=waveform[place, : len(row)])
    return waveform


def _joined(tables: list[Batch], tokenizer: CaptionTokenizer) -> Batch:
    """The rows of all tables, without waveforms."""
    dropped = [sample for table in tables for sample in table.dropped]
    tables = [table for table in tables if table.keys] or tables[:1]
    length = max(table.input_ids.shape[1] for table in tables)
    padding = tokenizer.padding if any(table.input_ids.shape[1] < length for table in tables) else 0
    whole = [
        replace(
            table,
            input_ids=_padded(table.input_ids, length, padding),
            attention_mask=_padded(table.attention_mask, length, 0),
        )
        for table in tables
    ]
    names = [f.name for f in fields(Batch) if f.name not in ("keys", "dropped")]
    return Batch(
        **{name: torch.cat([getattr(table, name) for table in whole]) for name in names},
        keys=[key for table in whole for key in table.keys],
        dropped=dropped,
    )


def _padded(tokens: Tensor, length: int, value: int) -> Tensor:
    return torch.nn.functional.pad(tokens, (0, length - tokens.shape[1]), value=value)
