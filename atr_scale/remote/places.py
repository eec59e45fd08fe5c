"""Where a run on S3 lies on this machine.

    SCRATCH/runs/HASH/NAME      the folder that training writes to
    SCRATCH/copies/HASH/NAME    what other commands have downloaded

SCRATCH is the variable ATR_SCALE_SCRATCH, by default ~/.cache/atr-scale; HASH is that of the address, and of the server
that AWS_ENDPOINT_URL names.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from atr_scale.data.storage import is_remote
from atr_scale.errors import UserError
from atr_scale.sections import expanded

SCRATCH = "ATR_SCALE_SCRATCH"


def address_of(location: str | os.PathLike[str]) -> str | None:
    """The s3:// address that a location is, None for a local path.

    UserError for other schemes, and for a key that is no path: its local folder would be outside of its place.
    """
    text = re.sub(r"^s3:/(?!/)", "s3://", os.fspath(location))  # of the slashes a Path keeps one
    if "://" not in text or not is_remote(text):
        return None
    text = text.rstrip("/")
    if odd := {"", ".", ".."}.intersection(text.removeprefix("s3://").split("/")):
        raise UserError(f"{location}: {odd.pop()!r} cannot be a part of the key of a run; give s3://bucket/prefix")
    return text


def run_of(address: str) -> str:
    """The address of the run that an address is of: itself, or that of a run whose checkpoint it is."""
    return re.sub(r"/(checkpoints/step-\d+|best|latest)$", "", address)


def training_folder(location: str) -> Path:
    """The local folder of the run `location`: itself, or the scratch folder of an address."""
    address = address_of(location)
    return Path(location) if address is None else _below("runs", address)


def copy_folder(address: str) -> Path:
    """The local folder for what is downloaded of a run that is only read."""
    return _below("copies", address)


def _below(kind: str, address: str) -> Path:
    given = os.environ.get(SCRATCH)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "atr-scale"
    try:
        root = Path(os.path.abspath(expanded(given))) if given else cache
    except ValueError as error:
        raise UserError(f"{SCRATCH}={given}: {error}") from None
    server = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
    digest = hashlib.blake2b(f"{server} {address}".encode(), digest_size=8).hexdigest()
    return root / kind / digest / address.rpartition("/")[2]
