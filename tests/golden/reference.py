"""Weights and waveforms of the golden files, rebuilt from their rules, and the comparison with the stored outputs.

Weights depend on the entry's name alone: PCG64 seeded by sha256(name); each 64-bit draw gives one value, the centred
sum of its four 16-bit words scaled to unit variance. Integers up to the last division, so every machine agrees.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

TWO_SIGMA = 2 * 65536 * math.sqrt(4 / 12)


def draws(name: str, count: int) -> np.ndarray:
    """Even integers, symmetric about 0, whose standard deviation is TWO_SIGMA."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
    words = np.random.PCG64(seed).random_raw(count).view(np.uint16).reshape(count, 4)
    return 2 * words.sum(1, dtype=np.int64) - 4 * 65535


def weight(name: str, shape: list[int], kind: str) -> Tensor:
    if kind == "one":
        return torch.ones(shape, dtype=torch.int64)
    whole = draws(name, math.prod(shape)).reshape(shape)
    fan_in = math.prod(shape[1:])
    unit = whole / TWO_SIGMA
    if kind == "conv":
        if shape[1] > 1:
            unit = (whole * fan_in - whole.sum(tuple(range(1, len(shape))), keepdims=True)) / (TWO_SIGMA * fan_in)
        values = unit * math.sqrt(2 / fan_in)
    elif kind == "linear":
        values = unit / math.sqrt(fan_in)
    elif kind == "gain":
        values = 1 + 0.1 * unit
    elif kind == "var":
        values = 1 + 0.1 * np.abs(unit)
    elif kind == "embed":
        values = 0.3 * unit
    elif kind == "melmean":  # of a mel spectrogram in decibels
        values = -25 + 5 * unit
    elif kind == "melvar":
        values = 400 * (1 + 0.1 * np.abs(unit))
    else:
        assert kind in ("bias", "mean")
        values = 0.1 * unit
    return torch.from_numpy(np.asarray(values, np.float32))


def state_dict(manifest: Path, variant: str | None = None, poisoned: bool = False) -> dict[str, Tensor]:
    """The synthetic entries that `manifest` lists; a folder stands for the manifest.json in it.

    variant: multiplies entries whose names match its regular expressions by their factors. Constants that the original
    computes and stores ("derived") are left out, or, if `poisoned`, full of NaN and -1: nobody may read them.
    """
    listed = read_manifest(manifest)
    factors = listed["variants"][variant] if variant else {}
    state = {}
    for name, shape, dtype, kind in listed["entries"]:
        if kind == "derived":
            if poisoned:
                kept_type = getattr(torch, dtype)
                state[name] = torch.full(shape, math.nan if kept_type.is_floating_point else -1, dtype=kept_type)
            continue
        state[name] = weight(name, shape, kind)
        if name in listed["probe_sha256_16"]:
            digest = hashlib.sha256(state[name].numpy().tobytes()).hexdigest()
            assert digest.startswith(listed["probe_sha256_16"][name]), f"{name} is rebuilt wrongly"
        for pattern, factor in factors.items():
            if re.search(pattern, name):
                state[name] = state[name] * factor
    return state


def write_checkpoint(manifest: Path, path: Path, variant: str | None = None, poisoned: bool = False) -> Path:
    """Writes the synthetic checkpoint to `path`, in the original's container, and returns `path`."""
    listed, state = read_manifest(manifest), state_dict(manifest, variant, poisoned)
    container = listed["container"]
    torch.save(state if container == "flat" else {**listed.get("extra", {}), container: state}, path)
    return path


def read_manifest(manifest: Path) -> dict[str, Any]:
    return json.loads((manifest / "manifest.json" if manifest.is_dir() else manifest).read_text())


def waveform(seed: int, seconds: float, sample_rate: int) -> np.ndarray:
    """float32 mono: modulated sines, chirps, noise bursts, a noise floor and 0.25 s of exact zeros."""
    generator = np.random.PCG64(10_000 + seed)

    def uniform(count: int) -> np.ndarray:
        return (generator.random_raw(count) >> np.uint64(11)) * 2.0**-53

    samples = round(seconds * sample_rate)
    t, top, x = np.arange(samples) / sample_rate, 0.45 * sample_rate, np.zeros(samples)
    for a, b, c, d, e in uniform(30).reshape(6, 5):
        tone = np.sin(2 * np.pi * (60 * (top / 60) ** b * t + c))
        x += (0.05 + 0.2 * a) * tone * (1 + np.sin(2 * np.pi * (0.2 + 2 * d) * t + e)) / 2
    for a, b, c, d in uniform(8).reshape(2, 4):
        x += (0.1 + 0.2 * a) * np.sin(2 * np.pi * (top * b * t + top * (c - b) * t * t / (2 * seconds) + d))
    for a, b, c, d in uniform(16).reshape(4, 4):
        after = t - a * seconds
        decay = np.where(after >= 0, np.exp(-np.maximum(after, 0) / (0.02 + 0.3 * c)), 0)
        x += (0.3 + 0.5 * b) * decay * (2 * uniform(samples) - 1) * (0.5 + 0.5 * d)
    x = 0.8 * x / np.abs(x).max() + 1e-3 * (2 * uniform(samples) - 1)
    start = int(uniform(1)[0] * (samples - sample_rate // 4))
    x[start : start + sample_rate // 4] = 0
    return np.clip(x, -1, 1).astype(np.float32)


class Golden:
    """One golden file: its input waveform [B, samples] and the check of outputs against it."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as arrays:
            self.arrays = dict(arrays)
        self.meta = json.loads(str(self.arrays.pop("meta_json")))
        recipe = self.meta["input"]
        clips = [
            np.float32(gain) * waveform(seed, recipe["seconds"], recipe["sample_rate"])
            for seed, gain in zip(recipe["seeds"], recipe["gains"], strict=True)
        ]
        self.waveform = torch.from_numpy(np.stack(clips))

    def check(self, name: str, output: Tensor) -> None:
        """Asserts shape, largest error and rms error of the full output called `name`."""
        expected = self.meta["outputs"][name]
        assert list(output.shape) == expected["shape"], name
        stored = output.numpy()
        if expected["stored"] != "all" and not expected["stored"].startswith("[...]"):
            axes = expected["stored"].strip("[]").split(",")
            stored = stored[tuple(slice(*(int(p) if p.strip() else None for p in axis.split(":"))) for axis in axes)]
        error = stored.astype(np.float64) - self.arrays[name]
        assert np.abs(error).max() <= expected["suggested_atol"], name
        assert np.sqrt((error**2).mean()) <= expected["suggested_rms"], name
