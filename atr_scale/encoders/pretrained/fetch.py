"""Download a file of the weights table: resumed after an interruption, checked, there completely or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import BinaryIO
from urllib.error import HTTPError
from urllib.parse import quote, urlsplit
from urllib.request import Request, urlopen

from tqdm import tqdm

from atr_scale.encoders.pretrained.weights import Weights
from atr_scale.errors import UserError, one_line
from atr_scale.files import sync
from atr_scale.version import __version__

logger = logging.getLogger(__name__)

TIMEOUT_S = 30.0  # for the first answer, and for every further piece
PIECE = 2**18
WEB_PAGE = (b"<!doctype", b"<html")


def fetch(weights: Weights, folder: Path, mirror: str | None = None) -> Path:
    """Put the file of `weights` into `folder` and check it; returns its path. A file that is there is only checked.

    mirror: address of a folder that has the file under its own name, to use instead of the project's address.
    An interrupted download stays in `<file>.partial`, and the next call continues it.
    Raises UserError if the file cannot be had, cannot be written, or differs from the weights table.
    """
    path = folder / weights.file
    if path.exists():
        fits, found = compare(weights, path)
        if not fits:
            raise UserError(f"{path} has {found}: it is another file or damaged, delete it and call again")
        logger.info("%s is there already: %s", path, found)
        return path
    address = weights.address if mirror is None else f"{mirror.rstrip('/')}/{quote(weights.file)}"
    if urlsplit(address).scheme not in ("http", "https"):
        raise UserError(f"{mirror} is no address of a folder: begin it with http:// or https://")
    unfinished = path.with_name(f"{path.name}.partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(unfinished) as file:
            logger.info("fetching %s (%s)", address, weights.project.licence)
            _download(weights, address, path, file)
            fits, found = compare(weights, unfinished)
            if not fits:
                unfinished.unlink()
                raise UserError(f"the file of {address} has {found}: call again; if it stays so, see {_page(weights)}")
            os.replace(unfinished, path)
        sync(folder)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror or error}): make room, or give another --to") from None
    logger.info("%s is complete: %s", path, found)
    return path


def compare(weights: Weights, path: Path) -> tuple[bool, str]:
    """Whether the file at `path` has the size and the checksum of the weights table, and what was found."""
    size = path.stat().st_size
    if not size:
        return False, "no bytes"
    if weights.size not in (None, size):
        return False, f"{size} bytes instead of the {weights.size} of the weights table"
    kind, _, expected = (weights.checksum or "sha256:").partition(":")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, kind).hexdigest()
    if not expected:
        return True, f"{size} bytes, sha256 {found}, and the weights table has none to compare with"
    if found != expected:
        return False, f"{kind} {found} instead of the {expected} of the weights table"
    return True, f"{size} bytes, {kind} {found} as in the weights table"


@contextmanager
def _alone(unfinished: Path) -> Iterator[BinaryIO]:
    """The partial file, opened to append to it. Raises UserError if another process does so already."""
    with unfinished.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is writing {unfinished}: wait until it has finished") from None
        # Locked after the other process has given it its final name, the file would be changed under that name.
        if not unfinished.exists() or not os.path.samestat(os.fstat(file.fileno()), unfinished.stat()):
            raise UserError(f"another process has just finished {unfinished}: call again")
        yield file


def _download(weights: Weights, address: str, path: Path, file: BinaryIO) -> None:
    """Append to `file` what it lacks of the file at `address`."""
    have = file.tell()
    answer = _ask(weights, address, path, have)
    if answer is None:
        return
    with answer:
        if answer.status != 206:  # the server sends the whole file again
            have = 0
        elif not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            raise UserError(f"{address} sends another piece than the one asked for: delete {file.name} and call again")
        rest = answer.length
        total = None if rest is None else have + rest
        _check_offer(weights, address, path, answer, _received(partial(answer.peek, 64), address, file), total)
        free = shutil.disk_usage(path.parent).free
        if rest is not None and rest > free:
            raise UserError(
                f"{path} needs {rest / 1e6:,.0f} MB more, and {path.parent} has {free / 1e6:,.0f} MB free: "
                "make room, or give another --to"
            )
        file.truncate(have)
        with tqdm(initial=have, total=total, unit="B", unit_scale=True, desc=weights.file, disable=None) as bar:
            while piece := _received(partial(answer.read, PIECE), address, file):
                file.write(piece)
                bar.update(len(piece))
        file.flush()
        if total is not None and file.tell() < total:
            raise _broken(address, file, "it ended early")


def _ask(weights: Weights, address: str, path: Path, have: int) -> HTTPResponse | None:
    """The server's answer with the bytes from `have` on, or with the whole file; None if there are no more bytes."""
    headers = {"User-Agent": f"atr-scale/{__version__}", **({"Range": f"bytes={have}-"} if have else {})}
    try:
        answer: HTTPResponse = urlopen(Request(address, headers=headers), timeout=TIMEOUT_S)
    except HTTPError as error:
        if error.code == 416 and error.headers.get("Content-Range", "").rpartition("/")[2] == str(have):
            return None
        if error.code == 416 and have:  # the partial file is longer than the file
            return _ask(weights, address, path, 0)
        missing = error.code in (404, 410)
        what = f"there is no file at {address}" if missing else f"{address} refuses"
        raise UserError(f"{what} (HTTP {error.code} {one_line(error.reason)}): {_by_hand(weights, path)}") from None
    except (OSError, HTTPException, ValueError) as error:  # ValueError: an address that HTTP cannot carry
        reason = one_line(str(getattr(error, "reason", error)))
        raise UserError(f"cannot reach {urlsplit(address).netloc} ({reason}): {_by_hand(weights, path)}") from None
    return answer


def _check_offer(
    weights: Weights, address: str, path: Path, answer: HTTPResponse, begin: bytes, total: int | None
) -> None:
    """UserError if the answer is a web page, or if it has not the size of the weights table."""
    page = answer.headers.get_content_type() == "text/html"
    if page or begin.lstrip().lower().startswith(WEB_PAGE):
        raise UserError(f"{address} answers with a web page instead of the file: {_by_hand(weights, path)}")
    if weights.size is not None and total not in (None, weights.size):
        raise UserError(
            f"{address} offers {total} bytes instead of the {weights.size} of the weights table: see {_page(weights)}"
        )


def _received(receive: Callable[[], bytes], address: str, file: BinaryIO) -> bytes:
    try:
        return receive()
    except (OSError, HTTPException) as error:
        raise _broken(address, file, one_line(error)) from None


def _broken(address: str, file: BinaryIO, reason: str) -> UserError:
    return UserError(
        f"the connection to {urlsplit(address).netloc} broke after {file.tell() / 1e6:,.1f} MB ({reason}): "
        "call again to continue"
    )


def _page(weights: Weights) -> str:
    return f"{weights.project.page}, or give --from with the address of a mirror"


def _by_hand(weights: Weights, path: Path) -> str:
    return f"fetch it from {weights.project.page} with a browser into {path}, or give --from with a mirror's address"
