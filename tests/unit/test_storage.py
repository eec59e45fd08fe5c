"""Storage: local files, refused schemes, bounded retries. S3 itself is tested in tests/integration/test_s3.py."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path
from typing import Any

import pytest

from atr_scale.data import storage
from atr_scale.data.outage import StoreOutage
from atr_scale.errors import UserError


@pytest.mark.parametrize(
    "location", ["https://x/y", "http://x", "pipe:cat /etc/passwd", "file:///x", "gs://b/k", "s3:/b"]
)
def test_other_schemes_are_refused(location: str) -> None:
    with pytest.raises(UserError, match=f"'{location.split(':')[0]}:' is not supported; give a local path or s3://"):
        storage.list_files(location)


def test_names_with_a_colon_are_local_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("take:2").write_bytes(b"abc")
    assert storage.read_bytes("take:2") == b"abc" and not storage.is_remote(str(tmp_path / "new:name"))


def test_ranges_are_exact(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(range(100)))
    assert storage.read_range(str(path), 10, 20) == bytes(range(10, 20)) and storage.read_range(str(path), 5, 5) == b""
    with pytest.raises(storage.ShortRead, match="ends at byte 100, expected 120"):
        storage.read_range(str(path), 90, 120)
    with pytest.raises(FileNotFoundError):
        storage.read_range(str(tmp_path / "none"), 0, 1)


def test_an_open_file_stays_the_one_it_was(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(range(100)))
    file = storage.LocalFile(str(path))
    storage.write_bytes(str(path), bytes(100))
    memory = bytearray(10)
    file.read_into(memoryview(memory), 30)
    assert memory == bytes(range(30, 40)) and file.read(40, 45) == bytes(range(40, 45))
    with pytest.raises(storage.ShortRead, match="ends at byte 100, expected 105"):
        file.read_into(memoryview(memory), 95)


def test_files_are_closed(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    before = len(os.listdir("/proc/self/fd"))
    held = [storage.LocalFile(str(path)) for _ in range(5)]
    assert len(os.listdir("/proc/self/fd")) == before + 5
    del held
    with pytest.raises(FileNotFoundError):
        storage.LocalFile(str(tmp_path / "none"))
    assert len(os.listdir("/proc/self/fd")) == before


def test_lists_plain_files_only(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "b").write_bytes(b"12")
    (tmp_path / "a").write_bytes(b"")
    assert list(storage.list_files(str(tmp_path)).items()) == [("a", 0), ("b", 2)]
    assert storage.list_files(str(tmp_path / "none")) == {}


def test_atomic_file_leaves_nothing_behind_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), storage.atomic_file(str(path)) as temporary:
        temporary.write_bytes(b"half")
        assert path.read_bytes() == b"old"
        raise RuntimeError
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["x"]
    storage.write_bytes(str(path), b"new")
    assert path.read_bytes() == b"new" and [p.name for p in tmp_path.iterdir()] == ["x"]


class FakeS3:
    """An object of 100 bytes; each call takes the next fault."""

    def __init__(self, faults: Any):
        self.faults = iter(faults)
        self.calls = 0

    def cat_file(self, path: str, start: int, end: int) -> bytes:
        self.calls += 1
        fault = next(self.faults)
        if isinstance(fault, Exception):
            raise fault
        return bytes(range(100))[start:end][: fault if isinstance(fault, int) else None]

    def info(self, path: str) -> dict[str, int]:
        return {"size": 100}


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(storage, "STORE", StoreOutage(sleep=slept.append))
    monkeypatch.setattr(storage, "_read_last", [])
    monkeypatch.setattr(storage, "_bad_objects", set())
    return slept


def use(monkeypatch: pytest.MonkeyPatch, faults: Any) -> FakeS3:
    fake = FakeS3(faults)
    monkeypatch.setattr(storage, "filesystem", lambda: fake)
    return fake


def test_transient_faults_are_retried(monkeypatch: pytest.MonkeyPatch, pauses: list[float]) -> None:
    fake = use(monkeypatch, [OSError("SlowDown"), ConnectionResetError(), 3, None])
    assert storage.read_range("s3://b/k", 10, 20) == bytes(range(10, 20))
    assert fake.calls == 4 and len(pauses) == 3 and len(set(pauses)) == 3


def test_a_persistent_fault_ends_after_bounded_attempts(monkeypatch: pytest.MonkeyPatch, pauses: list[float]) -> None:
    fake = use(monkeypatch, itertools.repeat(OSError("503")))
    with pytest.raises(OSError, match=r"s3://b/k: gave up after 5 attempts: OSError\('503'\)"):
        storage.read_range("s3://b/k", 0, 5)
    assert fake.calls == storage.ATTEMPTS and sum(pauses) < 10


def test_a_store_that_is_away_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, pauses: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    """Also if another object could be read before: that one cannot be read now."""
    use(monkeypatch, [None])
    storage.read_range("s3://b/other", 10, 20)
    fake = use(monkeypatch, [*[ConnectionRefusedError()] * 12, None, None])
    assert storage.read_range("s3://b/k", 10, 20) == bytes(range(10, 20))
    assert fake.calls > storage.ATTEMPTS + 5 and "the store does not answer (s3://b/k: " in caplog.text


def test_one_object_that_is_never_served_is_skipped(monkeypatch: pytest.MonkeyPatch, pauses: list[float]) -> None:
    def served(path: str, start: int, end: int) -> bytes:
        if path == "s3://b/k":
            raise ConnectionResetError
        return bytes(range(100))[start:end]

    fake = use(monkeypatch, [])
    fake.cat_file = served  # type: ignore[method-assign]
    storage.read_range("s3://b/other", 10, 20)
    with pytest.raises(OSError, match=r"s3://b/k: ConnectionResetError.*while another object can be read"):
        storage.read_range("s3://b/k", 10, 20)
    assert sum(pauses) < 20
    pauses.clear()
    with pytest.raises(OSError, match="while another object can be read"):
        storage.read_range("s3://b/k", 30, 40)
    assert pauses == [], "its other samples are skipped at once"


def test_no_retry_if_it_cannot_help(monkeypatch: pytest.MonkeyPatch, pauses: list[float]) -> None:
    for fault, expected in ((FileNotFoundError(), FileNotFoundError), (PermissionError(), PermissionError)):
        fake = use(monkeypatch, [fault])
        with pytest.raises(expected):
            storage.read_range("s3://b/k", 0, 5)
        assert fake.calls == 1
    use(monkeypatch, [None])
    with pytest.raises(storage.ShortRead, match="ends at byte 100, expected 120"):
        storage.read_range("s3://b/k", 90, 120)
    assert pauses == []


def test_missing_credentials_are_the_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    from botocore.exceptions import NoCredentialsError

    use(monkeypatch, [NoCredentialsError()])
    with pytest.raises(UserError, match="Unable to locate credentials; set AWS_PROFILE or AWS_ACCESS_KEY_ID"):
        storage.read_range("s3://b/k", 0, 5)


def test_a_location_without_a_bucket_is_refused() -> None:
    with pytest.raises(UserError, match="names no bucket"):
        storage.is_remote("s3://")
