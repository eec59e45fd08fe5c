"""What all log-mel front ends share: the power spectrogram, the mel bank and the guard around them.

Shape suffixes: B batch, S samples, K frequency bins, M mel bands, F frames.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn


def power_spectrogram(waveform_BS: Tensor, n_fft: int, hop: int, window: Tensor) -> Tensor:
    """Squared magnitudes [B, n_fft // 2 + 1, F] of a centred, reflection-padded STFT, F = 1 + S // hop.

    A window shorter than `n_fft` sits in the middle of each frame. Clips of `n_fft // 2` samples or fewer cannot be
    reflected and are padded with zeros at their end first.
    """
    missing = n_fft // 2 + 1 - waveform_BS.shape[-1]
    if missing > 0:
        waveform_BS = nn.functional.pad(waveform_BS, (0, missing))
    spectrum_BKF = torch.stft(
        waveform_BS, n_fft, hop, win_length=len(window), window=window, center=True, return_complex=True
    )
    return spectrum_BKF.real.square() + spectrum_BKF.imag.square()


def mel_bank(num_mels: int, n_fft: int, sample_rate: int, fmin: float, fmax: float) -> Tensor:
    """Triangular filters [num_mels, n_fft // 2 + 1], linear on the mel scale 1127 ln(1 + f / 700), without area
    normalisation: Kaldi's bank (`MelBanks` in kaldi/src/feat/mel-computations.cc) without vocal tract warping.

    fmin, fmax in Hz.
    """

    def mel(hertz: Tensor) -> Tensor:
        return 1127.0 * torch.log1p(hertz / 700.0)

    low, high = mel(torch.tensor([fmin, fmax], dtype=torch.float64)).tolist()
    edges = torch.linspace(low, high, num_mels + 2, dtype=torch.float64).unsqueeze(1)
    bins = mel(torch.linspace(0, sample_rate / 2, n_fft // 2 + 1, dtype=torch.float64))
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    return torch.minimum(rising, falling).clamp(min=0).float()


class FrontEnd(nn.Module, ABC):
    """Waveform -> log-mel on the waveform's device: in fp32 whatever the autocast, without gradient.

    Its constants are no part of any checkpoint, and they stay fp32 when the model around them is cast.
    """

    @abstractmethod
    def features(self, waveform_BS: Tensor) -> Tensor:
        """waveform float32 [B, S] -> log-mel [B, M, F]."""

    @torch.no_grad()
    def forward(self, waveform_BS: Tensor) -> Tensor:
        """waveform [B, S] of any float type -> log-mel float32 [B, M, F]."""
        with torch.autocast(waveform_BS.device.type, enabled=False):
            return self.features(waveform_BS.float())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrontEnd:
        # .half() and .bfloat16() pass here too: a mel bank rounded to 16 bits is another front end.
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)
