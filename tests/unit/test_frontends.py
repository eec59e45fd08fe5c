from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers.audio_utils import mel_filter_bank

from atr_scale.encoders.front_ends import (
    DecibelMel,
    DecibelNorm,
    FrontEnd,
    KaldiLogMel,
    LogMel,
    MelScale,
    MelSettings,
    mel_bank,
    power_spectrogram,
)

Build = Callable[..., FrontEnd]


def sizes(fmin: float = 20.0, fmax: float = 7_600.0) -> MelSettings:
    return MelSettings(sample_rate=16_000, n_fft=512, window_length=400, hop=160, num_mels=40, fmin=fmin, fmax=fmax)


class Symmetric(LogMel):
    periodic_window = False


def plain(kind: type[LogMel] = LogMel, **band: float) -> LogMel:
    return kind(sizes(**band), floor=1e-5, shift=4.5, scale=5.0)


def kaldi(**band: float) -> KaldiLogMel:
    return KaldiLogMel(sizes(**band))


def decibel(**band: float) -> DecibelMel:
    return DecibelMel(sizes(**band))


def test_power_spectrogram_equals_a_written_out_transform() -> None:
    waveform = torch.randn(700, dtype=torch.float64)
    window = torch.hann_window(100, dtype=torch.float64)
    power = power_spectrogram(waveform[None], 128, 50, window)
    assert power.shape == (1, 65, 15)

    padded = torch.cat([waveform[1:65].flip(0), waveform, waveform[-65:-1].flip(0)])
    n, k = torch.arange(128, dtype=torch.float64), torch.arange(65, dtype=torch.float64)
    waves = torch.exp(-2j * math.pi * k[:, None] * n / 128)
    centred = torch.nn.functional.pad(window, (14, 14))
    for frame in (0, 7, 14):
        expected = (waves @ (padded[50 * frame : 50 * frame + 128] * centred).to(waves.dtype)).abs() ** 2
        torch.testing.assert_close(power[0, :, frame], expected)


def test_mel_bank_peaks_where_the_mel_scale_says() -> None:
    bank = mel_bank(20, 4096, 32_000, 100.0, 15_000.0)
    low, high = (1127 * math.log(1 + f / 700) for f in (100.0, 15_000.0))
    hertz = torch.linspace(0, 16_000, 2049)
    for band in (0, 9, 19):
        centre = 700 * (math.exp((low + (band + 1) * (high - low) / 21) / 1127) - 1)
        assert abs(hertz[bank[band].argmax()] - centre) <= 16_000 / 2048
        assert 0.95 < bank[band].max() <= 1
    assert bank[:, hertz <= 100].max() == 0 and bank[:, hertz >= 15_000].max() == 0
    inside = (hertz > 300) & (hertz < 12_000)
    torch.testing.assert_close(bank.sum(0)[inside], torch.ones(int(inside.sum())))


@pytest.mark.parametrize(("scale", "area"), [("kaldi", None), ("htk", None), ("slaney", "slaney")])
@pytest.mark.parametrize(
    ("num_mels", "n_fft", "sample_rate", "fmin", "fmax"),
    [(64, 1024, 32_000, 50.0, 14_000.0), (64, 1024, 16_000, 60.0, 7_800.0), (128, 1024, 32_000, 0.0, 15_000.0)],
)
def test_mel_banks_equal_those_of_transformers(
    scale: MelScale, area: str | None, num_mels: int, n_fft: int, sample_rate: int, fmin: float, fmax: float
) -> None:
    bank = mel_bank(num_mels, n_fft, sample_rate, fmin, fmax, scale)
    expected = mel_filter_bank(
        n_fft // 2 + 1,
        num_mels,
        fmin,
        fmax,
        sample_rate,
        norm=area,
        mel_scale=scale,
        triangularize_in_mel_space=scale == "kaldi",
    ).T
    assert bank.dtype == torch.float32 and bank.shape == expected.shape
    peak = float(np.abs(expected).max())
    np.testing.assert_allclose(bank.numpy(), expected, rtol=0, atol=1e-5 * peak)


@pytest.mark.parametrize("build", [plain, kaldi, decibel])
def test_band_of_a_call(build: Build) -> None:
    waveform, front_end = 0.1 * torch.randn(2, 8_000), build()
    usual = front_end(waveform)
    other = build(fmin=200.0, fmax=5_000.0)
    assert torch.equal(front_end(waveform, band=(200.0, 5_000.0)), other(waveform))
    assert torch.equal(front_end(waveform, band=(20.0, 7_600.0)), usual)
    assert not torch.equal(other(waveform), usual) and torch.equal(front_end(waveform), usual)


def test_decibels() -> None:
    tone = torch.sin(2 * math.pi * 1000 * torch.arange(16_000) / 16_000)[None]
    loud, quiet = decibel()(tone)[..., 5:-5], decibel()(tone / 10)[..., 5:-5]
    band = int(loud.mean(2).argmax())
    torch.testing.assert_close(quiet[:, band], loud[:, band] - 20, atol=1e-3, rtol=0)
    bank = mel_bank(40, 512, 16_000, 20.0, 7_600.0, "slaney")
    power = power_spectrogram(tone, 512, 160, torch.hann_window(400))
    torch.testing.assert_close(decibel()(tone), 10 * (bank @ power).clamp(min=1e-10).log10())
    assert torch.equal(decibel()(torch.zeros(1, 800)), torch.full((1, 40, 6), -100.0))


def test_norm_of_decibels_starts_at_typical_levels() -> None:
    norm = DecibelNorm(3).eval()
    decibels = torch.tensor([-30.0, -5.0, -55.0]).reshape(1, 3, 1).expand(2, 3, 4)
    expected = torch.tensor([0.0, 1.0, -1.0]).reshape(1, 3, 1).expand(2, 3, 4)
    torch.testing.assert_close(norm(decibels), expected)
    assert set(norm.state_dict()) == {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}


def test_pre_emphasis_filters_and_takes_one_sample() -> None:
    waveform = torch.randn(2, 1600)
    filtered = torch.nn.functional.conv1d(waveform[:, None], torch.tensor([[[-0.97, 1.0]]]))[:, 0]
    symmetric = plain(Symmetric)
    torch.testing.assert_close(kaldi()(waveform), symmetric(filtered))
    assert not torch.allclose(symmetric(waveform), plain()(waveform), atol=1e-4)
    assert plain()(torch.zeros(1, 1600)).shape == (1, 40, 11)
    assert kaldi()(torch.zeros(1, 1600)).shape == (1, 40, 10)
    assert kaldi()(torch.zeros(1, 1601)).shape == (1, 40, 11)


@pytest.mark.parametrize("samples", [0, 1, 2, 256, 257, 258])
@pytest.mark.parametrize("build", [plain, kaldi, decibel])
def test_clips_shorter_than_a_frame(build: Build, samples: int) -> None:
    mel = build()(torch.ones(2, samples))
    assert mel.shape[:2] == (2, 40) and mel.shape[2] >= 1
    assert mel.isfinite().all()


def test_silence_is_the_floor() -> None:
    expected = (math.log(1e-5) + 4.5) / 5
    torch.testing.assert_close(plain()(torch.zeros(1, 800)), torch.full((1, 40, 6), expected))


def test_fp32_without_gradient_whatever_is_around_it() -> None:
    waveform = (0.1 * torch.randn(2, 8_000)).requires_grad_()
    front_end = kaldi()
    expected = front_end(waveform)
    assert expected.dtype == torch.float32 and not expected.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(front_end(waveform), expected)
    assert torch.equal(front_end.bfloat16()(waveform), expected)
    assert torch.equal(front_end.double()(waveform.double()), expected)
    assert not front_end.state_dict()
