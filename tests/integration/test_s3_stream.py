"""Training batches from S3 are those from a folder, read by worker processes."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch

from atr_scale.batch import count_reasons
from atr_scale.data import storage
from atr_scale.data.stream import read_batches
from atr_scale.errors import UserError
from tests.coded import open_stream, rows_of, write_shards
from tests.integration.test_s3 import BUCKET, server  # noqa: F401

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("server"), pytest.mark.timeout(300)]


@pytest.fixture
def pair(server: str, tmp_path: Path) -> tuple[str, str]:  # noqa: F811
    local = write_shards(tmp_path / "coded", range(20), shard_size=6)
    remote = f"s3://{BUCKET}/coded/shards"
    for name in storage.list_files(local):
        storage.write_bytes(storage.join(remote, name), Path(local, name).read_bytes())
    return local, remote


def test_the_same_batches_from_both(pair: tuple[str, str]) -> None:
    multiprocessing.set_forkserver_preload(["atr_scale.data.stream", "tests.coded"])
    local, remote = (open_stream(location) for location in pair)
    for keep_int16 in (False, True):
        here = list(read_batches(local.between(0, 6), 0, keep_int16=keep_int16))
        for workers in (0, 2):
            there = list(read_batches(remote.between(0, 6), workers, keep_int16=keep_int16))
            assert [rows_of(batch) for batch in there] == [rows_of(batch) for batch in here]
            assert all(torch.equal(a.waveform, b.waveform) for a, b in zip(here, there, strict=True))
            assert {batch.waveform.dtype for batch in there} == {torch.int16 if keep_int16 else torch.float32}


def test_a_folder_and_a_bucket_in_one_mixture(pair: tuple[str, str]) -> None:
    local, mixed = open_stream(pair[0], pair[0]), open_stream(*pair)
    here, there = (list(read_batches(stream.between(0, 4), 0, keep_int16=True)) for stream in (local, mixed))
    assert [rows_of(batch) for batch in there] == [rows_of(batch) for batch in here]
    assert all(torch.equal(a.waveform, b.waveform) for a, b in zip(here, there, strict=True))


def test_an_object_that_goes_missing_is_counted(pair: tuple[str, str]) -> None:
    stream = open_stream(pair[1], batch=20)
    storage.remove_file(storage.join(pair[1], "shard-000002.tar"))
    (batch,) = read_batches(stream.between(0, 1), 1)
    assert count_reasons(batch.dropped) == {"missing_shard": 6} and len({row[1] for row in rows_of(batch)}) == 14


def test_a_missing_bucket_is_one_line() -> None:
    with pytest.raises(UserError, match="no shards in s3://nowhere/x"):
        open_stream("s3://nowhere/x")
