"""Walk a tar by its headers. Indexing, reading and checking use the same walker, so they always agree.

Members are never extracted to disk. tarfile is not used because its reader ends silently at a broken header in the
middle of an archive, the very fault that must be noticed here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

BLOCK = 512
PADDING_BYTES = 1 << 16  # read at once behind the end marker
MAX_SPECIAL_BYTES = 1 << 20
OLD_FILE = b"\0"  # a file before POSIX; also a folder, if its name ends in a slash
REGULAR = (b"0", OLD_FILE)
FOLDER = b"5"
DATALESS = (b"1", b"2", b"3", b"4", FOLDER, b"6")  # links, devices, folder, pipe
LONG_NAME, PAX, PAX_GLOBAL = b"L", b"x", b"g"
SPECIAL = (LONG_NAME, b"K", PAX, PAX_GLOBAL)
KEY_RULE = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)


class BrokenTar(Exception):
    """A header that is not a tar header, or an archive that ends inside a member. `offset` is the first bad byte."""

    def __init__(self, offset: int, detail: str):
        super().__init__(offset, detail)
        self.offset = offset
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.detail} at byte {self.offset}"


class Member(NamedTuple):
    """A member: bytes [start, stop) from its first header to its padded end, with data [data_start, data_start + size).

    `regular`: a plain file; `folder`: a directory entry; neither: a link, a device or an unknown type.
    """

    name: str
    regular: bool
    folder: bool
    start: int
    data_start: int
    size: int
    stop: int


def walk(read: Callable[[int, int], bytes], end: int) -> Iterator[Member | None]:
    """Members of the archive bytes [0, end), and finally None if the archive has its end marker.

    `read(start, stop)` returns bytes; it is never called with a stop beyond `end`. Raises BrokenTar if a header or a
    member is not whole, or if something follows the end marker, as in a file of two archives.
    """
    position = first = 0
    long_name: str | None = None
    long_size: int | None = None
    while position < end:
        if position + BLOCK > end:
            raise BrokenTar(position, "cut header")
        header = read(position, position + BLOCK)
        if not any(header):
            if first != position:
                raise BrokenTar(first, "header extension without a member")
            _refuse_more(read, position, end)
            yield None
            return
        name, kind, length = _parse_header(header, position)
        if kind == OLD_FILE and (long_name or name).endswith("/"):
            kind = FOLDER
        special = kind in SPECIAL
        if long_size is not None and not special:
            length = long_size
        holds_data = kind not in DATALESS
        data = position + BLOCK
        stop = data + (-(-length // BLOCK) * BLOCK if holds_data else 0)
        if length < 0 or stop > end:
            raise BrokenTar(first, "cut member" if length >= 0 else "negative size")
        if special:
            if length > MAX_SPECIAL_BYTES:
                raise BrokenTar(position, "oversized header extension")
            if kind == LONG_NAME:
                long_name = read(data, data + length).split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
            elif kind == PAX:
                records = _pax_records(read(data, data + length), position)
                long_name = records.get("path", long_name)
                long_size = int(records["size"]) if re.fullmatch(r"[0-9]{1,18}", records.get("size", "")) else None
                if any(record.startswith("GNU.sparse") for record in records):
                    raise BrokenTar(position, "sparse member")
            position = stop
            if kind == PAX_GLOBAL:
                first = stop
            continue
        size = length if holds_data else 0
        yield Member(long_name or name, kind in REGULAR, kind == FOLDER, first, data, size, stop)
        long_name = long_size = None
        position = first = stop
    if first != position:
        raise BrokenTar(first, "header extension without a member")


def _refuse_more(read: Callable[[int, int], bytes], start: int, end: int) -> None:
    """Raises BrokenTar if there is anything but zeros from the end marker on: tar pads its files with them."""
    for position in range(start, end, PADDING_BYTES):
        rest = read(position, min(position + PADDING_BYTES, end)).lstrip(b"\0")
        if rest:
            offset = min(position + PADDING_BYTES, end) - len(rest)
            raise BrokenTar(offset, "more data, perhaps a second archive, behind the end marker")


def split_key(member: Member) -> tuple[str, str] | None:
    """(sample key, lower-case extension) by webdataset's rule: the extension begins at the basename's first dot.

    None for members that cannot be part of a sample: links, devices, folders, dot files, and names that leave the
    archive.
    """
    match = KEY_RULE.fullmatch(member.name)
    if not member.regular or match is None or member.name.startswith("/") or ".." in member.name.split("/"):
        return None
    return match[1], match[2].lower()


def _parse_header(header: bytes, offset: int) -> tuple[str, bytes, int]:
    """(name, type, size) of a v7, ustar, GNU or pax header. Raises BrokenTar if the checksum does not fit."""
    try:
        stated, size = _number(header[148:156]), _number(header[124:136])
    except ValueError:
        raise BrokenTar(offset, "no tar header") from None
    # The checksum counts its own field as eight spaces. Most bytes of a header are zeros, which need not be summed.
    if stated != sum(header.translate(None, b"\0")) - sum(header[148:156]) + 8 * 32:
        raise BrokenTar(offset, "bad header checksum")
    name, kind = header[:100].partition(b"\0")[0], header[156:157]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    return name.decode("utf-8", "surrogateescape"), kind, size


def _number(field: bytes) -> int:
    """Octal digits, or base 256 if the first bit is set."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big", signed=field[0] == 0xFF)
    return int(field.partition(b"\0")[0].strip() or b"0", 8)


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
