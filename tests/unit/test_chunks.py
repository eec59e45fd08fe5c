"""A batch in chunks on the device: the rows, how they are cut, and the order of copies and computations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import pytest
import torch

from atr_scale.batch import Batch
from atr_scale.training.chunks import Chunks

CPU = torch.device("cpu")
LENGTHS = [6, 4, 6, 2, 6, 4, 6]


def batch(lengths: list[int], dtype: torch.dtype = torch.int16) -> Batch:
    """Rows of which every value has the row's number; row k has 1 + k % 3 words."""
    numbers = torch.arange(len(lengths))
    words = (torch.arange(3) <= numbers[:, None] % 3).long()
    waveform = (numbers[:, None] + 1).expand(-1, max(lengths)).clone()
    waveform *= torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = (numbers,) * 4
    keys = [str(number) for number in numbers.tolist()]
    return Batch(waveform.to(dtype), torch.tensor(lengths), numbers[:, None] * words, words, *ids, keys)


@pytest.mark.parametrize("lengths", [LENGTHS, [5] * 7])
@pytest.mark.parametrize("dtype", [torch.int16, torch.float32])
def test_chunks_are_cut_rows_in_the_order_of_lengths(lengths: list[int], dtype: torch.dtype) -> None:
    whole = batch(lengths, dtype)
    chunks = Chunks(whole, 3, CPU)
    order = sorted(range(7), key=lambda row: lengths[row])
    assert chunks.table.keys == [str(row) for row in order] and len(chunks) == 3
    for first in range(3):
        found = list(chunks.start_at(first))
        assert len(found) == 3 - first
        for number, chunk in enumerate(found, first):
            rows = torch.tensor(order[3 * number : 3 * number + 3])
            expected = whole.take(rows).to(CPU)
            samples, words = int(expected.lengths.max()), int(expected.attention_mask.sum(1).max())
            assert chunk.waveform.dtype == expected.waveform.dtype and chunk.keys == expected.keys
            assert torch.equal(chunk.waveform, expected.waveform[:, :samples])
            for field in fields(Batch)[1:-2]:
                value = getattr(expected, field.name)
                assert torch.equal(getattr(chunk, field.name), value[:, :words] if value.ndim == 2 else value)


class Stream:
    """Records what it is given to do."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")

    def record_event(self) -> str:
        self.log.append("event")
        return "copy"


@pytest.mark.parametrize("lengths", [LENGTHS, [5] * 7])
def test_a_chunk_is_copied_while_the_one_before_is_computed(
    monkeypatch: pytest.MonkeyPatch, lengths: list[int]
) -> None:
    """The side stream waits for the chunk before the last, whose memory it may get; each computation for its copy."""
    log: list[str] = []
    main, side = Stream("main", log), Stream("side", log)

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        copy = torch.Tensor.copy_

        def copied(self: Any, other: Any, non_blocking: bool = False) -> Any:
            assert non_blocking and other.is_contiguous(), "anything else would be copied by the host first"
            if log[-1] != "copies":
                log.append("copies")
            return copy(self, other)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "copy_", copied)
            yield

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", on)
    for number, chunk in enumerate(Chunks(batch(lengths), 3, CPU, side).start_at(0)):
        log.append(f"chunk {number}: {chunk.waveform.shape[0]}")
    copy = ["side waits for main", "copies", "event"]
    assert log == [
        *copy,
        *("main waits for copy", *copy, "chunk 0: 3"),
        *("main waits for copy", *copy, "chunk 1: 3"),
        *("main waits for copy", "chunk 2: 1"),
        "main waits for side",
    ]
