"""MP3 streams: their frames are counted, because an MP3 without a Xing or Info frame does not say how long it is.

libsndfile guesses the length of such a file from its size and first bit rate, and reads no sample beyond the guess: of
a variable bit rate it loses up to most of the clip. The count is written into an Info frame before the stream.
Formats: ISO/IEC 11172-3 and 13818-3 (frame headers), the Xing and VBRI headers, https://id3.org/id3v2.4.0-structure.
"""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

# kbit/s by the index in the frame header, for (MPEG-1, layer)
_LOW = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
BIT_RATES = {
    (True, 1): tuple(range(32, 449, 32)),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): _LOW,
    (False, 3): _LOW,
}
MPEG_RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}  # Hz, by version
CUT_FRAMES = 3  # a stream that lacks more frames than this is cut; encoders count the first or the last one differently
SYNC = re.compile(rb"\xff[\xe2-\xff][\x10-\xef]")  # what every frame begins with
SEARCHED = 1 << 16  # bytes in which the first frame is looked for


class _Header(NamedTuple):
    """A frame header: bytes of the frame; what all frames of a stream have in common: version, layer and rate in Hz."""

    size: int
    version: int
    layer: int
    rate: int


class FrameCount(NamedTuple):
    """Whole frames of a stream without its Xing, Info or VBRI frame, their bytes, and how many that frame promises.

    promised: None without such a frame. start: first byte of the stream. plain: nothing lies between the frames.
    """

    frames: int
    spans: list[tuple[int, int]]
    promised: int | None
    start: int
    plain: bool


def _header(three: bytes) -> _Header | None:
    """The header that begins with these bytes, or None if they begin none. Free bit rates are not known."""
    if len(three) < 3 or three[0] != 0xFF or three[1] < 0xE0:
        return None
    version, layer = three[1] >> 3 & 3, 4 - (three[1] >> 1 & 3)
    bit_rate, rate, padding = three[2] >> 4, three[2] >> 2 & 3, three[2] >> 1 & 1
    if version == 1 or layer == 4 or bit_rate in (0, 15) or rate == 3:
        return None
    kbits, hertz = BIT_RATES[version == 3, layer][bit_rate - 1], MPEG_RATES[version][rate]
    if layer == 1:
        return _Header(4 * (12_000 * kbits // hertz + padding), version, layer, hertz)
    factor = 72_000 if layer == 3 and version != 3 else 144_000
    return _Header(factor * kbits // hertz + padding, version, layer, hertz)


def skip_id3(audio: bytes) -> int:
    """Bytes of the ID3v2 tags at the beginning."""
    position = 0
    while audio[position : position + 3] == b"ID3" and len(audio) >= position + 10:
        size = 0
        for byte in audio[position + 6 : position + 10]:
            size = size << 7 | byte & 0x7F
        position += 10 + size + (10 if audio[position + 5] & 0x10 else 0)
    return min(position, len(audio))


def count_frames(audio: bytes, start: int = 0) -> FrameCount | None:
    """Count the frames of an MPEG audio stream that begins at `start` or soon after it. None if there is none."""
    position = _next_frame(audio, start, min(len(audio), start + SEARCHED), None, 3)
    if position is None:
        return None
    first = _header(audio[position : position + 3])
    assert first is not None
    promised, skipped = _promised(audio[position : position + first.size], first)
    begin = position
    position += first.size if skipped else 0
    spans, frames, plain, end = [], 0, True, len(audio)
    sizes = dict[bytes, int]()  # bytes of a frame by the beginning of its header, for the headers of this stream
    while True:
        span = position
        while True:
            three = audio[position : position + 3]
            if (size := sizes.get(three)) is None:
                header = _header(three)
                if header is None or header[1:] != first[1:]:
                    break
                size = sizes[three] = header.size
            if position + size > end:
                break
            position += size
            frames += 1
        if position > span:
            spans.append((span, position))
        following = _next_frame(audio, position + 1, end, first, 2)
        if following is None:
            return FrameCount(frames, spans, promised, begin, plain)
        position, plain = following, False


def with_info_frame(audio: bytes, count: FrameCount) -> bytes:
    """The stream alone, with an Info frame that has its number of frames; only without tags if it is not layer III."""
    stream = b"".join(audio[start:stop] for start, stop in count.spans)
    first = _header(stream[:3])
    if first is None or first.layer != 3:
        return stream
    # Of the lowest bit rate at which the fields fit, without padding and without a checksum.
    for index in range(1, 15):
        head = bytes([0xFF, stream[1] | 1, index << 4 | stream[2] & 0x0C, stream[3]])
        header, side = _header(head[:3]), _side_bytes(head)
        if header is not None and header.size >= 4 + side + 16:
            fields = struct.pack(">4sIII", b"Info", 3, count.frames, len(stream) + header.size)
            return (head + bytes(side) + fields).ljust(header.size, b"\0") + stream
    return stream


def _side_bytes(frame: bytes) -> int:
    """Bytes between the header and the Xing field: the side information of layer III."""
    mono = frame[3] >> 6 == 3
    return (17 if mono else 32) if frame[1] >> 3 & 3 == 3 else (9 if mono else 17)


def _promised(frame: bytes, header: _Header) -> tuple[int | None, bool]:
    """(number of frames that this first frame promises, whether it is a Xing, Info or VBRI frame)."""
    if header.layer != 3 or len(frame) < 4:
        return None, False
    at = 4 + _side_bytes(frame)
    if frame[at : at + 4] in (b"Xing", b"Info") and len(frame) >= at + 12:
        flags, frames = struct.unpack_from(">II", frame, at + 4)
        return (frames if flags & 1 else None), True
    if frame[36:40] == b"VBRI" and len(frame) >= 54:
        return int(struct.unpack_from(">I", frame, 50)[0]), True
    return None, False


def _next_frame(audio: bytes, start: int, end: int, like: _Header | None, needed: int) -> int | None:
    """The first byte from `start` on where `needed` frames of one kind follow each other, or fewer at the end."""
    for match in SYNC.finditer(audio, start, end):
        at, kind, found = match.start(), like, 0
        while found < needed and (header := _header(audio[at : at + 3])) and (kind is None or header[1:] == kind[1:]):
            at, kind, found = at + header.size, header, found + 1
        if found == needed or (found and at == len(audio)):
            return match.start()
    return None
