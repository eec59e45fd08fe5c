"""The same functions to read and write bytes on local disks and on S3.

A location is a local path or `s3://bucket/key`. Other schemes are refused: `https:` would read input without versions
and `pipe:` would run a shell. S3 credentials, region and endpoint come from the provider chain only (environment,
profile, instance role; `AWS_ENDPOINT_URL` for servers other than Amazon's).
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import random
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from atr_scale.data.outage import BAD_OBJECT_TRIALS, STORE, BadObject, is_unanswered
from atr_scale.errors import UserError
from atr_scale.files import FULL, atomic_write

logger = logging.getLogger(__name__)

ATTEMPTS = 5
FIRST_DELAY_S = 0.2
# No attempt starts later than this, so that an outage is noticed within a minute even if every attempt times out.
RETRY_BUDGET_S = 20.0
READ_TIMEOUT_S = 15
CONNECT_TIMEOUT_S = 5
# For a server that takes no more of what is sent to it: the time limit of reading begins when all is sent.
SEND_TIMEOUT_S = 30
BLOCK_BYTES = 8 << 20

T = TypeVar("T")


class ShortRead(OSError):
    """A file or object ends before the end of the requested range."""


def is_remote(location: str) -> bool:
    """True for s3://, False for a local path. Raises UserError for every other scheme."""
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):", location)
    if scheme is None:
        return False
    if scheme[1] == "s3" and location.startswith("s3://"):
        bucket, slash, key = location[5:].partition("/")
        if not bucket:
            raise UserError(f"{location} names no bucket: give s3://bucket/prefix")
        if not re.fullmatch(r"[\w.-]{1,255}|arn:\S+", bucket, re.ASCII):
            raise UserError(f"{location}: {bucket!r} is no name of a bucket; give s3://bucket/prefix")
        if slash and key.startswith("/"):  # S3 has such keys, but their folder cannot be listed
            raise UserError(f"{location}: a key cannot begin with a slash; give s3://{bucket}/{key.lstrip('/')}")
        return True
    if not location.startswith(f"{scheme[1]}://") and scheme[1] != "pipe" and os.path.exists(location):
        return False
    raise UserError(f"{location}: '{scheme[1]}:' is not supported; give a local path or s3://bucket/prefix")


def join(location: str, name: str) -> str:
    """`name` inside the folder or prefix `location`."""
    return f"{location.rstrip('/')}/{name}" if is_remote(location) else os.path.join(location, name)


def list_files(location: str) -> dict[str, int]:
    """Bytes of every file directly inside a folder or prefix, by name, sorted; empty if there is no such place.

    Raises UserError if it cannot be listed, as this is usually the first contact with a location.
    """
    return {name: size for name, (size, _) in list_versions(location).items()}


def list_versions(location: str) -> dict[str, tuple[int, str | int]]:
    """(bytes, version) of every file, as `list_files`. The version is the ETag on S3, the modification time on disk."""
    try:
        if is_remote(location):
            prefix = location.rstrip("/") + "/"
            entries = retried(lambda: filesystem().ls(prefix, detail=True), prefix)
            found: dict[str, tuple[int, str | int]] = {
                entry["name"].rsplit("/", 1)[-1]: (int(entry["size"]), str(entry.get("ETag", "")))
                for entry in entries
                if entry["type"] == "file"
            }
            found.pop("", None)
        else:
            with os.scandir(location) as items:
                stats = {item.name: _file_stat(item) for item in items}
            found = {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items() if stat is not None}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise UserError(f"cannot list {location}: {error}; check permissions and, on S3, AWS_ENDPOINT_URL") from None
    return dict(sorted(found.items()))


def _file_stat(item: os.DirEntry[str]) -> os.stat_result | None:
    """None for what is no file: a folder, a link that leads to nothing or to itself, a file that has just gone."""
    try:
        return item.stat() if item.is_file() else None
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):
            return None
        raise


def size(location: str) -> int:
    """Bytes of a file or object. Raises FileNotFoundError if there is none."""
    if is_remote(location):
        return int(retried(lambda: filesystem().info(location), location)["size"])
    return os.stat(location).st_size


def exists(location: str) -> bool:
    """Whether the file or object exists."""
    try:
        size(location)
    except FileNotFoundError:
        return False
    return True


def read_bytes(location: str) -> bytes:
    """The whole file or object."""
    return read_range(location, 0, size(location))


def read_range(location: str, start: int, stop: int) -> bytes:
    """Exactly the bytes [start, stop). Raises ShortRead if the file ends earlier, OSError if reading fails."""
    if stop <= start:
        return b""
    if is_remote(location):
        data = retried(lambda: _remote_range(location, start, stop), location, lambda: _another_answers(location))
        _remember(location)
        return data
    return LocalFile(location).read(start, stop)


class LocalFile:
    """A local file, open for as long as this object exists.

    All reads are from the same file, even if another one replaces it at its path in between. Threads share no file
    position, and as each use opens its own handle, no handle is inherited over a fork.
    """

    _handle = -1

    def __init__(self, path: str) -> None:
        self.path = path
        self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)

    def read(self, start: int, stop: int) -> bytes:
        """Exactly the bytes [start, stop). Raises ShortRead if the file ends earlier."""
        data = os.pread(self._handle, stop - start, start)
        while len(data) < stop - start:  # one call returns at most 2 GiB, and less at the end of the file
            part = os.pread(self._handle, stop - start - len(data), start + len(data))
            if not part:
                raise ShortRead(f"{self.path} ends at byte {start + len(data)}, expected {stop}")
            data += part
        return data

    def read_into(self, memory: memoryview, start: int) -> None:
        """Fill `memory` (bytes) with the file's bytes from `start` on. Raises ShortRead if the file ends earlier."""
        done = 0
        while done < len(memory):
            count = os.preadv(self._handle, [memory[done:]], start + done)
            if not count:
                raise ShortRead(f"{self.path} ends at byte {start + done}, expected {start + len(memory)}")
            done += count


@contextlib.contextmanager
def range_reader(location: str, end: int) -> Iterator[Callable[[int, int], bytes]]:
    """A function `read(start, stop)` for many small reads that go forward through a file or object of `end` bytes."""
    if not is_remote(location):
        yield LocalFile(location).read
        return
    block_start, block = 0, b""

    def read(start: int, stop: int) -> bytes:
        nonlocal block_start, block
        if not block_start <= start <= stop <= block_start + len(block):
            block_start, block = start, read_range(location, start, min(end, max(stop, start + BLOCK_BYTES)))
        return block[start - block_start : stop - block_start]

    yield read


def write_bytes(location: str, data: bytes) -> None:
    """Write a whole file or object, which becomes visible only when it is complete."""
    with atomic_file(location) as path:
        path.write_bytes(data)


@contextlib.contextmanager
def atomic_file(location: str) -> Iterator[Path]:
    """A local path to write to. The file moves to `location` when the block ends without an error.

    Locally this is `files.atomic_write`. On S3 it is one upload, visible only when complete. Raises UserError if a
    bucket does not exist or refuses the upload.
    """
    if is_remote(location):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / location.rsplit("/", 1)[-1]
            yield path
            try:
                retried(lambda: filesystem().put_file(str(path), location), location)
            except (FileNotFoundError, PermissionError) as error:
                raise UserError(f"cannot write {location}: {error}; check the bucket and its permissions") from None
        return
    with atomic_write(Path(location)) as path:
        yield path


def make_folder(location: str) -> None:
    """Create a local folder with its parents; nothing on S3, which has no folders. UserError if that fails."""
    if not is_remote(location):
        try:
            os.makedirs(location, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot create {location}: {error.strerror}; choose another --out") from None


def remove_folder(location: str) -> None:
    """Delete a folder or prefix with everything in it, if it exists."""
    if is_remote(location):
        with contextlib.suppress(FileNotFoundError):
            retried(lambda: filesystem().rm(location, recursive=True), location)
    else:
        shutil.rmtree(location, ignore_errors=True)


def remove_file(location: str) -> None:
    """Delete one file or object, if it exists."""
    with contextlib.suppress(FileNotFoundError):
        if is_remote(location):
            retried(lambda: filesystem().rm_file(location), location)
        else:
            os.unlink(location)


def _remote_range(location: str, start: int, stop: int) -> bytes:
    try:
        data: bytes = filesystem().cat_file(location, start=start, end=stop)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        data = b""  # the range begins beyond the object's end
    if len(data) != stop - start:
        if size(location) < stop:
            raise ShortRead(f"{location} ends at byte {start + len(data)}, expected {stop}")
        raise ConnectionError(f"{location}: got {len(data)} of {stop - start} bytes")
    return data


# The last two different objects that this process has read, the newest one first.
_read_last: list[str] = []
_bad_objects: set[str] = set()


def _remember(location: str) -> None:
    global _read_last
    if _read_last[:1] != [location]:
        _read_last = [location, *(other for other in _read_last if other != location)][:2]


def _another_answers(location: str) -> bool:
    """Whether an object that could be read before, another one than `location`, can be read now."""
    other = next((each for each in _read_last if each != location), None)
    if other is None:
        return False
    try:
        filesystem().cat_file(other, start=0, end=1)
    except Exception:
        return False
    return True


def filesystem(attempts: int = 1) -> Any:
    """The S3 file system of this process: s3fs has an event loop, which does not survive a fork.

    attempts: of each request, the parts of a large file among them.
    """
    return _filesystem_of(os.getpid(), attempts)


@functools.lru_cache(maxsize=2)
def _filesystem_of(pid: int, attempts: int) -> Any:
    import s3fs
    from aiobotocore.session import AioSession
    from botocore.handlers import add_expect_header

    for name in ("botocore", "aiobotocore"):  # they log at level INFO in every process where they found the credentials
        logging.getLogger(name).setLevel(logging.WARNING)
    session = AioSession()
    # An upload would wait without a limit until the server says that it may be sent.
    session.unregister("before-call.s3", add_expect_header)
    made = s3fs.S3FileSystem(
        session=session,
        config_kwargs={
            "read_timeout": READ_TIMEOUT_S,
            "connect_timeout": CONNECT_TIMEOUT_S,
            "connector_args": {"socket_factory": _socket},
            "retries": {"total_max_attempts": 1},
        },
        skip_instance_cache=True,
        use_listings_cache=False,
    )
    # By default only `retried` below repeats: nested retries would multiply to minutes.
    made.retries = attempts
    return made


def _socket(address: tuple[Any, ...]) -> socket.socket:
    """A socket for an entry of `getaddrinfo` that ends if the other side takes nothing for SEND_TIMEOUT_S."""
    made = socket.socket(*address[:3])
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # of Linux
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * SEND_TIMEOUT_S))
    return made


def retried(action: Callable[[], T], location: str, others: Callable[[], bool] = lambda: False) -> T:
    """Run `action`, at most ATTEMPTS times with growing, jittered pauses, and wait if the store does not answer.

    others: whether another object can be read now, which would mean that this one alone is bad. Raises OSError if every
    attempt fails, and Failure if the store does not answer for `data.outage_seconds`.
    """
    began = time.monotonic()
    # Of a bad object each sample would otherwise take seconds.
    attempts, trials = (1, 1) if location in _bad_objects else (ATTEMPTS, BAD_OBJECT_TRIALS)
    for attempt in range(1, attempts + 1):
        try:
            result = _once(action, location)
            STORE.answered()
            _bad_objects.discard(location)
            return result
        except (FileNotFoundError, PermissionError, ShortRead, UserError):
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in FULL:  # of a local disk
                raise
            STORE.count_retry()
            if attempt == attempts or time.monotonic() - began > RETRY_BUDGET_S:
                if is_unanswered(error):
                    try:
                        return STORE.outlast(lambda: _once(action, location), location, error, others, trials)
                    except BadObject:
                        _bad_objects.add(location)
                        raise
                raise OSError(f"{location}: gave up after {attempt} attempts: {error!r}") from error
            pause = FIRST_DELAY_S * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)
            logger.info("%s: %r; attempt %d of %d in %.1f s", location, error, attempt + 1, attempts, pause)
            time.sleep(pause)
    raise AssertionError("unreachable")


def _once(action: Callable[[], T], location: str) -> T:
    """Run `action` once. Raises UserError if there are no credentials."""
    try:
        return action()
    except Exception as error:
        if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"):
            raise UserError(f"{location}: {error}; set AWS_PROFILE or AWS_ACCESS_KEY_ID and its secret") from None
        raise
