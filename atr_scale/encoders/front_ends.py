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
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from atr_scale.batch import on_device, to_float
from atr_scale.products import fp32_products

MelScale = Literal["kaldi", "htk", "slaney"]
SLANEY_RANGE = math.log(6.4)  # of 27 mels
# Mean and standard deviation of spectrograms of recordings in dB, without digital silence.
TYPICAL_MEAN, TYPICAL_DEVIATION = -30.0, 25.0


def power_spectrogram(waveform_BS: Tensor, n_fft: int, hop: int, window: Tensor) -> Tensor:
    """Squared magnitudes [B, n_fft // 2 + 1, F] of a centred STFT with reflection padding, F = 1 + S // hop.

    A window shorter than `n_fft` lies in the middle of each frame. Clips of `n_fft // 2` samples or fewer are too short
    for reflection and are first padded with zeros at their end.
    """
    missing = n_fft // 2 + 1 - waveform_BS.shape[-1]
    if missing > 0:
        waveform_BS = nn.functional.pad(waveform_BS, (0, missing))
    spectrum_BKF = torch.stft(
        waveform_BS, n_fft, hop, win_length=len(window), window=window, center=True, return_complex=True
    )
    return spectrum_BKF.real.square() + spectrum_BKF.imag.square()


def hertz_to_slaney(hertz: Tensor) -> Tensor:
    """The mel scale of Slaney's Auditory Toolbox: linear up to 1 kHz, then 27 mels for a factor of 6.4."""
    return torch.where(hertz < 1000, hertz * 3 / 200, 15 + 27 * torch.log(hertz.clamp(min=1) / 1000) / SLANEY_RANGE)


def slaney_to_hertz(mel: Tensor) -> Tensor:
    """The inverse of `hertz_to_slaney`."""
    return torch.where(mel < 15, mel * 200 / 3, 1000 * torch.exp((mel - 15) * SLANEY_RANGE / 27))


def mel_bank(
    num_mels: int, n_fft: int, sample_rate: int, fmin: float, fmax: float, scale: MelScale = "kaldi"
) -> Tensor:
    """Triangular filters [num_mels, n_fft // 2 + 1]; fmin, fmax in Hz.

    scale:
    kaldi: triangles are linear in 1127 ln(1 + f / 700), as in `MelBanks` of kaldi/src/feat/mel-computations.cc without
    vocal tract warping.
    htk: corners lie on that scale and triangles are linear in Hz, the default of torchaudio.
    slaney: corners lie on Slaney's scale and triangles are linear in Hz with unit area, the default of librosa.
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


@dataclass(frozen=True)
class MelSettings:
    """Sizes of an STFT and its mel bank: sample_rate, fmin and fmax in Hz; n_fft, window_length and hop in samples."""

    sample_rate: int
    n_fft: int
    window_length: int
    hop: int
    num_mels: int
    fmin: float
    fmax: float


class FrontEnd(nn.Module, ABC):
    """Waveform -> log-mel on the device of the waveform, without gradient and in fp32 even under autocast.

    The window is a Hann window, periodic or symmetric. The constants are part of no checkpoint, and they stay fp32 when
    the model around them is cast.
    """

    mel_scale: ClassVar[MelScale]
    periodic_window: ClassVar[bool] = True
    window: Tensor
    bank: Tensor

    def __init__(self, settings: MelSettings) -> None:
        super().__init__()
        self.settings = settings
        window = torch.hann_window(settings.window_length, periodic=self.periodic_window)
        self.register_buffer("window", window, persistent=False)
        self.register_buffer("bank", self.bank_between(settings.fmin, settings.fmax), persistent=False)

    def bank_between(self, fmin: float, fmax: float) -> Tensor:
        """The mel bank [M, K] with other band limits, in Hz."""
        sizes = self.settings
        return mel_bank(sizes.num_mels, sizes.n_fft, sizes.sample_rate, fmin, fmax, self.mel_scale)

    def prepare(self, waveform_BS: Tensor) -> Tensor:
        """Change the waveform before the spectrogram."""
        return waveform_BS

    @abstractmethod
    def compress(self, mel_BMF: Tensor) -> Tensor:
        """Mel power -> features, both [B, M, F]."""

    @torch.no_grad()
    def forward(self, waveform_BS: Tensor, band: tuple[float, float] | None = None) -> Tensor:
        """Waveform [B, S] of any float type or int16 -> float32 features [B, M, F].

        band: band limits (fmin, fmax) of this call in Hz, by default those of the settings.
        """
        with torch.autocast(waveform_BS.device.type, enabled=False), fp32_products("ieee"):
            bank = self.bank if band is None else on_device(self.bank_between(*band), self.bank.device)
            prepared_BS = self.prepare(to_float(waveform_BS))
            power_BKF = power_spectrogram(prepared_BS, self.settings.n_fft, self.settings.hop, self.window)
            return self.compress(bank @ power_BKF)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # .half() and .bfloat16() come here too. A mel bank rounded to 16 bits would change the features.
        super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)
        return self


AUGMENT_MEL_STFT = MelSettings(
    sample_rate=32_000, n_fft=1024, window_length=800, hop=320, num_mels=128, fmin=0.0, fmax=15_000.0
)


class LogMel(FrontEnd):
    """(ln(mel power + floor) + shift) / scale, [B, num_mels, 1 + S // hop]."""

    mel_scale = "kaldi"

    def __init__(self, settings: MelSettings, *, floor: float, shift: float, scale: float) -> None:
        super().__init__(settings)
        self.floor, self.shift, self.scale = floor, shift, scale

    def compress(self, mel_BMF: Tensor) -> Tensor:
        return ((mel_BMF + self.floor).log() + self.shift) / self.scale


class KaldiLogMel(LogMel):
    """(ln(mel power + 1e-5) + 4.5) / 5 of the waveform y[n] = x[n + 1] - 0.97 x[n], with a symmetric Hann window.

    The filter has no value for the last sample, so S samples give 1 + (S - 1) // hop frames.

    Source: `AugmentMelSTFT` of fschmid56/EfficientAT and kkoutini/PaSST as it runs in evaluation, by default with the
    sizes that both use. The `band` of a call takes the random band limits that it draws in training.
    """

    periodic_window = False

    def __init__(self, settings: MelSettings = AUGMENT_MEL_STFT) -> None:
        super().__init__(settings, floor=1e-5, shift=4.5, scale=5.0)

    def prepare(self, waveform_BS: Tensor) -> Tensor:
        return torch.sub(waveform_BS[..., 1:], waveform_BS[..., :-1], alpha=0.97)


class DecibelMel(FrontEnd):
    """10 log10(max(mel power, 1e-10)), [B, num_mels, 1 + S // hop]. The first batch norm of the encoder normalises it.

    Source: `Spectrogram` and `LogmelFilterBank` of qiuqiangkong/torchlibrosa with ref 1 and no top_db.
    """

    mel_scale = "slaney"

    def compress(self, mel_BMF: Tensor) -> Tensor:
        return 10 * mel_BMF.clamp(min=1e-10).log10()


class DecibelNorm(nn.BatchNorm2d):
    """Batch norm over mel bands, [B, M, F] -> [B, M, F].

    Its statistics start at typical values of recordings. Otherwise frozen batch norm, the default, would pass raw
    decibels to an untrained network that expects unit variance.
    """

    def __init__(self, num_mels: int) -> None:
        super().__init__(num_mels)
        assert self.running_mean is not None and self.running_var is not None
        nn.init.constant_(self.running_mean, TYPICAL_MEAN)
        nn.init.constant_(self.running_var, TYPICAL_DEVIATION**2)

    def forward(self, decibels_BMF: Tensor) -> Tensor:
        return super().forward(decibels_BMF.unsqueeze(3)).squeeze(3)


class MinMaxMel(FrontEnd):
    """Decibels scaled so that `minimum` is -1 and `maximum` is 1, [B, num_mels, 1 + S // hop].

    Values more than `dynamic_range` dB below the loudest value of their clip are raised to that level. The original
    takes `minimum` and `maximum` from its training data.

    Source: `melspec_t`, `to_db` and `normalize` in Audio-WestlakeU/audiossl, `methods/atstframe/embedding.py`.
    """

    mel_scale = "htk"

    def __init__(
        self, settings: MelSettings, *, floor: float, dynamic_range: float, minimum: float, maximum: float
    ) -> None:
        super().__init__(settings)
        self.floor, self.dynamic_range, self.minimum, self.maximum = floor, dynamic_range, minimum, maximum

    def compress(self, mel_BMF: Tensor) -> Tensor:
        decibels_BMF = 10 * mel_BMF.clamp(min=self.floor).log10()
        decibels_BMF = decibels_BMF.maximum(decibels_BMF.amax((1, 2), keepdim=True) - self.dynamic_range)
        return (decibels_BMF - self.minimum) / (self.maximum - self.minimum) * 2 - 1
