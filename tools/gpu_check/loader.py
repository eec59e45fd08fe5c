"""Batches on the way to the device never change, although their memory is used again: it is poisoned in between.

Clips whose samples encode their number and time are read with and without workers. Every buffer is filled with NaN when
a writer takes it, so a batch that still lies in it, or a copy to the device that still reads it, would show. The device
is kept busy, so that copies run late.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from atr_scale.batch import FULL_SCALE, Batch
from atr_scale.data import stream as streams
from atr_scale.data.loader_memory import COPIED, FLOAT, PREFETCH, loader_memory
from atr_scale.data.shared_buffers import Buffer, SharedBuffers
from atr_scale.data.stream import read_batches
from tests.coded import open_stream, write_shards
from tools.gpu_check.rows import Case, Row, compared
from tools.gpu_check.runner import Setting

CLIPS, BATCHES = 30, 24
PIECE_ROWS = 5  # of a batch of 12
BUSY_CYCLES = 20_000_000  # of the device, about 10 ms


class PoisonedBuffers(SharedBuffers):
    """Buffers without anything left of their last use."""

    def take(self, writer: int = 0) -> Buffer:
        buffer = super().take(writer)
        buffer.memory.fill(np.nan)
        return buffer


def cases(setting: Setting) -> Iterator[Case]:
    with tempfile.TemporaryDirectory() as folder:
        shards = write_shards(Path(folder), range(CLIPS))
        for workers in (0,) if setting.quick else (0, 2):
            for int16 in (False, True):
                for rows in (None, PIECE_ROWS) if workers else (None,):
                    name = f"{workers} workers, {'int16' if int16 else 'float32'}{', pieces' if rows else ''}"
                    yield name, partial(unchanged, setting, shards, workers, int16, rows)


def unchanged(setting: Setting, shards: str, workers: int, int16: bool, rows: int | None) -> Row:
    """`error` is the share of batches that differ from those of a plain reading. rows: of a piece of a batch."""
    expected = [_values(batch) for batch in read_batches(open_stream(shards).between(0, BATCHES), 0)]
    device = torch.device(setting.device)
    late: list[Batch] = []
    found: list[Tensor] = []
    with patch.object(streams, "SharedBuffers", PoisonedBuffers):
        stream = open_stream(shards).between(0, BATCHES)
        budget = None if rows is None else (PREFETCH + COPIED) * workers * rows * FLOAT * stream.width
        memory = loader_memory(stream.width, stream.local_batch_size, workers, pinned=setting.cuda, budget=budget)
        for batch in read_batches(stream, workers, keep_int16=int16, pin_memory=setting.cuda, memory=memory):
            if setting.cuda:
                torch.cuda._sleep(BUSY_CYCLES)
            late.append(batch.to(device))
            del batch
            if not setting.cuda and len(late) > 1:  # on the host a batch lies in its buffer as long as it is used
                found.append(_values(late.pop(0)))
    found += map(_values, late)
    wrong = [not torch.equal(got, want) for got, want in zip(found, expected, strict=True)]
    return compared(sum(wrong) / BATCHES, 0.0)


def _values(batch: Batch) -> Tensor:
    """[b, samples + tokens] float32 on the host: waveforms, then token ids."""
    waveform = batch.waveform.cpu()
    if waveform.dtype == torch.int16:
        waveform = waveform.float() * FULL_SCALE
    return torch.cat([waveform.float(), batch.input_ids.cpu().float()], 1)
