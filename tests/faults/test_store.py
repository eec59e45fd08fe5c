"""Training from an S3 server whose answers fail: one bad object is skipped, an outage is waited for.

The server is rclone, behind a proxy that injects the faults.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

from atr_scale.batch import count_reasons
from atr_scale.data import storage
from atr_scale.data.outage import is_unanswered
from atr_scale.data.stream import read_batches
from atr_scale.remote.objects import put_bytes
from tests.coded import open_stream, rows_of, write_shards
from tests.faults.proxy import (
    Answer,
    Cut,
    Fault,
    FaultProxy,
    Silence,
    first_reads,
    for_all,
    needs_rclone,
    s3_behind_proxy,
)
from tests.tiny import read_training
from tests.tiny_run import tiny_config

pytestmark = [needs_rclone, pytest.mark.slow, pytest.mark.timeout(300)]
Outcome = Callable[[str], None]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The server's folder, with a bucket of coded clips and of tiny inputs."""
    folder = tmp_path_factory.mktemp("s3")
    write_shards(folder / "bucket" / "coded", range(20), shard_size=6)
    tiny_config(folder / "bucket", folder / "unused")
    return folder


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[FaultProxy]:
    with s3_behind_proxy(root) as proxy:
        # Workers start from the fork server, which keeps the environment of its own start.
        forkserver._forkserver._stop()  # type: ignore[attr-defined]
        multiprocessing.set_forkserver_preload(["atr_scale.data.stream", "tests.coded"])
        yield proxy
        forkserver._forkserver._stop()  # type: ignore[attr-defined]


@pytest.fixture
def proxy(server: FaultProxy) -> Iterator[FaultProxy]:
    server.requests.clear()
    yield server
    server.fault = for_all(None)


class Training:
    """A run of 40 steps on the tiny inputs in the bucket, in a process of its own."""

    def __init__(self, root: Path, run: Path, **data: Any) -> None:
        self.run = run
        tiny_config(root / "bucket", run)
        settings = json.loads((root / "bucket" / "tiny.yaml").read_text())
        settings["data"].update(train=[{"shards": "s3://bucket/train/shards"}], workers=1, crop_seconds=0.5, **data)
        settings["train"].update(steps=40)
        config = run.with_suffix(".yaml")
        config.write_text(json.dumps(settings))
        self.log = run.with_suffix(".log")
        with open(self.log, "w") as log:
            command = [sys.executable, "-m", "atr_scale.train", str(config)]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})

    def ended(self) -> int:
        try:
            return self.process.wait(200)
        finally:
            self.process.kill()

    def losses(self) -> list[float]:
        return [line["loss"] for line in read_training(self.run)]

    def dropped(self) -> float:
        return sum(value for name, value in read_training(self.run)[-1].items() if name.startswith("dropped/"))


@pytest.fixture(scope="module")
def undisturbed(root: Path, server: FaultProxy, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    training = Training(root, tmp_path_factory.mktemp("runs") / "undisturbed")
    assert training.ended() == 0, training.log.read_text()
    return training.losses()


class Outage:
    """An outage of `seconds` that begins at the first read of an object after `reads` others."""

    def __init__(self, proxy: FaultProxy, reads: int, seconds: float, refuse: bool = False) -> None:
        self.proxy, self.left, self.seconds, self.refuse = proxy, reads, seconds, refuse
        self.began: float | None = None

    def __call__(self, method: str, path: str) -> Fault | None:
        if self.began is None and method == "GET" and ".tar" in path:
            self.left -= 1
            if self.left < 0:
                self.began = time.monotonic()
                if self.refuse:
                    self.proxy.refuse()
        down = self.began is not None and time.monotonic() - self.began < self.seconds
        return Answer(503) if down else None


@pytest.mark.fault("S3 answers 503 for 12 s", expected="training waits, says so, goes on; nothing is lost")
def test_an_outage_is_waited_for(
    root: Path, proxy: FaultProxy, undisturbed: list[float], tmp_path: Path, outcome: Outcome
) -> None:
    proxy.fault = Outage(proxy, 200, 12)
    training = Training(root, tmp_path / "run")
    code, log = training.ended(), training.log.read_text()
    assert code == 0, log
    assert "the store does not answer (s3://bucket/train/shards/" in log and "no more waiting for the store" in log
    assert training.losses() == undisturbed and training.dropped() == 0
    assert sum(isinstance(fault, Answer) for _, _, fault in proxy.requests) < 100, "the store is not flooded"
    status = json.loads((tmp_path / "run" / "status" / "rank-0.json").read_text())
    assert status["retries"] > 0
    outcome(f"rc 0, losses of all 40 steps as without the outage, {status['retries']} requests repeated")


@pytest.mark.fault("S3 refuses connections for 8 s", expected="training waits, says so, goes on; nothing is lost")
def test_refused_connections_are_waited_for(
    root: Path, proxy: FaultProxy, undisturbed: list[float], tmp_path: Path, outcome: Outcome
) -> None:
    outage = Outage(proxy, 200, 0, refuse=True)
    proxy.fault = outage
    training = Training(root, tmp_path / "run")
    while outage.began is None and training.process.poll() is None:
        time.sleep(0.1)
    time.sleep(8)
    proxy.fault = for_all(None)
    proxy.accept()
    code, log = training.ended(), training.log.read_text()
    assert code == 0, log
    assert "the store does not answer" in log and training.losses() == undisturbed and training.dropped() == 0
    outcome("rc 0, losses of all 40 steps as without the outage")


@pytest.mark.fault(
    "S3 does not come back within data.outage_seconds", expected='exit code 1, "the store could not be reached"'
)
def test_the_budget_of_an_outage(root: Path, proxy: FaultProxy, tmp_path: Path, outcome: Outcome) -> None:
    outage = Outage(proxy, 200, 1000)
    proxy.fault = outage
    training = Training(root, tmp_path / "run", outage_seconds=3)
    code, log = training.ended(), training.log.read_text()
    assert outage.began is not None
    seconds = time.monotonic() - outage.began
    last = log.splitlines()[-1]
    assert code == 1 and "Traceback" not in log, log
    assert last.startswith(
        "error: the store could not be reached for 3 s (data.outage_seconds = 3): s3://bucket/train/"
    )
    assert seconds < 60
    outcome(f"rc 1 after {seconds:.0f} s with a budget of 3 s: {last.split(':')[1].strip()}")


def batches(location: str, workers: int = 1) -> list[Any]:
    return list(read_batches(open_stream(location).between(0, 8), workers))


@pytest.mark.fault("one object of S3 cannot be read", expected="its samples are skipped and counted, others are read")
@pytest.mark.parametrize(
    ("fault", "reason"),
    [(Answer(404), "missing_shard"), (Answer(403), "no_permission"), (Answer(503), "read_error")],
    ids=["404", "403", "503"],
)
def test_a_bad_object_is_skipped(root: Path, proxy: FaultProxy, fault: Answer, reason: str, outcome: Outcome) -> None:
    proxy.fault = lambda method, path: fault if method == "GET" and "shard-000001.tar" in path else None
    found = batches("s3://bucket/coded/shards")
    here = batches(str(root / "bucket" / "coded" / "shards"), 0)
    bad = sum("shard-000001" in row[0] for batch in here for row in rows_of(batch))
    dropped = sum((count_reasons(batch.dropped) for batch in found), count_reasons([]))
    assert dropped == {reason: bad} and bad > 0
    for there, whole in zip(found, here, strict=True):
        rows = {row for row in rows_of(whole) if "shard-000001" not in row[0]}
        assert set(rows_of(there)) == rows
    outcome(f"{bad} samples dropped as {reason}, all others as stored")


@pytest.mark.fault(
    "an answer of S3 stalls, is cut or reset", expected="read timeout or length check, then the request is repeated"
)
@pytest.mark.parametrize("how", ["stall", "close", "reset"])
def test_an_incomplete_answer_is_repeated(
    root: Path, proxy: FaultProxy, how: str, outcome: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy.fault = first_reads(Cut(how), 3)
    began = time.monotonic()
    there = batches("s3://bucket/coded/shards")
    seconds = time.monotonic() - began
    here = batches(str(root / "bucket" / "coded" / "shards"), 0)
    assert [rows_of(batch) for batch in there] == [rows_of(batch) for batch in here]
    assert not any(batch.dropped for batch in there)
    assert sum(isinstance(fault, Cut) for _, _, fault in proxy.requests) == 3
    outcome(f"3 requests repeated, all samples as stored, {seconds:.0f} s")


@pytest.mark.fault("S3 takes an upload and never answers", expected="it fails after a time limit, and can be repeated")
@pytest.mark.parametrize("megabytes", [0, 24], ids=["small", "large"])
def test_an_upload_without_an_answer(
    proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, megabytes: int, outcome: Outcome
) -> None:
    """A large one does not fit into the buffers of the connection, so that the time limit of reading never begins."""
    monkeypatch.setattr(storage, "READ_TIMEOUT_S", 1)
    monkeypatch.setattr(storage, "SEND_TIMEOUT_S", 1)
    storage._filesystem_of.cache_clear()
    content = bytes(1 + megabytes * (1 << 20))
    proxy.fault = for_all(Silence())
    began = time.monotonic()
    with pytest.raises(Exception) as caught:
        put_bytes(content, "s3://bucket/upload")
    seconds = time.monotonic() - began
    assert is_unanswered(caught.value)
    proxy.fault = for_all(None)
    assert put_bytes(content, "s3://bucket/upload") and storage.read_bytes("s3://bucket/upload") == content
    storage._filesystem_of.cache_clear()
    outcome(f"it has failed after {seconds:.0f} s with limits of 1 s, and was repeated")
