"""Files that are there completely or not at all, and their checksums.

For locations that may be on S3 see `data.storage`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

from atr_scale.errors import Failure

logger = logging.getLogger(__name__)

FULL = (errno.ENOSPC, errno.EDQUOT)
PROBE_BYTES = 1 << 16


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary path to write to. It replaces `path` when the block ends without an error, and is removed otherwise.

    The temporary file is hidden and beside `path`: ".<name>.<process id>.tmp".
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def give_usual_mode(path: Path) -> None:
    """Give a file the permissions that new files have in its folder. safetensors lets its owner alone read it."""
    probe = path.with_name(f".{path.name}.{os.getpid()}.mode")
    try:
        probe.touch()
        path.chmod(probe.stat().st_mode & 0o777)
    finally:
        probe.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_full(error: BaseException, folder: Path) -> bool:
    """Whether writing in a folder has failed because its disk, or the user's quota, is full.

    Libraries do not all say why a write has failed: then a small file is tried.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in FULL:
            return True
        if re.search(rf"os error ({errno.ENOSPC}|{errno.EDQUOT})\b", str(seen)):  # of a library in Rust
            return True
        seen = seen.__cause__ or seen.__context__
    if isinstance(error, OSError) and error.errno is not None:
        return False
    probe = folder / f".probe.{os.getpid()}.tmp"
    try:
        probe.write_bytes(bytes(PROBE_BYTES))
        sync(probe)
    except OSError as found:
        return found.errno in FULL
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
    return False


@contextlib.contextmanager
def unless_full(folder: Path, what: str) -> Iterator[None]:
    """The block writes `what`, which a run can go without: on a full disk an error is logged, and none is raised."""
    try:
        yield
    except OSError as error:
        if not is_full(error, folder):
            raise
        logger.error("%s: the disk is full, %s cannot be written", folder, what)


@contextlib.contextmanager
def full_disk_in_one_line(place: Path) -> Iterator[None]:
    """Failure if something that the command cannot go without does not fit on the disk of `place`."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        disk = disk_of(Path(error.filename or place))
        raise Failure(f"the disk {disk} is full: make space there for {place}, and start the command again") from None


def disk_of(place: Path) -> Path:
    """Where the file system of a path is mounted."""
    place = place.resolve()
    return next(folder for folder in (place, *place.parents) if os.path.ismount(folder))
