"""The plain logarithmic mel spectrogram.

Shape suffixes: B batch, M mel bands, F frames.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from atr_scale.frontends.spectrogram import FrontEnd, MelScale


class LogMel(FrontEnd):
    """(ln(mel power + floor) + shift) / scale, [B, num_mels, 1 + S // hop]."""

    def __init__(
        self, *, floor: float, shift: float, scale: float, mel_scale: MelScale = "kaldi", **spectrogram: Any
    ) -> None:
        super().__init__(mel_scale=mel_scale, **spectrogram)
        self.floor, self.shift, self.scale = floor, shift, scale

    def compress(self, mel_BMF: Tensor) -> Tensor:
        return ((mel_BMF + self.floor).log() + self.shift) / self.scale
