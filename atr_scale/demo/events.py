"""The demo's event classes and their synthesis; each class sounds different from the others.

A *discrete* class repeats a unit (a bark, a knock) `count` times; a *sustained* class lasts for a given time. Every
class takes a pitch (low, mid, high) and a loudness (soft, loud). A synthesiser is
`voice(rng, t [samples] in seconds, rate in Hz, pitch multiplier) -> float32 [samples]` of any level.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from atr_scale.demo.dsp import (
    Array,
    band,
    clicks,
    decay,
    fade,
    formants,
    harmonic,
    mix,
    pulses,
    release,
    shaped_noise,
    sine,
    slope,
    swell,
    timeline,
    wander,
)

PITCHES = {"low": 0.66, "mid": 1.0, "high": 1.52}
LOUDNESS = {"soft": 0.045, "loud": 0.18}  # RMS of the loudest 50 ms
BACKGROUND_LOUDNESS = {"soft": 0.006, "loud": 0.018}
Voice = Callable[[np.random.Generator, Array, int, float], Array]
Generator = np.random.Generator


@dataclass(frozen=True)
class EventClass:
    """One class. unit and period (onset to onset): seconds; a sustained class has period 0 and max_count 0."""

    voice: Voice
    unit: float = 0.0
    period: float = 0.0
    max_count: int = 0

    @property
    def discrete(self) -> bool:
        return self.max_count > 0

    def seconds(self, count: int) -> float:
        """Longest time that `count` repetitions take, with the irregularity of their rhythm."""
        assert self.discrete and 1 <= count <= self.max_count
        return (count - 1) * self.period * 1.1 + self.unit


# --- animals


def _dog(rng: Generator, t: Array, rate: int, pitch: float) -> Array:
    f = 330 * pitch * (1.25 - 0.9 * (t / t[-1] - 0.25) ** 2)
    voiced = harmonic(f, t, formants(330 * pitch, 14, 750 * pitch**0.5, 1500 * pitch**0.5))
    return (voiced + 0.25 * shaped_noise(rng, len(t), rate, band(1200, 0.8))) * swell(t, 0.7)


def _cat(rng: Generator, t: Array, rate: int, pitch: float) -> Array:
    x = t / t[-1]
    f = 620 * pitch * (0.75 + 0.5 * np.sin(np.pi * x**0.7))
    return harmonic(f, t, [0.5, 0.3, 1.0, 0.6, 0.35, 0.2]) * swell(t, 0.6)


def _bird(rng: Generator, t: Array, rate: int, pitch: float) -> Array:
    x = (t / t[-1] * 2) % 1.0
    notes: Array = np.sin(np.pi * x).astype(np.float32)
    return sine(2900 * pitch * (1 + 0.35 * x), t) * notes


def _frog(rng: Generator, t: Array, rate: int, pitch: float) -> Array:
    return harmonic(900 * pitch, t, [1.0, 0.25]) * pulses(t, 38, 0.35) * swell(t, 0.5)


def _owl(rng: Generator, t: Array, rate: int, pitch: float) -> Array:
    return harmonic(390 * pitch * (1 - 0.08 * t / t[-1]), t, [1.0, 0.06]) * swell(t, 1.0)


def _cricket(rng: Generator, t: Array, rate: int, pitch: float) -> Array:
    chirp = pulses(t, rng.uniform(2.6, 3.2), 0.45) * pulses(t, 32, 0.5)
    return sine(4300 * pitch**0.6, t) * chirp


def _bee(rng: Generator, t: Array, rate: int, pitch: float) -> Array:
    f = 210 * pitch * (1 + 0.07 * wander(rng, t, 3.0))
    return harmonic(f, t, formants(210 * pitch, 12, 600 * pitch, 1400 * pitch, width=0.45)) * (
        1 + 0.4 * wander(rng, t, 2.0)
    )


# --- struck, plucked and broken things


def _bell(rng: Generator, t: Array, rate: int, pitch: float) -> Array:
    partials = zip((0.5, 1.0, 1.19, 1.56, 2.0, 2.66), (0.5, 1.0, 0.7, 0.5, 0.6, 0.35), strict=True)
    return mix(g * sine(1100 * pitch * r, t) * decay(t, 0.55 / r**0.7) for r, g in partials)


def _drum(rng: Generator, t: Array, rate: int, pitch: float) -> Array:
    body = sine(85 * pitch * (1 + 0.9 * np.exp(-t / 0.03)), t) * decay(t, 0.12)
    return body + 0.15 * shaped_noise(rng, len(t), rate, band(400, 1.0)) * decay(t, 0.015)


def _knock(rng: Generator, t: Array, rate: int, pitch: float) -> Array:
    wood: Array = sine(430 * pitch, t) + 0.7 * sine(690 * pitch, t) + 0.3 * sine(1020 * pitch, t)
    return wood * decay(t, 0.022)


def _hammer(rng: Generator, t: Array, rate: int, pitch: float) -> Array:
    ring: Array = sine(2350 * pitch, t) + 0.8 * sine(3710 * pitch, t) + 0.5 * sine(5230 * pitch**0.5, t)
    hiss: Array = 0.8 * shaped_noise(rng, len(t), rate, band(2500, 1.2)) * decay(t, 0.008)
    return ring * decay(t, 0.09) + hiss


def _guitar(rng: Generator, t: Array, rate: int, pitch: float) -> Array:
    f = 220 * pitch
    return mix(sine(f * k, t) * decay(t, 0.5 / k**0.6) * np.float32(1 / k) for k in (1, 2, 3, 4, 5, 7))


def _glass(rng: Generator, t: Array, rate: int, pitch: float) -> Array:
    crash = shaped_noise(rng, len(t), rate, band(5200 * pitch**0.4, 0.5)) * decay(t, 0.07)
    shards = mix(sine(f, t) * decay(t, 0.14) for f in 4300 * pitch**0.5 * rng.uniform(0.8, 1.5, 5))
    tinkle = clicks(rng, t, 30, sine(4800 * pitch**0.4, t[: rate // 60]) * decay(t[: rate // 60], 0.004))
    return crash + 0.25 * shards + 0.5 * tinkle * decay(t, 0.35)


def _clap(rng: Generator, t: Array, rate: int, pitch: float) -> Array:
    return shaped_noise(rng, len(t), rate, band(1500 * pitch, 0.75)) * (decay(t, 0.012) + 0.15 * decay(t, 0.06))


def _footstep(rng: Generator, t: Array, rate: int, pitch: float) -> Array:
    thud = shaped_noise(rng, len(t), rate, band(150 * pitch, 0.6)) * decay(t, 0.03)
    gravel = shaped_noise(rng, len(t), rate, band(3400 * pitch**0.5, 0.5)) * swell(t, 1.5)
    return thud + 0.35 * gravel


def _drop(rng: Generator, t: Array, rate: int, pitch: float) -> Array:
    return sine(620 * pitch * (1 + 2.2 * (t / t[-1]) ** 1.5), t) * decay(t, 0.05)


# --- signals


def _horn(rng: Generator, t: Array, rate: int, pitch: float) -> Array:
    weights = [1.0, 0.9, 0.8, 0.6, 0.5, 0.35, 0.25, 0.2]
    chord = harmonic(415 * pitch, t, weights) + harmonic(525 * pitch, t, weights)
    return chord * fade(t, 0.02)


def _whistle(rng: Generator, t: Array, rate: int, pitch: float) -> Array:
    trill: Array = 0.5 + 0.5 * np.sin(2 * np.pi * 26 * t)
    breath: Array = 0.12 * shaped_noise(rng, len(t), rate, band(2300 * pitch, 0.2))
    return (sine(2250 * pitch * (1 + 0.05 * trill), t) + breath) * (0.35 + 0.65 * trill) * swell(t, 0.3)


def _beep(rng: Generator, t: Array, rate: int, pitch: float) -> Array:
    return harmonic(1000 * pitch, t, [1.0, 0.0, 0.33, 0.0, 0.2, 0.0, 0.14]) * fade(t, 0.004)


def _telephone(rng: Generator, t: Array, rate: int, pitch: float) -> Array:
    hammered = pulses(t, 21, 0.45)
    ring: Array = sine(1320 * pitch, t) + 0.8 * sine(1690 * pitch, t) + 0.5 * sine(2960 * pitch, t)
    return ring * hammered * release(t, 0.05)


def _siren(rng: Generator, t: Array, rate: int, pitch: float) -> Array:
    sweep = 0.5 - 0.5 * np.cos(2 * np.pi * (0.75 * t + rng.uniform()))
    return harmonic(560 * pitch * (1 + 0.9 * sweep), t, [1.0, 0.5, 0.3, 0.12])


def _zap(rng: Generator, t: Array, rate: int, pitch: float) -> Array:
    return harmonic(3600 * pitch * np.exp(-t / t[-1] * 2.6), t, [1.0, 0.4]) * swell(t, 0.3)


# --- weather, water and fire


def _thunder(rng: Generator, t: Array, rate: int, pitch: float) -> Array:
    rumble = shaped_noise(rng, len(t), rate, band(75 * pitch, 1.1))
    crack = shaped_noise(rng, len(t), rate, slope(900 * pitch, 1.0)) * decay(t, 0.12)
    return (rumble * (1 + 0.7 * wander(rng, t, 7)) + 0.9 * crack) * decay(t, 0.7)


def _rain(rng: Generator, t: Array, rate: int, pitch: float) -> Array:
    hiss = shaped_noise(rng, len(t), rate, band(5000 * pitch**0.5, 1.0))
    grain = decay(timeline(0.004, rate), 0.001) * shaped_noise(rng, rate // 250, rate, slope(3000, -1.0))
    return hiss + 0.6 * clicks(rng, t, 60, grain)


def _wind(rng: Generator, t: Array, rate: int, pitch: float) -> Array:
    gust = wander(rng, t, 0.8)
    low = shaped_noise(rng, len(t), rate, band(320 * pitch, 0.3))
    high = shaped_noise(rng, len(t), rate, band(560 * pitch, 0.2))
    return low * (0.6 - 0.4 * gust) + high * (0.5 + 0.5 * gust)


def _waves(rng: Generator, t: Array, rate: int, pitch: float) -> Array:
    surge = pulses(t, 0.45, 0.45, rng.uniform()) + 0.12
    return shaped_noise(rng, len(t), rate, band(1100 * pitch, 1.3)) * surge


def _stream(rng: Generator, t: Array, rate: int, pitch: float) -> Array:
    short = timeline(0.045, rate)
    bubbles = (sine(f * (1 + 6 * short), short) * swell(short, 1.0) for f in 850 * pitch * np.array([1.0, 1.35, 1.8]))
    bubbling = mix(clicks(rng, t, 14, bubble) for bubble in bubbles)
    return bubbling + 0.25 * shaped_noise(rng, len(t), rate, band(1300 * pitch, 0.6))


def _fire(rng: Generator, t: Array, rate: int, pitch: float) -> Array:
    snap = shaped_noise(rng, rate // 120, rate, band(2600 * pitch, 0.9)) * decay(
        timeline(1 / 120, rate)[: rate // 120], 0.0015
    )
    return clicks(rng, t, 22, snap) + 0.1 * shaped_noise(rng, len(t), rate, band(160 * pitch, 0.9))


# --- machines and people


def _engine(rng: Generator, t: Array, rate: int, pitch: float) -> Array:
    f = 58 * pitch * (1 + 0.03 * wander(rng, t, 1.5))
    firing = 0.65 + 0.35 * sine(f / 2, t)
    return harmonic(f, t, [1.0, 0.9, 0.7, 0.6, 0.35, 0.3, 0.2, 0.15, 0.1, 0.08]) * firing


def _helicopter(rng: Generator, t: Array, rate: int, pitch: float) -> Array:
    chop = pulses(t, 11 * pitch**0.4, 0.3)
    return shaped_noise(rng, len(t), rate, slope(220 * pitch, 1.2)) * (0.08 + chop)


def _train(rng: Generator, t: Array, rate: int, pitch: float) -> Array:
    steam = shaped_noise(rng, len(t), rate, band(750 * pitch, 0.45)) * pulses(t, 4.2, 0.35)
    clack = shaped_noise(rng, len(t), rate, band(2200 * pitch, 0.3)) * pulses(t, 2.1, 0.06, 0.3)
    return steam + 1.2 * clack


def _saw(rng: Generator, t: Array, rate: int, pitch: float) -> Array:
    stroke = pulses(t, 2.6, 0.5)
    teeth: Array = 0.6 + 0.4 * np.sin(2 * np.pi * 130 * t).astype(np.float32)
    return shaped_noise(rng, len(t), rate, band(3300 * pitch**0.7, 0.35)) * stroke * teeth


def _vacuum(rng: Generator, t: Array, rate: int, pitch: float) -> Array:
    whine = harmonic(245 * pitch, t, [0.8, 0.5, 0.6, 0.3, 0.25, 0.2, 0.15, 0.1])
    return whine + 0.8 * shaped_noise(rng, len(t), rate, band(1500 * pitch**0.5, 1.2))


def _keyboard(rng: Generator, t: Array, rate: int, pitch: float) -> Array:
    short = timeline(0.03, rate)
    key = shaped_noise(rng, len(short), rate, band(1900 * pitch, 0.35)) * decay(short, 0.005)
    return clicks(rng, t, 7, key + 0.5 * sine(780 * pitch, short) * decay(short, 0.006), regular=0.6)


def _clock(rng: Generator, t: Array, rate: int, pitch: float) -> Array:
    ticking = (sine(2900 * pitch**0.8, t[: rate // 25]) + 0.6 * sine(4700 * pitch**0.5, t[: rate // 25])) * decay(
        t[: rate // 25], 0.006
    )
    return clicks(rng, t, 3.0, ticking, regular=1.0)


EVENTS: dict[str, EventClass] = {
    "dog": EventClass(_dog, 0.26, 0.5, 5),
    "cat": EventClass(_cat, 0.7, 1.0, 3),
    "bird": EventClass(_bird, 0.24, 0.42, 5),
    "frog": EventClass(_frog, 0.34, 0.6, 5),
    "owl": EventClass(_owl, 0.5, 0.8, 4),
    "bell": EventClass(_bell, 1.1, 0.95, 3),
    "drum": EventClass(_drum, 0.4, 0.45, 5),
    "knock": EventClass(_knock, 0.15, 0.34, 5),
    "hammer": EventClass(_hammer, 0.35, 0.55, 5),
    "guitar": EventClass(_guitar, 0.9, 0.7, 4),
    "glass": EventClass(_glass, 0.6, 1.0, 2),
    "clap": EventClass(_clap, 0.2, 0.4, 5),
    "footstep": EventClass(_footstep, 0.16, 0.5, 5),
    "drop": EventClass(_drop, 0.16, 0.45, 5),
    "horn": EventClass(_horn, 0.6, 0.85, 3),
    "whistle": EventClass(_whistle, 0.6, 0.85, 3),
    "beep": EventClass(_beep, 0.2, 0.42, 5),
    "telephone": EventClass(_telephone, 0.8, 1.1, 3),
    "zap": EventClass(_zap, 0.35, 0.55, 5),
    "thunder": EventClass(_thunder, 1.6, 1.5, 2),
    "cricket": EventClass(_cricket),
    "bee": EventClass(_bee),
    "siren": EventClass(_siren),
    "rain": EventClass(_rain),
    "wind": EventClass(_wind),
    "waves": EventClass(_waves),
    "stream": EventClass(_stream),
    "fire": EventClass(_fire),
    "engine": EventClass(_engine),
    "helicopter": EventClass(_helicopter),
    "train": EventClass(_train),
    "saw": EventClass(_saw),
    "vacuum": EventClass(_vacuum),
    "keyboard": EventClass(_keyboard),
    "clock": EventClass(_clock),
}
BACKGROUNDS = ("rain", "wind", "waves", "stream", "cricket", "fire")


def synthesise(
    rng: Generator, label: str, rate: int, *, pitch: str = "mid", level: float, count: int = 0, seconds: float = 0.0
) -> Array:
    """One event as float32 [samples] at `rate` Hz whose loudest 50 ms have the RMS `level`.

    A discrete class takes `count`, its repetitions, from which its length follows; a sustained one takes `seconds`.
    """
    event = EVENTS[label]
    multiplier = PITCHES[pitch] * rng.uniform(0.96, 1.04)
    if event.discrete:
        out: Array = np.zeros(round(event.seconds(count) * rate), np.float32)
        unit = timeline(event.unit, rate)
        envelope = release(unit, 0.03)
        period = event.period * rng.uniform(0.9, 1.0)
        for k in range(count):
            onset = round(max(0.0, k * period + event.period * (rng.uniform(0, 0.1) if k else 0.0)) * rate)
            sound = event.voice(rng, unit, rate, multiplier * rng.uniform(0.99, 1.01)) * envelope
            out[onset : onset + len(unit)] += sound[: len(out) - onset] * np.float32(rng.uniform(0.85, 1.0))
    else:
        t = timeline(seconds, rate)
        out = event.voice(rng, t, rate, multiplier).astype(np.float32) * fade(t, 0.08)
    return out * np.float32(level / (_loudest(out, rate) + 1e-9))


def _loudest(signal: Array, rate: int) -> float:
    frame = rate // 20
    padded = np.pad(signal, (0, -len(signal) % frame))
    return float(np.sqrt(np.mean(padded.reshape(-1, frame) ** 2, axis=1).max()))
