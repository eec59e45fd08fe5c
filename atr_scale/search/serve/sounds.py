"""The sounds of the page: parts of clips as WAV with their pictures, and uploads as waveforms."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import PurePath

import numpy as np
import soundfile
import soxr
import torch
from matplotlib import colormaps
from matplotlib.image import imsave
from numpy.typing import NDArray

from atr_scale.data.audio_source import open_audio
from atr_scale.data.decode import decode_source
from atr_scale.data.sample import AUDIO_EXTENSIONS, BadSample
from atr_scale.encoders.front_ends import mel_bank, power_spectrogram

MAX_SECONDS = 300.0  # of a clip that is played; longer ones are indexed in windows
UPLOAD_TYPES = tuple(name for name in AUDIO_EXTENSIONS if name != "pcm")
MAX_UPLOAD_BYTES = 20 << 20
MAX_UPLOAD_SECONDS = 60.0
PEAKS = 480  # columns of a drawn waveform
PICTURE = (96, 640)  # height (mel bands) and largest width of a spectrogram in pixels
PICTURE_RATE = 32_000
RANGE_DB = 70.0  # below the loudest place


class Refused(Exception):
    """An upload that cannot be used. status: of the HTTP answer."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail


@dataclass(frozen=True)
class PlayedPart:
    """The part of a clip that is played. waveform: mono float32 at `rate` Hz. start: in the whole clip, in seconds."""

    waveform: NDArray[np.float32]
    rate: int
    start: float
    wav: bytes

    @classmethod
    def of(cls, waveform: NDArray[np.float32], rate: int, start: float) -> PlayedPart:
        """What follows MAX_SECONDS is left out."""
        waveform = waveform[: round(MAX_SECONDS * rate)]
        file = io.BytesIO()
        soundfile.write(file, np.clip(waveform, -1, 1), rate, format="WAV", subtype="PCM_16")
        return cls(waveform, rate, start, file.getvalue())

    @property
    def seconds(self) -> float:
        return len(self.waveform) / self.rate

    def peaks(self) -> list[tuple[float, float]]:
        """(lowest, highest) sample of each of at most PEAKS parts of equal length."""
        parts = np.array_split(self.waveform, min(PEAKS, len(self.waveform)))
        return [(round(float(part.min()), 4), round(float(part.max()), 4)) for part in parts]

    def spectrogram(self) -> bytes:
        """A PNG picture of the mel spectrogram: time from left to right, frequency upwards, the loudest 70 dB."""
        waveform = self.waveform
        if self.rate > PICTURE_RATE:
            waveform = soxr.resample(waveform, self.rate, PICTURE_RATE, quality="MQ")
        rate = min(self.rate, PICTURE_RATE)
        height, width = PICTURE
        hop = max(rate // 100, len(waveform) // width)
        n_fft = max(1024, 2 ** (hop - 1).bit_length())
        power = power_spectrogram(torch.from_numpy(waveform)[None], n_fft, hop, torch.hann_window(n_fft))[0]
        mel = mel_bank(height, n_fft, rate, 30.0, rate / 2, "slaney") @ power
        decibels = 10 * torch.log10(mel.clamp(min=1e-10)).numpy()
        top = float(decibels.max())
        shades = np.clip((decibels - top + RANGE_DB) / RANGE_DB, 0, 1)
        file = io.BytesIO()
        imsave(file, colormaps["magma"](shades[::-1], bytes=True), format="png")
        return file.getvalue()


def check_type(name: str, content_type: str) -> str:
    """The extension of an upload's name, or "" if only its content type says that it is audio. Raises Refused."""
    extension = PurePath(name).suffix[1:].lower()
    if extension in UPLOAD_TYPES or (not extension and content_type.startswith("audio/")):
        return extension
    raise Refused(415, f"{name or 'the upload'} is no audio file of a known type: give {', '.join(UPLOAD_TYPES)}")


def decode_upload(contents: bytes, extension: str, rate: int) -> NDArray[np.float32]:
    """The upload as mono float32 [samples] at `rate` Hz. Raises Refused if it is too long or cannot be decoded."""
    try:
        source = open_audio(contents, extension)
        seconds = source.frames / source.rate
        if seconds > MAX_UPLOAD_SECONDS:
            raise Refused(413, f"the sound lasts {seconds:.0f} s: give at most {MAX_UPLOAD_SECONDS:.0f} s")
        return decode_source(source, rate)
    except BadSample as error:
        raise Refused(422, f"the sound cannot be used: {error.detail}") from None


def byte_range(header: str | None, size: int) -> tuple[int, int] | None:
    """The bytes [start, stop) that a Range header asks of `size`; None if all, as for several ranges (RFC 9110, 14.2).

    Raises Refused (416) if the range begins after the end.
    """
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", (header or "").replace(" ", ""))
    if found is None or found[0] == "bytes=-":
        return None
    if not found[1]:
        start, stop = max(0, size - int(found[2])), size
    else:
        start, stop = int(found[1]), min(size, int(found[2]) + 1 if found[2] else size)
    if start >= size:
        raise Refused(416, f"the sound has {size} bytes")
    return (start, stop) if start < stop else None
