"""An audio file in memory, open for reading any part of it: through libsndfile, torchcodec, or as headerless pcm.

libsndfile reads what its `available_formats()` lists. For other containers (m4a, mp4, webm, Ogg FLAC) torchcodec is
used if it is installed; it decodes the whole file when it is opened.
"""

from __future__ import annotations

import io
import mmap
import re
from abc import ABC, abstractmethod
from typing import cast

import numpy as np
import soundfile

from atr_scale.batch import FULL_SCALE
from atr_scale.data.audio_length import know_length, recounted_flac
from atr_scale.data.sample import BadSample, Bytes, FileSlice
from atr_scale.errors import one_line

MAX_SECONDS = 3600
MAX_DECODED_BYTES = 4 << 30
MIN_RATE, MAX_RATE = 1000, 768_000
# An MP3 may end a little before the length in its header: that counts whole frames of up to 1152 samples.
MP3_SLACK_FRAMES = 4 * 1152
# A frame of an MP3 needs up to 511 bytes of those before it. libsndfile decodes four of them before a place that it
# seeks; at the lowest bit rates that is not enough, and the crop would begin with silence.
MP3_RESERVOIR, MP3_FRAMES_BEFORE, MP3_MOST_FRAMES = 511, 4, 20
BLOCK = 1 << 15  # samples converted at once: they stay in the processor's cache between two passes
MAX_LEVEL = 1e20  # float samples from here on are not sound; the squares in a spectrum would overflow
MEDIA_SHORTFALL = 0.5  # seconds that a stream may end before the duration of its container, which other streams share


class AudioSource(ABC):
    """Opened audio: `frames` by its mended header, `rate` in Hz, `channels`.

    gain: factor that the samples read so far were scaled by, below 1 for float samples beyond 1. stored: the bytes with
    a header that knows the length; None if libsndfile cannot read them.
    """

    frames: int
    rate: int
    channels: int
    gain: float = 1.0
    stored: bytes | None = None

    @abstractmethod
    def read(self, start: int, count: int, out: np.ndarray | None = None) -> np.ndarray:
        """Frames [start, start + count) with the channels averaged: in `out` if they fit there, else new float32.

        Raises BadSample if they cannot be decoded, are fewer, or lie beyond 1e20.
        """

    def check(self, whole: bool = True) -> None:
        """Raises BadSample empty_audio, undecodable_audio or, if all of it is to be read at once, huge_audio."""
        if self.frames <= 0:
            raise BadSample("empty_audio", "no frames")
        if not MIN_RATE <= self.rate <= MAX_RATE:
            raise BadSample("undecodable_audio", f"sample rate {self.rate} Hz")
        if whole and (self.frames / self.rate > MAX_SECONDS or 4 * self.frames * self.channels > MAX_DECODED_BYTES):
            raise BadSample("huge_audio", f"{self.frames / self.rate:.0f} s, {self.channels} channels")


def open_audio(
    audio: Bytes | mmap.mmap,
    extension: str,
    pcm_rate: int | None = None,
    *,
    keep_cut: bool = False,
    whole: bool = True,
) -> AudioSource:
    """Open audio bytes. `pcm_rate`: rate of headerless `pcm` bytes (little-endian int16, mono) in Hz.

    Of a mapped file libsndfile loads only what is read. A file that is shorter than its header says is refused, or with
    `keep_cut` as long as what is left of it. Audio over an hour is refused if the `whole` of it is to be read at once.
    Raises BadSample undecodable_audio, empty_audio, huge_audio or short_audio.
    """
    if isinstance(audio, mmap.mmap):
        audio = cast(bytes, audio)  # it is sliced and searched like bytes
    if extension == "pcm":
        source: AudioSource = _Pcm(audio, pcm_rate)
    else:
        contents = _bytes(audio)
        try:
            known = know_length(contents)
            if known.cut and not keep_cut:
                raise BadSample("short_audio", known.cut)
            source = _File(known.audio, keep_cut)
        except (soundfile.SoundFileError, TypeError, ValueError) as error:
            source = _media(bytes(contents), extension, _reason(error), keep_cut)
            whole = True  # it is decoded now
    source.check(whole)
    return source


def _bytes(audio: Bytes) -> bytes:
    if not len(audio):
        raise BadSample("empty_audio", "no bytes")
    return audio if isinstance(audio, bytes | mmap.mmap) else bytes(audio)


class _Pcm(AudioSource):
    """Headerless int16; of a file slice only what is read is loaded."""

    channels = 1

    def __init__(self, audio: Bytes, rate: int | None) -> None:
        if rate is None or len(audio) % 2:
            raise BadSample(
                "undecodable_audio", "pcm without a sample rate" if len(audio) % 2 == 0 else "half a sample"
            )
        self.audio, self.frames, self.rate = audio, len(audio) // 2, rate

    def read(self, start: int, count: int, out: np.ndarray | None = None) -> np.ndarray:
        out = np.empty(count, np.float32) if out is None else out[:count]
        if isinstance(self.audio, FileSlice):
            samples = out if out.dtype == np.int16 else np.empty(len(out), np.int16)
            self.audio.read_into(samples.data.cast("B"), 2 * start)
        else:
            samples = np.frombuffer(self.audio, "<i2", len(out), offset=2 * start)
        if out.dtype != np.int16:
            return from_int16(samples, out)
        if samples is not out:
            out[:] = samples
        return out


class _File(AudioSource):
    """What libsndfile reads. Raises soundfile's errors if it cannot."""

    def __init__(self, audio: bytes, keep_cut: bool) -> None:
        self.stored = audio
        self.file = soundfile.SoundFile(audio if isinstance(audio, mmap.mmap) else io.BytesIO(audio))
        if keep_cut and self.file.format == "FLAC" and not self._has_last_frame():
            self.stored = recounted_flac(audio)
            self.file = soundfile.SoundFile(io.BytesIO(self.stored))
        self.frames, self.rate, self.channels = self.file.frames, self.file.samplerate, self.file.channels
        self.lead = _lead(self.frames, self.rate, len(audio)) if self.file.format == "MP3" else 0

    def _has_last_frame(self) -> bool:
        try:
            self.file.seek(max(0, self.file.frames - 1))
            found = len(self.file.read(1))
            self.file.seek(0)
        except soundfile.SoundFileError:
            return False
        return found == 1

    def read(self, start: int, count: int, out: np.ndarray | None = None) -> np.ndarray:
        file, single = self.file, self.channels == 1
        lead = min(start, self.lead)
        start, count = start - lead, count + lead
        if out is not None and (lead or not single or (out.dtype == np.int16 and file.subtype != "PCM_16")):
            out = None
        try:
            if start or (file.seekable() and file.tell()):
                file.seek(start)
            samples: np.ndarray
            if out is not None:
                samples = file.read(out=out[:count])
            else:
                samples = file.read(count, dtype="float32", always_2d=not single)
        except (soundfile.SoundFileError, ValueError, MemoryError) as error:
            raise BadSample("undecodable_audio", _reason(error)) from None
        slack = MP3_SLACK_FRAMES if file.format == "MP3" and start + count >= self.frames - MP3_SLACK_FRAMES else 0
        if len(samples) + slack < count or len(samples) <= lead:
            raise BadSample("short_audio", f"{len(samples) - lead} of {count - lead} frames decoded")
        mono = (samples if single else _mean(samples))[lead:]
        return self._scaled(mono) if file.subtype in ("FLOAT", "DOUBLE") else mono

    def _scaled(self, mono: np.ndarray) -> np.ndarray:
        """Float samples beyond 1 divided by the largest of them: usually they are integers that were not scaled."""
        with np.errstate(invalid="ignore"):
            peak = max(-float(mono.min()), float(mono.max()))
        if np.isfinite(peak) and peak >= MAX_LEVEL:
            raise BadSample("loud_audio", f"a sample of {peak:.2g}")
        if not np.isfinite(peak) or peak <= 1:  # `check_waveform` refuses the former
            return mono
        self.gain = 1 / peak
        mono *= np.float32(self.gain)
        return mono


class Span(AudioSource):
    """The frames [first, first + count) of another source, as far as it has them."""

    def __init__(self, source: AudioSource, first: int, count: int) -> None:
        self.source, self.first, self.frames = source, first, max(0, min(count, source.frames - first))
        self.rate, self.channels = source.rate, source.channels

    def read(self, start: int, count: int, out: np.ndarray | None = None) -> np.ndarray:
        return self.source.read(self.first + start, count, out)


def _lead(frames: int, rate: int, size: int) -> int:
    """Samples to decode before a place in an MP3 of `size` bytes, whose frames may be half as large as on average."""
    samples = 1152 if rate >= 32_000 else 576
    needed = min(2 * MP3_RESERVOIR * frames // (samples * size) + 1, MP3_MOST_FRAMES)
    return needed * samples if needed > MP3_FRAMES_BEFORE else 0


class _Decoded(AudioSource):
    """Audio that was decoded completely: float32 [samples], mono."""

    channels = 1

    def __init__(self, mono: np.ndarray, rate: int) -> None:
        self.mono, self.frames, self.rate = mono, len(mono), rate

    def read(self, start: int, count: int, out: np.ndarray | None = None) -> np.ndarray:
        return self.mono[start : start + count]


def _media(audio: bytes, extension: str, reason: str, keep_cut: bool) -> AudioSource:
    """`audio` through torchcodec. Raises BadSample with `reason` if it is not of a container that torchcodec reads."""
    if not (
        audio[4:8] == b"ftyp"  # mp4, m4a, 3gp, mov
        or audio[:4] in (b"OggS", b"\x1aE\xdf\xa3", b"0&\xb2u", b"ADIF")  # Ogg, webm and mkv, wma, AAC
        or (len(audio) > 1 and audio[0] == 0xFF and audio[1] & 0xF6 == 0xF0)  # AAC with ADTS headers
    ):
        raise BadSample("undecodable_audio", reason)
    try:
        from torchcodec.decoders import AudioDecoder
    except (ImportError, RuntimeError, OSError):  # the latter two: torchcodec is there, but not ffmpeg's libraries
        raise BadSample(
            "undecodable_audio",
            f"libsndfile cannot read this .{extension} ({reason}): `pip install torchcodec==0.13.0` and install ffmpeg",
        ) from None
    try:
        decoder = AudioDecoder(audio)
        promised = decoder.metadata.duration_seconds_from_header or 0.0
        rate = decoder.metadata.sample_rate or 0
        samples = decoder.get_samples_played_in_range(0, MAX_SECONDS + 1)
        channels = samples.data.numpy()  # [channels, samples]
    except (RuntimeError, ValueError, IndexError) as error:
        text = re.sub(r"^.*\.cpp:\d+, ", "", _reason(error))  # without a place in its source
        if "best audio stream is unknown" in text:  # it says that this is a bug, but a video may have no sound
            text = "no audio in it"
        raise BadSample("undecodable_audio", f"torchcodec: {text}") from None
    seconds = channels.shape[1] / rate if rate else 0
    if not keep_cut and seconds < min(promised, MAX_SECONDS) - MEDIA_SHORTFALL:
        raise BadSample("short_audio", f"{seconds:.2f} of {promised:.2f} s decoded")
    return _Decoded(_mean(channels.T), rate)


def _mean(samples: np.ndarray) -> np.ndarray:
    """[frames, channels] averaged over the channels."""
    with np.errstate(invalid="ignore"):  # +inf and -inf average to NaN, which `check_waveform` refuses
        mean: np.ndarray = samples.mean(axis=1)
    return mean


def from_int16(samples: np.ndarray, out: np.ndarray) -> np.ndarray:
    """`out` (float32 [samples]) filled with int16 samples divided by 32768, like libsndfile does."""
    for first in range(0, len(samples), BLOCK):
        part = out[first : first + BLOCK]
        part[:] = samples[first : first + BLOCK]
        part *= FULL_SCALE
    return out


def _reason(error: Exception) -> str:
    if isinstance(error, soundfile.LibsndfileError):  # its text names an address in memory
        return str(error.error_string)
    return one_line(error) or type(error).__name__
