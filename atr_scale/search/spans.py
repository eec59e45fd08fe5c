"""Reads the clips of a source as waveforms: whole, or cut into windows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from atr_scale.data.audio_source import AudioSource
from atr_scale.data.decode import Crop, decode_source
from atr_scale.data.dropped import DroppedClip
from atr_scale.data.sample import READ_FAULTS, BadSample
from atr_scale.errors import Failure
from atr_scale.search.sources import Recording, SoundSource, span_of
from atr_scale.search.vectors import Item

TAIL = 0.05  # of a window: a shorter rest at the end of a recording has no window of its own
AT_ONCE_BYTES = 2 << 20  # a smaller clip is read by one task, a larger one by tasks of AT_ONCE windows
AT_ONCE = 16

Span = tuple[float, float]  # start and stop in seconds


@dataclass(frozen=True)
class ReadSound:
    """A waveform float32 [samples] at the model's rate. clips and bytes: its share of the source, for the progress.

    cut: the clip is longer than what is read of it.
    """

    item: Item
    waveform: NDArray[np.float32]
    clips: float
    bytes: float
    cut: bool = False


Task = Callable[[], list[ReadSound | DroppedClip]]


class Reader:
    """Reads clips of a source at `rate` Hz: `seconds` of their beginning, or all windows of `windows` seconds."""

    def __init__(self, source: SoundSource, rate: int, seconds: float, windows: float | None) -> None:
        self.source, self.rate, self.seconds, self.windows = source, rate, seconds, windows

    def tasks(self, part: range) -> Iterator[Task]:
        """Functions that threads may call at once, each for a bounded part of the sounds, in their order."""
        for i in part:
            if self.windows is None or self.source.entries[i].size <= AT_ONCE_BYTES:
                yield partial(self._clip, i)
                continue
            try:
                recording = self.source.read(i)
                spans = windows_of(_length(recording.open(whole=False)), self.windows)
            except BadSample as error:
                yield partial(list, [self._dropped(i, error)])
                continue
            for first in range(0, len(spans), AT_ONCE):
                yield partial(self._windows, i, recording, spans[first : first + AT_ONCE], len(spans))

    def _clip(self, i: int) -> list[ReadSound | DroppedClip]:
        try:
            recording = self.source.read(i)
            if self.windows is not None:
                spans = windows_of(_length(recording.open(whole=False)), self.windows)
                return self._windows(i, recording, spans, len(spans))
            source = recording.open()
            waveform = decode_source(source, self.rate, crop=Crop(0.0, self.seconds))
        except BadSample as error:
            return [self._dropped(i, error)]
        item = Item(recording.id, recording.path, captions=recording.captions)
        cut = source.frames > self.seconds * source.rate
        return [ReadSound(item, waveform, 1, self.source.entries[i].size, cut)]

    def _windows(self, i: int, recording: Recording, spans: list[Span], of: int) -> list[ReadSound | DroppedClip]:
        """The windows `spans` of clip `i`, which has `of` windows."""
        found: list[ReadSound | DroppedClip] = []
        source: AudioSource | None = None
        for start, stop in spans:
            item = Item(f"{recording.id}#t={start:.10g},{stop:.10g}", recording.path, start, stop, recording.captions)
            try:
                source = recording.open(whole=False) if source is None else source
                waveform = decode_source(span_of(source, start, stop), self.rate)
            except BadSample as error:
                _refuse_read_faults(item.path, error)
                found.append(DroppedClip(item.id, item.path, error.reason, error.detail))
            else:
                found.append(ReadSound(item, waveform, 1 / of, self.source.entries[i].size / of))
        return found

    def _dropped(self, i: int, error: BadSample) -> DroppedClip:
        entry = self.source.entries[i]
        _refuse_read_faults(entry.path, error)
        return DroppedClip(entry.id or entry.path, entry.path, error.reason, error.detail)


def _refuse_read_faults(path: str, error: BadSample) -> None:
    """Raises Failure for a clip that may be whole: left out now, it would be missing for ever."""
    if error.reason in READ_FAULTS:
        raise Failure(f"{path} cannot be read ({error}): start the same command again; what is done is kept")


def windows_of(length: float, seconds: float) -> list[Span]:
    """The windows of a recording of `length` seconds, each `seconds` long.

    The last one ends with the recording and overlaps the one before it, so that no window is shorter than the others;
    a rest below TAIL of a window has none. A recording that is shorter than a window is one window.
    """
    if length <= seconds:
        return [(0.0, max(0.001, round(length, 3)))]
    starts = [round(k * seconds, 3) for k in range(int(length / seconds + 1e-9))]
    if length - len(starts) * seconds > TAIL * seconds:
        starts.append(round(length - seconds, 3))
    return [(start, round(start + seconds, 3)) for start in starts]


def _length(source: AudioSource) -> float:
    return source.frames / source.rate
