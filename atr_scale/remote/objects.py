"""Objects of a run on S3. Each function makes one attempt and raises OSError; `data.storage.retried` repeats them."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from atr_scale.data.storage import filesystem
from atr_scale.files import sha256_of

SHA256 = "sha256"  # key of the metadata of an object
PART_ATTEMPTS = 3  # or all parts of a large file would be sent again after one has failed


class StoredObject(NamedTuple):
    """What a listing says of an object. changed: seconds since the epoch, by the store's clock."""

    size: int
    changed: float


def list_below(address: str) -> dict[str, StoredObject]:
    """All objects below an address, by name; {} if there is none. Raises FileNotFoundError if there is no bucket."""
    prefix = address.removeprefix("s3://").rstrip("/") + "/"
    entries: dict[str, dict[str, Any]] = filesystem().find(address, detail=True)
    found = {}
    for name, entry in entries.items():
        inside = name.removeprefix(prefix)
        if not name.startswith(prefix) or entry["type"] != "file" or {"", ".", ".."} & set(inside.split("/")):
            continue  # some are no names of files
        when = entry.get("LastModified")
        changed = when.timestamp() if isinstance(when, datetime) else 0.0
        found[inside] = StoredObject(int(entry["size"]), changed)
    return found


def put_file(path: Path, location: str, sha256: str | None = None, progress: Callable[[], None] = lambda: None) -> None:
    """Upload a file, in parts if it is large; it is visible when it is complete.

    sha256: becomes its metadata. progress: called after every part.
    """
    from fsspec.callbacks import Callback

    def moved(size: int | None, value: int, **more: Any) -> None:
        if value:  # else it begins
            progress()

    filesystem(PART_ATTEMPTS).put_file(
        str(path),
        location,
        callback=Callback(hooks={"progress": moved}),
        **({"Metadata": {SHA256: sha256}} if sha256 else {}),
    )


def put_bytes(content: bytes, location: str, only_new: bool = False) -> bool:
    """Write a small object. only_new: False is returned if there is one, on stores that know conditional writes."""
    if not only_new:
        filesystem().pipe_file(location, content)
        return True
    try:
        filesystem().pipe_file(location, content, mode="create")
    except FileExistsError:
        return False
    except OSError as error:
        said = repr(error)
        if "PreconditionFailed" in said or "ConditionalRequestConflict" in said:
            return False
        if "NotImplemented" not in said:
            raise
        filesystem().pipe_file(location, content)
    return True


def get_bytes(location: str) -> bytes | None:
    """The content of a small object, None if there is none."""
    try:
        content: bytes = filesystem().cat_file(location)
    except FileNotFoundError:
        return None
    return content


def get_file(location: str, path: Path, sha256: str | None = None, changed: float | None = None) -> bool:
    """Download an object to a file, which replaces `path` when it is complete. False if it has another checksum.

    changed: the time that the file gets.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _beside(path) as temporary:
        filesystem().get_file(location, str(temporary))
        if sha256 is not None and sha256_of(temporary) != sha256:
            return False
        if changed is not None:
            os.utime(temporary, (changed, changed))
        os.replace(temporary, path)
    return True


def checksum_of(location: str) -> str | None:
    """The checksum that an object was uploaded with, None if it is not known."""
    with contextlib.suppress(FileNotFoundError):
        found: str | None = filesystem().metadata(location).get(SHA256)
        return found
    return None


def remove(location: str) -> None:
    """Delete an object, if there is one."""
    with contextlib.suppress(FileNotFoundError):
        filesystem().rm_file(location)


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A hidden name of its own: processes of several machines may download to the same folder."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
