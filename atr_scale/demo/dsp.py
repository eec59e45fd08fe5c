"""Small building blocks of synthesis: tones, shaped noise, envelopes. Mono float32 [samples], NumPy only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

Array = np.ndarray


def timeline(seconds: float, rate: int) -> Array:
    """Time axis [samples] in seconds."""
    return np.arange(max(1, round(seconds * rate))) / rate


def sine(hertz: Array | float, t: Array) -> Array:
    """A sine whose frequency [samples] (Hz) may move; cycles are wrapped so that float32 keeps its phase."""
    return _wave(_cycles(hertz, t))


def harmonic(hertz: Array | float, t: Array, weights: Sequence[float] | Array) -> Array:
    """Partials k = 1, 2, ... of a moving fundamental (Hz) with the given weights; those above Nyquist are left out."""
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
    return sum(np.exp(-0.5 * (np.log2(partials / c) / width) ** 2) for c in centres) / np.arange(1, count + 1) ** 0.3


def shaped_noise(rng: np.random.Generator, samples: int, rate: int, shape: Callable[[Array], Array]) -> Array:
    """Gaussian noise with the magnitude `shape(frequencies in Hz)`, about unit RMS."""
    length = _fast_length(samples)
    magnitude = shape(_frequencies(length, rate))
    parts = rng.standard_normal((2, len(magnitude)), np.float32)
    parts *= magnitude
    spectrum = np.empty(len(magnitude), np.complex64)
    spectrum.real, spectrum.imag = parts
    out = np.fft.irfft(spectrum, length)[:samples].astype(np.float32, copy=False)
    return out / np.float32(np.sqrt(np.dot(out, out) / samples) + 1e-9)


def band(centre: float, octaves: float) -> Callable[[Array], Array]:
    """Magnitude of a log-Gaussian band around `centre` Hz."""
    return lambda f: np.exp(-0.5 * (np.log2(f / centre) / octaves) ** 2)


def slope(corner: float, power: float) -> Callable[[Array], Array]:
    """Magnitude flat on one side of `corner` Hz: falling as f^-power above it, or (power < 0) rising up to it."""
    return lambda f: np.minimum(1.0, (f / corner) ** -power)


def wander(rng: np.random.Generator, t: Array, hertz: float) -> Array:
    """A smooth random curve in about [-1, 1] that turns around `hertz` times a second."""
    knots = max(3, int(np.ceil(t[-1] * hertz)) + 2)
    return np.interp(t, np.linspace(0, t[-1] + 1e-6, knots), rng.uniform(-1, 1, knots)).astype(np.float32)


def clicks(rng: np.random.Generator, t: Array, hertz: float, grain: Array, regular: float = 0.0) -> Array:
    """`grain` dropped at random times, `hertz` a second on average; regular = 1 makes them evenly spaced."""
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
    return (np.exp(-t / seconds) * np.minimum(1.0, t / 0.002)).astype(np.float32)


def swell(t: Array, power: float = 0.5) -> Array:
    """One arch over the whole length: zero at both ends."""
    return (np.sin(np.pi * (t - t[0]) / (t[-1] - t[0] + 1e-9)) ** power).astype(np.float32)


def pulses(t: Array, hertz: float, width: float, phase: float = 0.0) -> Array:
    """Smooth bumps in [0, 1], `hertz` a second, each `width` of a period wide."""
    turns = t * hertz + phase
    distance = (turns - np.floor(turns) - 0.5).astype(np.float32) / np.float32(0.5 * width)
    return np.exp(np.float32(-0.5) * distance * distance)


def _cycles(hertz: Array | float, t: Array) -> Array:
    if np.ndim(hertz) == 0:
        return float(hertz) * t
    return np.cumsum(hertz) * (t[1] - t[0])


def _fast_length(samples: int) -> int:
    """The next length that is a small multiple of a power of two, which the FFT likes."""
    power = max(1, 1 << max(0, samples.bit_length() - 3))
    return -(-samples // power) * power


@lru_cache(maxsize=64)
def _frequencies(length: int, rate: int) -> Array:
    return np.maximum(np.fft.rfftfreq(length, 1 / rate), 1.0).astype(np.float32)


def _wave(cycles: Array) -> Array:
    return np.sin(np.float32(2 * np.pi) * (cycles - np.floor(cycles)).astype(np.float32))
