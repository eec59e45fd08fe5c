"""Building blocks of synthesis: tones, shaped noise, envelopes. Signals are mono float32 [samples]."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]


def timeline(seconds: float, rate: int) -> Array:
    """Time axis [samples] in seconds."""
    return np.arange(max(1, round(seconds * rate))) / rate


def sine(hertz: Array | float, t: Array) -> Array:
    """A sine of fixed or moving frequency (Hz, scalar or [samples]); cycles are wrapped to keep float32 precision."""
    return _wave(_cycles(hertz, t))


def harmonic(hertz: Array | float, t: Array, weights: Sequence[float] | Array) -> Array:
    """Partials k = 1, 2, ... of a fundamental (Hz, scalar or [samples]) with these weights, up to the Nyquist rate."""
    cycles = _cycles(hertz, t)
    limit = 0.48 / (t[1] - t[0]) / float(np.max(hertz))
    out = np.zeros(len(t), np.float32)
    for k, weight in enumerate(weights, start=1):
        if k < limit and weight > 1e-3:
            out += np.float32(weight) * _wave(cycles * k)
    return out


def formants(hertz: float, count: int, *centres: float, width: float = 0.3) -> Array:
    """Weights of `count` partials of `hertz` with log-Gaussian formants (width in octaves) at `centres` (Hz)."""
    partials = hertz * np.arange(1, count + 1)
    weights: Array = mix(np.exp(-0.5 * (np.log2(partials / c) / width) ** 2) for c in centres)
    return weights / np.arange(1, count + 1) ** 0.3


def mix(sounds: Iterable[Array]) -> Array:
    """The sum of sounds of equal length."""
    return reduce(operator.add, sounds)


def shaped_noise(rng: np.random.Generator, samples: int, rate: int, shape: Callable[[Array], Array]) -> Array:
    """Gaussian noise with the spectral magnitude `shape(frequencies in Hz)` and about unit RMS."""
    length = _fast_length(samples)
    magnitude = shape(_frequencies(length, rate))
    parts = rng.standard_normal((2, len(magnitude)), np.float32)
    parts *= magnitude
    spectrum = np.empty(len(magnitude), np.complex64)
    spectrum.real, spectrum.imag = parts
    out = np.fft.irfft(spectrum, length)[:samples].astype(np.float32, copy=False)
    return out / np.float32(np.sqrt(np.dot(out, out) / samples) + 1e-9)


def band(centre: float, octaves: float) -> Callable[[Array], Array]:
    """Magnitude of a log-Gaussian band around `centre` Hz, as a function of frequency."""
    return lambda f: np.exp(-0.5 * (np.log2(f / centre) / octaves) ** 2)


def slope(corner: float, power: float) -> Callable[[Array], Array]:
    """Magnitude that falls as f^-power above `corner` Hz, or (power < 0) rises up to it, and is flat beyond."""
    return lambda f: np.minimum(1.0, (f / corner) ** -power)


def wander(rng: np.random.Generator, t: Array, hertz: float) -> Array:
    """A piecewise linear random curve in [-1, 1] with `hertz` knots per second."""
    knots = max(3, int(np.ceil(t[-1] * hertz)) + 2)
    return np.interp(t, np.linspace(0, t[-1] + 1e-6, knots), rng.uniform(-1, 1, knots)).astype(np.float32)


def clicks(rng: np.random.Generator, t: Array, hertz: float, grain: Array, regular: float = 0.0) -> Array:
    """`grain` repeated at random times, `hertz` per second on average; regular = 1 makes them evenly spaced."""
    rate = 1 / (t[1] - t[0])
    steps = (1 - regular) * rng.exponential(1.0, int(len(t) / rate * hertz * 2) + 4) + regular
    at = (np.cumsum(steps) / hertz * rate).astype(int)
    at = at[at < len(t)]
    train = np.zeros(len(t) + len(grain), np.float32)
    for start, gain in zip(at, rng.uniform(0.4, 1.0, len(at)), strict=True):
        train[start : start + len(grain)] += np.float32(gain) * grain
    return train[: len(t)]


def decay(t: Array, seconds: float) -> Array:
    """exp(-t / seconds) after a 2 ms attack."""
    envelope: Array = (np.exp(-t / seconds) * np.minimum(1.0, t / 0.002)).astype(np.float32)
    return envelope


def swell(t: Array, power: float = 0.5) -> Array:
    """One arch over the whole length: zero at both ends."""
    envelope: Array = (np.sin(np.pi * (t - t[0]) / (t[-1] - t[0] + 1e-9)) ** power).astype(np.float32)
    return envelope


def fade(t: Array, seconds: float) -> Array:
    """1, with linear ramps of `seconds` from and to 0 at both ends."""
    envelope: Array = np.minimum(1.0, np.minimum(t, t[-1] - t) / seconds).astype(np.float32)
    return envelope


def release(t: Array, seconds: float) -> Array:
    """1, with a linear ramp of `seconds` to 0 at the end."""
    envelope: Array = np.minimum(1.0, (t[-1] - t) / seconds).astype(np.float32)
    return envelope


def pulses(t: Array, hertz: float, width: float, phase: float = 0.0) -> Array:
    """Gaussian bumps in [0, 1], `hertz` per second, each `width` of a period wide."""
    turns = t * hertz + phase
    distance = (turns - np.floor(turns) - 0.5).astype(np.float32) / np.float32(0.5 * width)
    bumps: Array = np.exp(np.float32(-0.5) * distance * distance)
    return bumps


def _cycles(hertz: Array | float, t: Array) -> Array:
    if np.ndim(hertz) == 0:
        return float(hertz) * t
    cycles: Array = np.cumsum(hertz) * (t[1] - t[0])
    return cycles


def _fast_length(samples: int) -> int:
    """The next length that is a small multiple of a power of two, for a fast FFT."""
    power = max(1, 1 << max(0, samples.bit_length() - 3))
    return -(-samples // power) * power


@lru_cache(maxsize=64)
def _frequencies(length: int, rate: int) -> Array:
    frequencies: Array = np.maximum(np.fft.rfftfreq(length, 1 / rate), 1.0).astype(np.float32)
    return frequencies


def _wave(cycles: Array) -> Array:
    wave: Array = np.sin(np.float32(2 * np.pi) * (cycles - np.floor(cycles)).astype(np.float32))
    return wave
