"""Headers of audio files are made to say how long the audio is that is there, before a decoder believes them.

A killed recorder, a pipe and a cut download leave lengths of 0, of the largest number, or of the whole; libsndfile then
gives no sample, or silently fewer than the file should have. Where a length lies in the formats: RIFF WAVE and RF64
(EBU Tech 3306), AIFF (Apple, 1989), CAF (Apple), Sony Wave64, Sun AU, FLAC (RFC 9639), Ogg (RFC 3533).
"""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import soundfile

from atr_scale.data.mpeg_audio import CUT_FRAMES, count_frames, skip_id3, with_info_frame

MPEG_IN_WAVE = (0x50, 0x55)  # values of the format tag: MPEG layers I and II, MP3
HUGE = 0x7FFF_0000  # sizes from here on are those of writers that did not know the size
MISCOUNTED = 64  # bytes: some writers count their header, too
MAX_FLAC_FRAMES = (1 << 36) - 1
FLAC_BLOCK = 1 << 16  # samples decoded at once to count them
LAST_PAGE = 4  # flag in the header of an Ogg page
FIRST_PAGE = 2
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


class KnownLength(NamedTuple):
    """Audio whose header says how much there is. `cut` tells what its header promised before, "" if that was right."""

    audio: bytes
    cut: str = ""


class _Layout(NamedTuple):
    """A chunked format: first chunk, bytes of a name and of a size, counted header, alignment, name of the audio."""

    first: int
    name: int
    size: int
    order: Literal["little", "big"]
    counted: int
    align: int
    audio: bytes


_LAYOUTS = {
    b"RIFF": _Layout(12, 4, 4, "little", 0, 2, b"data"),
    b"RF64": _Layout(12, 4, 4, "little", 0, 2, b"data"),
    b"RIFX": _Layout(12, 4, 4, "big", 0, 2, b"data"),
    b"FORM": _Layout(12, 4, 4, "big", 0, 2, b"SSND"),
    b"caff": _Layout(8, 4, 8, "big", 0, 1, b"data"),
    b"riff": _Layout(40, 16, 8, "little", 24, 8, b"data"),
}


def know_length(audio: bytes) -> KnownLength:
    """`audio` with a header that is right about its length; the same bytes if it was right, or if it is not known.

    An MP3 inside a WAV is taken out. What follows the last whole page of an Ogg file is dropped. Raises ValueError or
    soundfile's errors for what libsndfile cannot read.
    """
    magic = audio[:4]
    if magic in _LAYOUTS:
        return _chunked(audio, _LAYOUTS[magic])
    if magic == b".snd":
        return _sun(audio)
    if magic == b"OggS":
        return _ogg(audio)
    tag = skip_id3(audio)
    if audio[tag : tag + 4] == b"fLaC":
        # Only the header is sliced: a slice of a mapped file is a copy, for an hour of FLAC of 500 MB.
        unknown = len(audio) >= tag + 26 and not _flac_frames(audio[tag : tag + 26])
        return KnownLength(recounted_flac(audio[tag:]) if unknown else audio)
    if audio[tag : tag + 4] in (*_LAYOUTS, b"OggS"):
        return know_length(audio[tag:])
    return _mpeg(audio, tag)


def recounted_flac(flac: bytes) -> bytes:
    """`flac` with the number of samples that can be decoded in its header. Raises soundfile's errors."""
    unlimited = _with_flac_frames(flac, MAX_FLAC_FRAMES)
    frames = 0
    with soundfile.SoundFile(io.BytesIO(unlimited)) as file:
        while True:
            # libsndfile reports the end as an error, after it has filled the beginning of the block.
            block = np.full((FLAC_BLOCK, file.channels), np.nan, np.float32)
            with contextlib.suppress(soundfile.SoundFileError):
                file.read(out=block)
            read = FLAC_BLOCK - int(np.isnan(block[:, 0]).sum())
            frames += read
            if read < FLAC_BLOCK:
                return _with_flac_frames(flac, frames)


def _flac_frames(flac: bytes) -> int:
    """Samples of the stream by STREAMINFO, 0 if it does not know."""
    return int.from_bytes(flac[21:26], "big") & MAX_FLAC_FRAMES


def _with_flac_frames(flac: bytes, frames: int) -> bytes:
    field = int.from_bytes(flac[21:26], "big") & ~MAX_FLAC_FRAMES | frames
    return flac[:21] + field.to_bytes(5, "big") + flac[26:]


def _mpeg(audio: bytes, start: int) -> KnownLength:
    count = count_frames(audio, start)
    if count is None or not count.frames:
        return KnownLength(audio)
    if count.plain and count.promised is not None and abs(count.frames - count.promised) <= 1:
        # libsndfile does not open a file behind a tag without content.
        return KnownLength(audio[start:] if start == 10 else audio)
    mended = with_info_frame(audio, count)
    if count.promised is not None and count.frames < count.promised - CUT_FRAMES:
        return KnownLength(mended, f"{count.frames} of {count.promised} MP3 frames")
    return KnownLength(mended)


def _chunks(audio: bytes, layout: _Layout, position: int) -> Iterator[tuple[bytes, int, int]]:
    """(name, first byte of the content, size in the header) of the chunks from `position` on."""
    header = layout.name + layout.size
    while position + header <= len(audio):
        size = int.from_bytes(audio[position + layout.name : position + header], layout.order) - layout.counted
        yield audio[position : position + 4], position + header, size
        if size < 0:
            return
        position += header + size + -(header + size) % layout.align


def _chunked(audio: bytes, layout: _Layout) -> KnownLength:
    format_tag, extended = 0, None
    start = size = 0
    for name, begin, length in _chunks(audio, layout, layout.first):
        if name == b"fmt ":
            format_tag = int.from_bytes(audio[begin : begin + 2], layout.order)
        elif name == b"ds64":
            extended = begin + 8
        elif name == layout.audio:
            start, size = begin, length
            break
    if not start:
        return KnownLength(audio)
    there = len(audio) - start
    field, width = start - layout.size, layout.size
    if extended is not None and audio[:4] == b"RF64":
        field, width = extended, 8
        size = int.from_bytes(audio[field : field + 8], "little")
    limit = HUGE if width == 4 else 1 << 62
    unknown = size >= limit if size > 0 else not _whole_chunks(audio, layout, start)
    whole = unknown or size <= there + MISCOUNTED
    if format_tag in MPEG_IN_WAVE:
        inner = _mpeg(audio[start : start + (there if unknown else size)], 0)
        return inner if whole else inner._replace(cut=inner.cut or f"{there} of {size} bytes")
    if there == 0 or (whole and not unknown):
        return KnownLength(audio)
    mended = bytearray(audio)
    mended[field : field + width] = (there + layout.counted).to_bytes(width, layout.order)
    if audio[:4] in (b"RIFF", b"RIFX", b"FORM"):
        mended[4:8] = min(len(audio) - 8, 0xFFFF_FFFF).to_bytes(4, layout.order)
    elif width == 8 and audio[:4] == b"RF64":
        mended[field - 8 : field] = (len(audio) - 8).to_bytes(8, "little")
        mended[field + 8 : field + 16] = bytes(8)  # samples: counted from the bytes
    return KnownLength(bytes(mended), "" if unknown else f"{there} of {size} bytes")


def _whole_chunks(audio: bytes, layout: _Layout, position: int) -> bool:
    """Whether chunks with readable names fill the rest of the file: then there is no audio in front of them."""
    end = position
    for name, start, size in _chunks(audio, layout, position):
        if size < 0 or not (name.isascii() and name.decode("ascii").isprintable()):
            return False
        end = start + size
    return len(audio) - 1 <= end <= len(audio) + 1


def _sun(audio: bytes) -> KnownLength:
    """Sun AU. 0xFFFFFFFF stands for an unknown size, which libsndfile knows; a killed writer leaves 0."""
    if len(audio) < 24:
        return KnownLength(audio)
    start, size = struct.unpack_from(">II", audio, 4)
    there = len(audio) - start
    if there <= 0 or size == 0xFFFF_FFFF or 0 < size <= there + MISCOUNTED:
        return KnownLength(audio)
    cut = f"{there} of {size} bytes" if 0 < size < HUGE else ""
    return KnownLength(audio[:8] + struct.pack(">I", there) + audio[12:], cut)


def _ogg(audio: bytes) -> KnownLength:
    """Ogg: the length is that of the last page. libsndfile seeks in Opus only if that page is marked as the last.

    Raises ValueError if there are several streams one behind the other, of which libsndfile reads the first.
    """
    position, last, begun = 0, None, False
    while audio[position : position + 4] == b"OggS" and position + 27 <= len(audio):
        segments = audio[position + 26]
        size = 27 + segments + sum(audio[position + 27 : position + 27 + segments])
        if position + 27 + segments > len(audio) or position + size > len(audio):
            break
        first = bool(audio[position + 5] & FIRST_PAGE)
        if first and begun:
            raise ValueError("several Ogg streams, one behind the other")
        begun = not first
        last, position = position, position + size
    if last is None:
        return KnownLength(audio)
    rest = audio[position:]
    cut = f"the last page ends after {len(rest)} bytes" if rest and b"OggS"[: len(rest)] == rest[:4] else ""
    if audio[last + 5] & LAST_PAGE:
        return KnownLength(audio)
    if rest and not cut:  # other bytes between the pages: libsndfile looks for the next page itself
        return KnownLength(audio)
    page = bytearray(audio[last:position])
    page[5] |= LAST_PAGE
    page[22:26] = bytes(4)
    page[22:26] = struct.pack("<I", _ogg_checksum(page))
    return KnownLength(audio[:last] + bytes(page), cut)


def _ogg_checksum(page: bytes | bytearray) -> int:
    """CRC-32 of Ogg: the polynomial of zlib's, with the bits in the opposite order and nothing inverted."""
    crc = zlib.crc32(bytes(page).translate(_REVERSED), 0xFFFF_FFFF) ^ 0xFFFF_FFFF
    return int(f"{crc:032b}"[::-1], 2)
