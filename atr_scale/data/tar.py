"""Walk a tar by its headers. One walker indexes shards, reads samples and checks shards, so that they always agree.

Members are never extracted to disk. Only the header parser is tarfile's: its reader ends silently at a broken
header in the middle of an archive, which is just what has to be noticed here.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

BLOCK = 512
MAX_SPECIAL_BYTES = 1 << 20
KEY_RULE = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)


class BrokenTar(Exception):
    """A header that is no tar header, or an archive that ends inside a member. `offset` is where the trouble begins."""

    def __init__(self, offset: int, detail: str):
        super().__init__(offset, detail)
        self.offset = offset
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.detail} at byte {self.offset}"


class Member(NamedTuple):
    """A member: bytes [start, stop) from its first header to its padded end, data [data_start, data_start + size).

    `regular`: a plain file; `folder`: a directory entry; neither: a link, a device or worse.
    """

    name: str
    regular: bool
    folder: bool
    start: int
    data_start: int
    size: int
    stop: int


def walk(read: Callable[[int, int], bytes], end: int, start: int = 0) -> Iterator[Member | None]:
    """Members of the archive bytes [start, end), and at last None if the archive's end marker was met.

    `read(start, stop)` gives bytes and never gets a stop beyond `end`. BrokenTar where a header or member is not whole.
    """
    position = first = start
    long_name: str | None = None
    long_size: int | None = None
    while position < end:
        if position + BLOCK > end:
            raise BrokenTar(position, "cut header")
        header = read(position, position + BLOCK)
        if header.count(0) == BLOCK:
            if first != position:
                raise BrokenTar(first, "header extension without a member")
            yield None
            return
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise BrokenTar(position, str(error)) from None
        special = info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE)
        holds_data = special or info.isreg() or info.type not in tarfile.SUPPORTED_TYPES
        data = position + BLOCK
        length = info.size if special or long_size is None else long_size
        stop = data + (-(-length // BLOCK) * BLOCK if holds_data else 0)
        if length < 0 or stop > end:
            raise BrokenTar(first, "cut member" if length >= 0 else "negative size")
        if special:
            if length > MAX_SPECIAL_BYTES:
                raise BrokenTar(position, "oversized header extension")
            if info.type == tarfile.GNUTYPE_LONGNAME:
                long_name = read(data, data + length).split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
            elif info.type == tarfile.XHDTYPE:
                records = _pax_records(read(data, data + length), position)
                long_name = records.get("path", long_name)
                long_size = int(records["size"]) if records.get("size", "").isdigit() else None
                if any(record.startswith("GNU.sparse") for record in records):
                    raise BrokenTar(position, "sparse member")
            position = stop
            if info.type == tarfile.XGLTYPE:
                first = stop
            continue
        regular = info.type in (tarfile.REGTYPE, tarfile.AREGTYPE)
        yield Member(long_name or info.name, regular, info.isdir(), first, data, length if holds_data else 0, stop)
        long_name = long_size = None
        position = first = stop
    if first != position:
        raise BrokenTar(first, "header extension without a member")


def split_key(member: Member) -> tuple[str, str] | None:
    """(sample key, lower-case extension) by webdataset's rule: the extension begins at the basename's first dot.

    None for what no sample is made of: links, devices, folders, dot files, and names that leave the archive.
    """
    match = KEY_RULE.fullmatch(member.name)
    if not member.regular or match is None or member.name.startswith("/") or ".." in member.name.split("/"):
        return None
    return match[1], match[2].lower()


def _pax_records(payload: bytes, offset: int) -> dict[str, str]:
    records = {}
    while payload.strip(b"\0"):
        match = re.match(rb"(\d{1,10}) ([^=]+)=", payload)
        if match is None or not match.end() < int(match[1]) <= len(payload):
            raise BrokenTar(offset, "bad header extension")
        value = payload[match.end() : int(match[1]) - 1]
        records[match[2].decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        payload = payload[int(match[1]) :]
    return records
