"""The plain logarithmic mel spectrogram.

Shape suffixes: B batch, S samples, K frequency bins, M mel bands, F frames.
"""

from __future__ import annotations

import torch
from torch import Tensor

from atr_scale.frontends.spectrogram import FrontEnd, mel_bank, power_spectrogram


class LogMel(FrontEnd):
    """(ln(mel power + floor) + shift) / scale, [B, num_mels, 1 + S // hop].

    n_fft, window_length and hop in samples, fmin and fmax in Hz; Hann window, periodic or symmetric.
    """

    window: Tensor
    bank: Tensor

    def __init__(
        self,
        *,
        sample_rate: int,
        n_fft: int,
        window_length: int,
        hop: int,
        num_mels: int,
        fmin: float,
        fmax: float,
        floor: float,
        shift: float,
        scale: float,
        periodic_window: bool = True,
    ) -> None:
        super().__init__()
        self.n_fft, self.hop = n_fft, hop
        self.floor, self.shift, self.scale = floor, shift, scale
        self.register_buffer("window", torch.hann_window(window_length, periodic=periodic_window), persistent=False)
        self.register_buffer("bank", mel_bank(num_mels, n_fft, sample_rate, fmin, fmax), persistent=False)

    def features(self, waveform_BS: Tensor) -> Tensor:
        power_BKF = power_spectrogram(waveform_BS, self.n_fft, self.hop, self.window)
        return ((self.bank @ power_BKF + self.floor).log() + self.shift) / self.scale
