"""The parts of a local shard that are read, and 16-bit samples that stay 16-bit until they are scaled."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from atr_scale.batch import count_reasons, to_float
from atr_scale.data import storage
from atr_scale.data.decode import Crop, decode
from atr_scale.data.options import TrainingSource
from atr_scale.data.sample import BadSample
from atr_scale.data.shard_reader import HEAD_BYTES, open_shards
from tests.coded import CROP, RATE, duration, open_stream, rows_of, write_laion, write_shards
from tests.unit.test_stream import _quick_workers, copy, equal, left, read, right, spoil  # noqa: F401

pytestmark = [pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore:This DataLoader will create")]


def test_of_a_long_pcm_clip_only_the_crop_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = open_stream(write_shards(tmp_path / "long", [12]), batch=1)
    sizes: list[int] = []
    for name, size in (("read", lambda start, stop: stop - start), ("read_into", lambda memory, start: len(memory))):
        method = getattr(storage.LocalFile, name)

        def counted(file, *given, method=method, size=size):  # type: ignore[no-untyped-def]
            sizes.append(size(*given))
            return method(file, *given)

        monkeypatch.setattr(storage.LocalFile, name, counted)
    (batch,) = read(stream, 0, 1)
    assert duration(12) > 2 * CROP and rows_of(batch)[0][3] == CROP
    assert sizes == [HEAD_BYTES, 2 * CROP], "headers with captions, and the crop"


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_a_crop_from_a_shard_is_that_of_the_clip(tmp_path: Path, dtype: type) -> None:
    shards = open_shards(write_shards(tmp_path / "long", [12]))
    for fraction in (0.0, 0.31, 1.0):
        options = {"pcm_rate": RATE, "crop": Crop(fraction, CROP / RATE)}
        found, wanted = (
            decode(sample.audio, "pcm", RATE, out=np.empty(CROP, dtype), **options)  # type: ignore[arg-type]
            for sample in (shards.open(0), shards.read(0))
        )
        np.testing.assert_array_equal(found, wanted)


def test_audio_is_of_the_shard_that_the_captions_were_read_from(left: str, tmp_path: Path) -> None:  # noqa: F811
    """A shard that is replaced in between does not mispair; one that is cut gives a bad sample."""
    folder = copy(left, tmp_path / "left")
    shards = open_shards(str(folder))
    samples = [shards.open(0), shards.open(7)]
    wanted = [decode(shards.read(i).audio, "pcm", RATE, pcm_rate=RATE) for i in (0, 7)]
    (tmp_path / "new").write_bytes(bytes(1 << 20))
    (tmp_path / "new").replace(folder / "shard-000000.tar")
    np.testing.assert_array_equal(decode(samples[0].audio, "pcm", RATE, pcm_rate=RATE), wanted[0])
    with open(folder / "shard-000001.tar", "r+b") as file:
        file.truncate(5000)
    with pytest.raises(BadSample, match="cut_shard"):
        decode(samples[1].audio, "pcm", RATE, pcm_rate=RATE)


@pytest.mark.parametrize("workers", [0, 2])
def test_16_bit_samples_travel_as_they_are(left: str, right: str, tmp_path: Path, workers: int) -> None:  # noqa: F811
    """In any encoding, also with holes in the batches; on the device they have the same values as before."""
    folder = copy(left, tmp_path / "left")
    for number in (3, 8, 17):
        spoil(folder, number, "silent_audio")
    converted = read(open_stream(str(folder), right), 0, 9)
    kept = read(open_stream(str(folder), right), 0, 9, workers, keep_int16=True)
    assert {batch.waveform.dtype for batch in converted} == {torch.float32}
    assert {batch.waveform.dtype for batch in kept} == {torch.int16}
    assert count_reasons(sample for batch in kept for sample in batch.dropped)["silent_audio"] >= 3
    assert all(equal(replace(a, waveform=to_float(a.waveform)), b) for a, b in zip(kept, converted, strict=True))
    assert [rows_of(batch) for batch in kept] == [rows_of(batch) for batch in converted]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_with_another_clip_among_16_bit_ones_is_float32(left: str, tmp_path: Path, workers: int) -> None:  # noqa: F811
    other = write_laion(tmp_path / "deep", {"0": list(range(40, 60))}, subtype="PCM_24")
    sources = (TrainingSource(shards=left, weight=9), TrainingSource(shards=other, weight=1))
    converted = read(open_stream(*sources), 0, 20)
    kept = read(open_stream(*sources), 0, 20, workers, keep_int16=True)
    assert all(equal(replace(a, waveform=to_float(a.waveform)), b) for a, b in zip(kept, converted, strict=True))
    first = [next((k for k, key in enumerate(b.keys) if key.startswith("deep")), None) for b in kept]
    assert [b.waveform.dtype for b in kept] == [torch.int16 if k is None else torch.float32 for k in first]
    assert None in first and len({k for k in first if k is not None}) > 3, "at many places of a batch"
