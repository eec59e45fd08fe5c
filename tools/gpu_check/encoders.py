"""Encoders on the device against the stored outputs of the original code, and front ends against float64.

The stored outputs are of synthetic weights (tests/golden). Products and convolutions are IEEE fp32 here; with TF32 and
under bf16 the distance to the fp32 output is given.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atr_scale.encoders import AudioEncoder, build_audio_encoder
from atr_scale.encoders.front_ends import FrontEnd, power_spectrogram
from atr_scale.precision import autocast, encoder_products
from tests.golden.reference import Golden, write_checkpoint
from tools.gpu_check.losses import relative
from tools.gpu_check.rows import Case, Row, Skip, compared
from tools.gpu_check.runner import Setting

GOLDEN = Path(__file__).parents[2] / "tests" / "golden"
# Folder -> (encoder, the stored outputs that are its pooled embedding and its logits).
STORED = {
    "mn04": ("mn04", "embedding", "logits"),
    "htsat": ("htsat", "embedding", "logits"),
    "clap_laion_audio": ("clap", "embedding", None),
    "cnn14": ("cnn14", "pooled", "logits"),
    "resnet38": ("resnet38", "pooled", "logits"),
    "passt_s16": ("passt_s16", "embedding", "logits"),
    "atst_frame": ("atst_frame", "embedding", "logits"),
}
NARROW = {"tf32": 1e-2, "bf16": 1e-1}  # bounds of the distance to the fp32 output
FRONT_ENDS = {"decibels": "tiny_cnn14", "kaldi": "tiny_passt", "min-max": "tiny_atst", "logarithm": "small_cnn"}


def cases(setting: Setting) -> Iterator[Case]:
    for kind, name in FRONT_ENDS.items():
        yield f"front end, {kind}", partial(front_end, setting, name)
    for folder in ["mn04"] if setting.quick else STORED:
        encoder = _Once(folder, setting)
        yield f"{folder}, stored outputs", encoder.stored
        yield f"{folder}, fused attention", encoder.fused
        for kind in NARROW:
            yield f"{folder}, {kind}", partial(encoder.narrow, kind)


def front_end(setting: Setting, name: str) -> Row:
    """Features of noise with a silent half, in fp32 on the device and in float64 on the CPU."""
    front: FrontEnd = build_audio_encoder(name).front_end
    waveform = 0.1 * torch.randn(3, 2 * front.settings.sample_rate, generator=torch.Generator().manual_seed(0))
    waveform[1, waveform.shape[1] // 2 :] = 0
    sizes, prepared = front.settings, front.prepare(waveform.double())
    power = power_spectrogram(prepared, sizes.n_fft, sizes.hop, front.window.double())
    expected = front.compress(front.bank.double() @ power)
    found = front.to(setting.device)(waveform.to(setting.device))
    return compared(relative(found, expected), 1e-4)


class _Once:
    """An encoder of synthetic weights, which are made for the first of its rows."""

    def __init__(self, folder: str, setting: Setting) -> None:
        self.folder, self.setting = folder, setting
        self.name, self.pooled, self.logits = STORED[folder]
        self._place = tempfile.TemporaryDirectory()

    @cached_property
    def checkpoint(self) -> Path:
        return write_checkpoint(GOLDEN / self.folder, Path(self._place.name) / "original.pt")

    @cached_property
    def encoder(self) -> AudioEncoder:
        return self.build()

    @cached_property
    def golden(self) -> Golden:
        return Golden(GOLDEN / self.folder / "golden_a.npz")

    def build(self, **options: Any) -> AudioEncoder:
        return build_audio_encoder(self.name, self.checkpoint, **options).to(self.setting.device).eval()

    def output(self, encoder: AudioEncoder, precision: str = "ieee") -> Tensor:
        """The pooled embedding [B, D] of the stored input."""
        narrow = autocast(torch.device(self.setting.device), precision)
        with torch.no_grad(), encoder_products(precision == "tf32"), narrow:
            pooled: Tensor = encoder(self.golden.waveform.to(self.setting.device)).pooled
        return pooled.float().cpu()

    @cached_property
    def plain(self) -> Tensor:
        return self.output(self.encoder)

    def stored(self) -> Row:
        """`error` is the largest one as a share of what the stored file allows."""
        found = {self.pooled: self.plain}
        if self.logits:
            with encoder_products(tf32=False):
                found[self.logits] = self.encoder.tags(self.golden.waveform.to(self.setting.device)).float().cpu()
        shares = {name: _share(self.golden, name, output) for name, output in found.items()}
        note = ", ".join(f"{name} {share:.2g}" for name, share in shares.items())
        return compared(max(shares.values()), 1.0, note=note)

    def fused(self) -> Row:
        if "attention" not in self.encoder.special_options:
            raise Skip("it has no attention to choose")
        eager, fused = (self.output(self.build(attention=kind)) for kind in ("eager", "sdpa"))
        return compared(relative(fused, eager), 1e-4)

    def narrow(self, kind: str) -> Row:
        if kind == "tf32" and not self.setting.cuda:
            raise Skip("needs CUDA")
        return compared(relative(self.output(self.encoder, kind), self.plain), NARROW[kind])


def _share(golden: Golden, name: str, output: Tensor) -> float:
    """The largest error of an output over the largest one that the stored file allows."""
    expected = golden.meta["outputs"][name]
    if list(output.shape) != expected["shape"]:
        raise ValueError(f"{name} has shape {list(output.shape)}, stored is {expected['shape']}")
    stored = torch.from_numpy(golden.arrays[name])
    allowed: float = expected["suggested_atol"]
    return (output.double() - stored.double()).abs().max().item() / allowed
