"""Audio bytes -> mono waveform at the requested sample rate, with soundfile and soxr (HQ).

A crop is selected before decoding, so that a few seconds of a long recording cost a few milliseconds; of pcm in a
local shard only the crop is read. Samples can be written directly into a row of a batch. 16-bit samples can remain
16-bit: then reading them into the batch is the only work.
"""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
import soundfile
import soxr

from atr_scale.batch import FULL_SCALE
from atr_scale.data.sample import BadSample, Bytes, FileSlice
from atr_scale.errors import one_line

MAX_SECONDS = 3600
MAX_DECODED_BYTES = 4 << 30
MIN_RATE, MAX_RATE = 1000, 768_000
# The length of an MP3 is an estimate: its header counts whole frames of 1152 samples, and encoders pad both ends.
MP3_SLACK_FRAMES = 4 * 1152
BLOCK = 1 << 15  # samples converted at once: they stay in the processor's cache between two passes


class Crop(NamedTuple):
    """A window of `seconds`. In a longer clip it starts at `start_fraction` (0 to 1) of the possible starts."""

    start_fraction: float
    seconds: float


def probe(audio: Bytes, extension: str, pcm_rate: int | None = None) -> tuple[int, int]:
    """(frames, sample rate in Hz) from the header. Raises BadSample undecodable_audio, empty_audio or huge_audio.

    `pcm_rate` is the rate of headerless `pcm` bytes (little-endian int16, mono) in Hz.
    """
    if extension == "pcm":
        if pcm_rate is None or len(audio) % 2:
            raise BadSample(
                "undecodable_audio", "pcm without a sample rate" if len(audio) % 2 == 0 else "half a sample"
            )
        frames, rate, channels = len(audio) // 2, pcm_rate, 1
    else:
        with _open(audio) as file:
            frames, rate, channels = file.frames, file.samplerate, file.channels
    _check_header(frames, rate, channels)
    return frames, rate


def decode(
    audio: Bytes,
    extension: str,
    sample_rate: int,
    *,
    pcm_rate: int | None = None,
    crop: Crop | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Decode to float32 mono [samples] at `sample_rate` Hz: the whole clip, or a crop of it.

    A clip longer than `crop.seconds` gives exactly round(crop.seconds * sample_rate) samples, a shorter one all of its
    own. A crop that is silent moves to the clip's loudest sample.

    out: float32 or int16, contiguous and long enough. The samples are written to its beginning, and the result is that
    part of it. Only audio that is stored as 16-bit mono at `sample_rate` fits an int16 `out`; the result for other
    audio is a separate float32 array.

    Raises BadSample with the reason undecodable_audio, empty_audio, huge_audio (over an hour, or over 4 GiB decoded),
    short_audio (fewer frames than the header says), nonfinite_audio or silent_audio (all samples exactly zero).
    """
    if extension != "pcm":
        audio = bytes(audio)
    frames, rate = probe(audio, extension, pcm_rate)
    start, count = 0, frames
    if crop is not None and frames > round(crop.seconds * rate):
        count = max(1, round(crop.seconds * rate))
        start = int(crop.start_fraction * (frames - count))
    mono = _read_mono(audio, extension, start, count, frames, out if rate == sample_rate else None)
    if crop is not None and count < frames and _is_silent(mono):
        whole = _read_mono(audio, extension, 0, frames, frames, np.empty(frames, mono.dtype))
        mono = _loudest_window(whole, count, crop.start_fraction)
    check_waveform(mono)
    wanted = count if rate == sample_rate else max(1, round(len(mono) * sample_rate / rate))
    if crop is not None:
        longest = max(1, round(crop.seconds * sample_rate))
        wanted = longest if count < frames else min(wanted, longest)
    if rate != sample_rate:
        mono = soxr.resample(mono, rate, sample_rate, quality="HQ")
        check_waveform(mono)
    # soxr's rounding of the length may differ by a sample; an MP3 may end within its slack.
    mono = mono[:wanted] if len(mono) >= wanted or count == frames else np.pad(mono, (0, wanted - len(mono)))
    if out is None or mono.dtype != out.dtype:
        return np.ascontiguousarray(mono, np.float32)
    if not np.may_share_memory(mono, out):
        out[: len(mono)] = mono
    return out[: len(mono)]


def _loudest_window(whole: np.ndarray, count: int, start_fraction: float) -> np.ndarray:
    """`count` samples of `whole` around the loudest one, which lies at `start_fraction` of the window if possible."""
    loudest = int(np.abs(whole, dtype=np.float32).argmax())
    before = min(int(start_fraction * count), count - 1)
    start = max(0, min(loudest - before, len(whole) - count))
    return whole[start : start + count]


def _open(audio: Bytes) -> soundfile.SoundFile:
    if not len(audio):
        raise BadSample("empty_audio", "no bytes")
    try:
        return soundfile.SoundFile(io.BytesIO(bytes(audio)))
    except (soundfile.SoundFileError, TypeError, ValueError) as error:
        raise BadSample("undecodable_audio", _reason(error)) from None


def _read_mono(
    audio: Bytes, extension: str, start: int, count: int, frames: int, out: np.ndarray | None = None
) -> np.ndarray:
    """Frames [start, start + count) with the channels averaged: in `out` if they fit there, else new float32."""
    if extension == "pcm":
        return _read_pcm(audio, start, np.empty(count, np.float32) if out is None else out[:count])
    with _open(audio) as file:
        single = file.channels == 1
        if out is not None and (not single or (out.dtype == np.int16 and file.subtype != "PCM_16")):
            out = None
        try:
            if start:
                file.seek(start)
            samples: np.ndarray
            if out is not None:
                samples = file.read(out=out[:count])
            else:
                samples = file.read(count, dtype="float32", always_2d=not single)
        except (soundfile.SoundFileError, ValueError, MemoryError) as error:
            raise BadSample("undecodable_audio", _reason(error)) from None
        slack = MP3_SLACK_FRAMES if file.format == "MP3" and start + count >= frames - MP3_SLACK_FRAMES else 0
    if len(samples) + slack < count or len(samples) == 0:
        raise BadSample("short_audio", f"{len(samples)} of {count} frames decoded")
    if single:
        return samples
    with np.errstate(invalid="ignore"):  # +inf and -inf average to NaN, which `check_waveform` refuses
        mean: np.ndarray = samples.mean(axis=1)
    return mean


def _read_pcm(audio: Bytes, start: int, out: np.ndarray) -> np.ndarray:
    """`out` (int16 or float32 [samples]) filled with the samples from `start` on."""
    if isinstance(audio, FileSlice):
        samples = out if out.dtype == np.int16 else np.empty(len(out), np.int16)
        audio.read_into(samples.data.cast("B"), 2 * start)
    else:
        samples = np.frombuffer(audio, "<i2", len(out), offset=2 * start)
    if out.dtype != np.int16:
        return from_int16(samples, out)
    if samples is not out:
        out[:] = samples
    return out


def from_int16(samples: np.ndarray, out: np.ndarray) -> np.ndarray:
    """`out` (float32 [samples]) filled with int16 samples divided by 32768, like libsndfile does."""
    for first in range(0, len(samples), BLOCK):
        part = out[first : first + BLOCK]
        part[:] = samples[first : first + BLOCK]
        part *= FULL_SCALE
    return out


def _check_header(frames: int, rate: int, channels: int) -> None:
    if frames <= 0:
        raise BadSample("empty_audio", "no frames")
    if not MIN_RATE <= rate <= MAX_RATE:
        raise BadSample("undecodable_audio", f"sample rate {rate} Hz")
    if frames / rate > MAX_SECONDS or 4 * frames * channels > MAX_DECODED_BYTES:
        raise BadSample("huge_audio", f"{frames / rate:.0f} s, {channels} channels")


def _is_silent(mono: np.ndarray) -> bool:
    return not (mono[len(mono) // 2] or mono.any())


def check_waveform(mono: np.ndarray) -> None:
    """Raises BadSample nonfinite_audio or silent_audio (all samples exactly zero)."""
    # The extremes are NaN if a sample is; they need no temporary array, unlike np.isfinite of all samples.
    if mono.dtype != np.int16 and not (np.isfinite(mono.min()) and np.isfinite(mono.max())):
        raise BadSample("nonfinite_audio", "NaN or infinite samples")
    if _is_silent(mono):
        raise BadSample("silent_audio", "all samples are zero")


def _reason(error: Exception) -> str:
    return one_line(error) or type(error).__name__
