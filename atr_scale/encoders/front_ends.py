"""Front ends: waveform -> log-mel features, each as the original project computes it.

    class        encoders                      mel bank   compression
    LogMel       ours                          any        natural logarithm
    KaldiLogMel  EfficientAT, PaSST            Kaldi's    natural logarithm, of the pre-emphasised waveform
    DecibelMel   PANNs, HTS-AT, LAION-CLAP     Slaney's   decibels
    MinMaxMel    ATST-Frame                    HTK's      decibels, scaled to [-1, 1]

Shape suffixes: B batch, S samples, K frequency bins, M mel bands, F frames.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

MelScale = Literal["kaldi", "htk", "slaney"]
SLANEY_RANGE = math.log(6.4)  # of 27 mels
# Of recordings' spectrograms in dB, digital silence left out.
TYPICAL_MEAN, TYPICAL_DEVIATION = -30.0, 25.0


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


def hertz_to_slaney(hertz: Tensor) -> Tensor:
    """Mels of Slaney's Auditory Toolbox: linear up to 1 kHz, then 27 mels for a factor of 6.4."""
    return torch.where(hertz < 1000, hertz * 3 / 200, 15 + 27 * torch.log(hertz.clamp(min=1) / 1000) / SLANEY_RANGE)


def slaney_to_hertz(mel: Tensor) -> Tensor:
    """The inverse of `hertz_to_slaney`."""
    return torch.where(mel < 15, mel * 200 / 3, 1000 * torch.exp((mel - 15) * SLANEY_RANGE / 27))


def mel_bank(
    num_mels: int, n_fft: int, sample_rate: int, fmin: float, fmax: float, scale: MelScale = "kaldi"
) -> Tensor:
    """Triangular filters [num_mels, n_fft // 2 + 1]; fmin, fmax in Hz.

    scale: kaldi (triangles linear in 1127 ln(1 + f / 700), as `MelBanks` in kaldi/src/feat/mel-computations.cc without
    vocal tract warping), htk (corners on that scale, triangles linear in Hz, as torchaudio's default), or slaney
    (corners on Slaney's scale, triangles linear in Hz and of unit area, as librosa's default).
    """
    bins = torch.linspace(0, sample_rate / 2, n_fft // 2 + 1, dtype=torch.float64)
    limits = torch.tensor([fmin, fmax], dtype=torch.float64, device="cpu")
    if scale == "slaney":
        low, high = hertz_to_slaney(limits).tolist()
        edges = slaney_to_hertz(torch.linspace(low, high, num_mels + 2, dtype=torch.float64))
    else:
        low, high = (1127.0 * torch.log1p(limits / 700.0)).tolist()
        edges = torch.linspace(low, high, num_mels + 2, dtype=torch.float64)
        if scale == "kaldi":
            bins = 1127.0 * torch.log1p(bins / 700.0)
        else:
            edges = 700.0 * torch.expm1(edges / 1127.0)
    edges = edges.unsqueeze(1)
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    bank = torch.minimum(rising, falling).clamp(min=0)
    if scale == "slaney":
        bank = bank * 2 / (edges[2:] - edges[:-2])
    return bank.float()


class FrontEnd(nn.Module, ABC):
    """Waveform -> log-mel on the waveform's device: in fp32 whatever the autocast, without gradient.

    n_fft, window_length and hop in samples, fmin and fmax in Hz; Hann window, periodic or symmetric. The constants are
    no part of any checkpoint, and they stay fp32 when the model around them is cast.
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
        mel_scale: MelScale,
        periodic_window: bool = True,
    ) -> None:
        super().__init__()
        self.sample_rate, self.n_fft, self.hop = sample_rate, n_fft, hop
        self.num_mels, self.fmin, self.fmax, self.mel_scale = num_mels, fmin, fmax, mel_scale
        self.register_buffer("window", torch.hann_window(window_length, periodic=periodic_window), persistent=False)
        self.register_buffer("bank", self.bank_between(fmin, fmax), persistent=False)

    def bank_between(self, fmin: float, fmax: float) -> Tensor:
        """The mel bank with other band limits, in Hz."""
        return mel_bank(self.num_mels, self.n_fft, self.sample_rate, fmin, fmax, self.mel_scale)

    def prepare(self, waveform_BS: Tensor) -> Tensor:
        """What happens to the waveform before the spectrogram."""
        return waveform_BS

    @abstractmethod
    def compress(self, mel_BMF: Tensor) -> Tensor:
        """Mel power -> features, both [B, M, F]."""

    @torch.no_grad()
    def forward(self, waveform_BS: Tensor, band: tuple[float, float] | None = None) -> Tensor:
        """waveform [B, S] of any float type -> features float32 [B, M, F]; band: (fmin, fmax) for this call, in Hz."""
        with torch.autocast(waveform_BS.device.type, enabled=False):
            bank = self.bank if band is None else self.bank_between(*band).to(self.bank.device)
            power_BKF = power_spectrogram(self.prepare(waveform_BS.float()), self.n_fft, self.hop, self.window)
            return self.compress(bank @ power_BKF)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrontEnd:
        # .half() and .bfloat16() pass here too: a mel bank rounded to 16 bits is another front end.
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)


class LogMel(FrontEnd):
    """(ln(mel power + floor) + shift) / scale, [B, num_mels, 1 + S // hop]."""

    def __init__(
        self, *, floor: float, shift: float, scale: float, mel_scale: MelScale = "kaldi", **spectrogram: Any
    ) -> None:
        super().__init__(mel_scale=mel_scale, **spectrogram)
        self.floor, self.shift, self.scale = floor, shift, scale

    def compress(self, mel_BMF: Tensor) -> Tensor:
        return ((mel_BMF + self.floor).log() + self.shift) / self.scale


class KaldiLogMel(LogMel):
    """`LogMel` of the pre-emphasised waveform y[n] = x[n + 1] - pre_emphasis * x[n]; symmetric Hann window.

    The filter has no value for the last sample, so S samples give 1 + (S - 1) // hop frames.

    Source: `AugmentMelSTFT` of fschmid56/EfficientAT and kkoutini/PaSST as it runs in evaluation; the jitter of its
    band limits in training is the `band` of a call.
    """

    def __init__(self, *, pre_emphasis: float, **log_mel: Any) -> None:
        super().__init__(periodic_window=False, mel_scale="kaldi", **log_mel)
        self.pre_emphasis = pre_emphasis

    def prepare(self, waveform_BS: Tensor) -> Tensor:
        return torch.sub(waveform_BS[..., 1:], waveform_BS[..., :-1], alpha=self.pre_emphasis)


class DecibelMel(FrontEnd):
    """10 log10(max(mel power, floor)), [B, num_mels, 1 + S // hop]; normalised by the encoder's first batch norm.

    Source: `Spectrogram` and `LogmelFilterBank` of qiuqiangkong/torchlibrosa with ref 1 and no top_db.
    """

    def __init__(self, *, floor: float = 1e-10, **spectrogram: Any) -> None:
        super().__init__(mel_scale="slaney", **spectrogram)
        self.floor = floor

    def compress(self, mel_BMF: Tensor) -> Tensor:
        return 10 * mel_BMF.clamp(min=self.floor).log10()


class DecibelNorm(nn.BatchNorm2d):
    """Batch norm over mel bands, [B, M, F] -> [B, M, F].

    Without a checkpoint its statistics are typical ones: frozen batch norm, the default, would otherwise hand raw
    decibels to a network that expects unit variance.
    """

    def __init__(self, num_mels: int) -> None:
        super().__init__(num_mels)
        assert self.running_mean is not None and self.running_var is not None
        nn.init.constant_(self.running_mean, TYPICAL_MEAN)
        nn.init.constant_(self.running_var, TYPICAL_DEVIATION**2)

    def forward(self, decibels_BMF: Tensor) -> Tensor:
        return super().forward(decibels_BMF.unsqueeze(3)).squeeze(3)


class MinMaxMel(FrontEnd):
    """Decibels with `minimum` at -1 and `maximum` at 1, [B, num_mels, 1 + S // hop].

    What lies more than `dynamic_range` dB below the loudest value of its own clip is raised to that level. The original
    takes `minimum` and `maximum` from its training data.

    Source: `melspec_t`, `to_db` and `normalize` in Audio-WestlakeU/audiossl, `methods/atstframe/embedding.py`.
    """

    def __init__(
        self, *, floor: float, dynamic_range: float, minimum: float, maximum: float, **spectrogram: Any
    ) -> None:
        super().__init__(mel_scale="htk", **spectrogram)
        self.floor, self.dynamic_range, self.minimum, self.maximum = floor, dynamic_range, minimum, maximum

    def compress(self, mel_BMF: Tensor) -> Tensor:
        decibels_BMF = 10 * mel_BMF.clamp(min=self.floor).log10()
        decibels_BMF = decibels_BMF.maximum(decibels_BMF.amax((1, 2), keepdim=True) - self.dynamic_range)
        return (decibels_BMF - self.minimum) / (self.maximum - self.minimum) * 2 - 1
