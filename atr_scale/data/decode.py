"""Audio bytes -> mono waveform at the requested sample rate, with soundfile and soxr (HQ).

A crop is selected before decoding, so that a few seconds of a long recording cost a few milliseconds; of pcm in a
local shard only the crop is read. Samples can be written directly into a row of a batch. 16-bit samples can remain
16-bit: then reading them into the batch is the only work.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import soxr

from atr_scale.data.audio_source import AudioSource, open_audio
from atr_scale.data.sample import BadSample, Bytes


class Crop(NamedTuple):
    """A window of `seconds`. In a longer clip it starts at `start_fraction` (0 to 1) of the possible starts."""

    start_fraction: float
    seconds: float


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
    own. A crop that is silent moves to the clip's loudest sample. Float samples beyond 1 are divided by the largest.

    out: float32 or int16, contiguous and long enough. The samples are written to its beginning, and the result is that
    part of it. Only audio that is stored as 16-bit mono at `sample_rate` fits an int16 `out`; the result for other
    audio is a separate float32 array.

    `pcm_rate` is the rate of headerless `pcm` bytes (little-endian int16, mono) in Hz.

    Raises BadSample with the reason undecodable_audio, empty_audio, huge_audio (over an hour, or over 4 GiB decoded),
    short_audio (less audio than the header says), nonfinite_audio, loud_audio (1e20 and beyond) or silent_audio (all
    samples exactly zero).
    """
    return decode_source(open_audio(audio, extension, pcm_rate), sample_rate, crop=crop, out=out)


def decode_source(
    source: AudioSource, sample_rate: int, *, crop: Crop | None = None, out: np.ndarray | None = None
) -> np.ndarray:
    """`decode` of opened audio."""
    frames, rate = source.frames, source.rate
    start, count = 0, frames
    if crop is not None and frames > round(crop.seconds * rate):
        count = max(1, round(crop.seconds * rate))
        start = int(crop.start_fraction * (frames - count))
    mono = source.read(start, count, out if rate == sample_rate else None)
    if crop is not None and count < frames and _is_silent(mono):
        whole = source.read(0, frames, np.empty(frames, mono.dtype))
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


def _is_silent(mono: np.ndarray) -> bool:
    return not (mono[len(mono) // 2] or mono.any())


def check_waveform(mono: np.ndarray) -> None:
    """Raises BadSample nonfinite_audio or silent_audio (all samples exactly zero)."""
    # The extremes are NaN if a sample is; they need no temporary array, unlike np.isfinite of all samples.
    if mono.dtype != np.int16 and not (np.isfinite(mono.min()) and np.isfinite(mono.max())):
        raise BadSample("nonfinite_audio", "NaN or infinite samples")
    if _is_silent(mono):
        raise BadSample("silent_audio", "all samples are zero")
