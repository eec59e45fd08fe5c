"""The times of tokens: as many as the encoder gives, within the clip, and where a click changes them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from atr_scale.encoders import AudioEncoder, TokenSequence, build_audio_encoder
from tests.encoders import LIGHT, noise

WINDOWS = {"window_seconds": 2.0, "window_hop_seconds": 1.5}


@pytest.mark.parametrize("options", [{}, WINDOWS], ids=["native", "overlapping"])
@pytest.mark.parametrize("name", [*LIGHT, "passt_s10"])
@pytest.mark.slow
def test_each_token_has_its_part_of_the_clip(name: str, options: dict[str, Any]) -> None:
    encoder = small(name, **options)
    for seconds in (0.05, 0.7, 3.31, 5.04, 13.7):
        samples = round(seconds * encoder.sample_rate)
        with torch.no_grad():
            count = encoder(noise(1, samples)).mask.sum()
        times = encoder.token_times(samples)
        assert len(times) == count, f"{seconds} s"
        assert (
            (times >= 0).all() and (times[:, 1] >= times[:, 0]).all() and times.max() <= samples / encoder.sample_rate
        )
        assert times[0, 0] == 0 and (times[0, 1] > 0 or len(times) == 0)


def small(name: str, seed: int = 0, **options: Any) -> AudioEncoder:
    torch.manual_seed(seed)
    if name == "passt_s10":
        from atr_scale.encoders.passt import PaSST

        encoder: AudioEncoder = PaSST(stride=10, dim=32, depth=1, heads=1)
        encoder.configure(PaSST.Options(**options), name)
        return encoder.eval()
    return build_audio_encoder(name, None, **options).eval()


def changes(encoder: AudioEncoder, seconds: float, clicks: list[float]) -> Tensor:
    """[clicks, T]: how much a click of 10 ms at each of these times changes each token of a quiet clip."""
    rate, burst = encoder.sample_rate, 5 * noise(round(0.01 * encoder.sample_rate), seed=1)
    clips = 0.2 * noise(1, round(seconds * rate)).repeat(1 + len(clicks), 1)
    for row, click in enumerate(clicks, 1):
        start = round(click * rate) - len(burst) // 2
        clips[row, start : start + len(burst)] += burst
    with torch.no_grad():
        tokens = encoder(clips).tokens
    return (tokens[1:] - tokens[0]).norm(dim=2).square()


@pytest.mark.parametrize("name", ["mn04", "small_cnn", "tiny_cnn14", "tiny_resnet38"])
def test_a_token_is_centred_where_clicks_change_it(name: str) -> None:
    """Convolutions see seconds around a token, random ones more on one side: the mean over networks has its centre."""
    clicks, offsets = np.arange(0.5, 2.6, 0.1), []
    for seed in range(4):
        encoder = small(name, seed)
        middle = encoder.token_times(3 * encoder.sample_rate).mean(1)
        found = changes(encoder, 3.0, clicks.tolist()).numpy()
        for token in np.flatnonzero((middle > 1.25) & (middle < 1.85)):
            by_click = found[:, token] - found[:, token].min()
            offsets.append((clicks * by_click).sum() / by_click.sum() - middle[token])
    assert abs(np.mean(offsets)) < 0.08


@pytest.mark.parametrize("name", ["tiny_passt", "tiny_atst", "tiny_htsat", "tiny_clap"])
@pytest.mark.parametrize("seconds", [2.3, 12.5])
def test_the_token_of_a_click_changes_most(name: str, seconds: float) -> None:
    """Also in the second window of a clip, and in every copy of a short clip that is repeated or stretched."""
    encoder = small(name)
    clicks = [0.4, 1.1, seconds - 0.7]
    times = encoder.token_times(round(seconds * encoder.sample_rate))
    for click, row in zip(clicks, changes(encoder, seconds, clicks), strict=True):
        start, stop = times[int(row.argmax())]
        assert start - 0.05 <= click <= stop + 0.05


def test_a_clip_that_is_repeated() -> None:
    """CLAP hears a clip of three seconds three times, then a second of silence."""
    encoder = build_audio_encoder("tiny_clap", None)
    times = encoder.token_times(3 * encoder.sample_rate)
    for instant in (0.2, 1.5, 2.8):
        assert ((times[:, 0] <= instant) & (instant < times[:, 1])).sum() == 3
    silent = times[:, 0] == times[:, 1]
    assert silent.nonzero()[0].tolist() == [29, 30, 31]


def test_an_encoder_that_tells_nothing_divides_the_clip_evenly() -> None:
    class Plain(AudioEncoder):
        sample_rate, dim = 100, 1
        layers = property(lambda self: [])

        def encode(self, waveform_BS: Tensor, augment_seed: int = 0) -> TokenSequence:
            tokens = waveform_BS[:, : waveform_BS.shape[1] // 50 * 50].unflatten(1, (-1, 50)).mean(2, keepdim=True)
            return TokenSequence.unpadded(tokens, tokens.mean(1))

    assert Plain().token_times(200).tolist() == [[0, 0.5], [0.5, 1], [1, 1.5], [1.5, 2]]
