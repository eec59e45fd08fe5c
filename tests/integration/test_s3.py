"""Shards on S3, against a real server process (moto_server)."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import nullcontext
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
import soundfile

from atr_scale.data import storage
from atr_scale.data.outage import STORE
from atr_scale.data.sample import BadSample
from atr_scale.data.shard_builder import build_shards
from atr_scale.data.shard_check import check_shards
from atr_scale.data.shard_reader import ShardSet, open_shards
from atr_scale.errors import Failure, UserError

pytestmark = pytest.mark.slow
BUCKET = "shards"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The URL of an S3 server with one bucket; credentials and endpoint as a user sets them, by environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    environment = {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch, subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        for name, value in environment.items():
            patch.setenv(name, value)
        # Workers of a stream start from the fork server, which keeps the environment of its own start.
        forkserver._forkserver._stop()  # type: ignore[attr-defined]
        for _ in range(1200):
            try:
                urllib.request.urlopen(url, timeout=5).close()
                break
            except OSError:
                time.sleep(0.1)
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        storage._filesystem_of.cache_clear()
        yield url
        storage._filesystem_of.cache_clear()
        forkserver._forkserver._stop()  # type: ignore[attr-defined]
        process.kill()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("corpus") / "tiny"
    (root / "audio").mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines = ["file_name,caption"]
    for n in range(11):
        soundfile.write(root / "audio" / f"{n}.wav", (3000 * rng.standard_normal(2000)).astype(np.int16), 8000)
        lines.append(f"{n}.wav,clip {n}")
    (root / "captions.csv").write_text("\n".join(lines))
    return root


@pytest.fixture(scope="module")
def pair(server: str, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The same shards in a folder and on S3."""
    local = str(tmp_path_factory.mktemp("local") / "set")
    remote = f"s3://{BUCKET}/corpora/set"
    for out, workers in ((local, 1), (remote, 2)):
        build_shards("folder", corpus, out, shard_size=4, sample_rate=8000, workers=workers)
    return local, remote


def test_remote_equals_local(pair: tuple[str, str]) -> None:
    local, remote = (open_shards(location) for location in pair)
    assert storage.list_files(pair[0]) == storage.list_files(pair[1])
    assert len(local) == len(remote) == 11
    assert [local.read(i) for i in range(11)] == [remote.read(i) for i in range(11)]
    assert check_shards(pair[1], deep=True) == []


def test_complete_remote_build_is_not_repeated(pair: tuple[str, str], corpus: Path) -> None:
    again = build_shards("folder", corpus, pair[1], shard_size=4, sample_rate=8000)
    assert again["num_samples"] == 11
    with pytest.raises(UserError, match="shard_size differ"):
        build_shards("folder", corpus, pair[1], shard_size=5, sample_rate=8000)


def test_shards_without_a_manifest_are_indexed_over_s3(pair: tuple[str, str]) -> None:
    local, _ = pair
    bare = f"s3://{BUCKET}/bare"
    for name in storage.list_files(local):
        if name.endswith(".tar"):
            storage.write_bytes(storage.join(bare, name), Path(local, name).read_bytes())
    shards, reference = open_shards(bare), open_shards(local)
    assert shards.keys == reference.keys and np.array_equal(shards.start, reference.start)
    assert shards.num_captions == reference.num_captions == reference.manifest["num_captions"]
    assert storage.exists(storage.join(bare, ".index.json")) and shards.read(3) == reference.read(3)
    storage.write_bytes(storage.join(bare, "shard-000001.tar"), Path(local, "shard-000001.tar").read_bytes()[:3000])
    assert any("shard-000001.tar: broken tar" in problem for problem in check_shards(bare))
    with pytest.raises(BadSample, match="cut_shard"):
        shards.read(7)
    storage.remove_file(storage.join(bare, "shard-000000.tar"))
    with pytest.raises(BadSample, match="missing_shard"):
        shards.read(0)


def _read_in_child(shards: ShardSet, queue: multiprocessing.Queue[list[str]]) -> None:
    queue.put([shards.read(i).clip_id for i in range(len(shards))])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_child_process_reads_after_its_parent_did(pair: tuple[str, str], method: str) -> None:
    shards = open_shards(pair[1])
    expected = [shards.read(i).clip_id for i in range(len(shards))]
    context: Any = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=_read_in_child, args=(shards, queue))
    child.start()
    assert queue.get(timeout=240) == expected
    child.join(60)
    assert child.exitcode == 0


def test_mistakes_are_one_line(server: str, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no shards in s3://nowhere/x"):
        open_shards("s3://nowhere/x")
    with pytest.raises(UserError, match="cannot write s3://nowhere/x"):
        build_shards("folder", corpus, "s3://nowhere/x", workers=1)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setitem(os.environ, "AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        storage._filesystem_of.cache_clear()
        away = pytest.raises(Failure, match=r"the store could not be reached for \d+ s .*s3://shards/x")
        with STORE.waiting_with(0.1, lambda _: nullcontext()), away:
            open_shards("s3://shards/x")
    storage._filesystem_of.cache_clear()


def test_a_remote_shard_replaced_by_one_of_the_same_size_is_indexed_again(server: str, tmp_path: Path) -> None:
    import io
    import tarfile

    def archive(key: str) -> bytes:
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as tar:
            for name, data in ((f"{key}.flac", b"x" * 100), (f"{key}.json", b'{"text": "a dog barks"}')):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return file.getvalue()

    location = f"s3://{BUCKET}/replaced"
    for key in ("first", "other"):
        storage.write_bytes(f"{location}/x.tar", archive(key))
        assert open_shards(location).keys == [key]
        assert ".index.json" in storage.list_files(location)
