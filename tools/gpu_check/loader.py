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
from atr_scale.data.shared_buffers import Buffer, SharedBuffers
from atr_scale.data.stream import read_batches
from tests.coded import open_stream, write_shards
from tools.gpu_check.rows import Case, Row, compared
from tools.gpu_check.runner import Setting

CLIPS, BATCHES = 30, 24
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
                name = f"{workers} workers, {'int16' if int16 else 'float32'}"
                yield name, partial(unchanged, setting, shards, workers, int16)


def unchanged(setting: Setting, shards: str, workers: int, int16: bool) -> Row:
    """`error` is the share of batches that differ from those of a plain reading."""
    expected = [_values(batch) for batch in read_batches(open_stream(shards).between(0, BATCHES), 0)]
    device = torch.device(setting.device)
    late: list[Batch] = []
    found: list[Tensor] = []
    with patch.object(streams, "SharedBuffers", PoisonedBuffers):
        stream = open_stream(shards).between(0, BATCHES)
        for batch in read_batches(stream, workers, keep_int16=int16, pin_memory=setting.cuda):
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
