"""Options of the audio encoders: augmentation, attention, compilation, and the form of the samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from atr_scale.encoders import TokenSequence, build_audio_encoder, vit
from atr_scale.encoders.attention import is_fused
from atr_scale.encoders.audio import SPECIAL_OPTIONS, AudioEncoderOptions
from atr_scale.errors import UserError
from tests.encoders import LIGHT, noise, training


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("name", LIGHT)
@torch.no_grad()
def test_options_are_off_by_default(name: str) -> None:
    encoder = training(name)
    waveform = noise(2, encoder.sample_rate)
    sequence = encoder(waveform)
    assert torch.equal(encoder(waveform, augment_seed=1).tokens, sequence.tokens)
    assert torch.equal(encoder.eval()(waveform).tokens, sequence.tokens)


CHANGED: dict[str, Any] = {
    "long_clips": "resize", "s_patchout_t": 1, "s_patchout_f": 1, "fmin_aug_range": 10, "fmax_aug_range": 1000,
    "attention": "sdpa",
}  # fmt: skip


@pytest.mark.parametrize("name", LIGHT)
def test_options_that_an_encoder_does_not_have(name: str) -> None:
    assert set(CHANGED) == SPECIAL_OPTIONS
    for option, value in CHANGED.items():
        if option in build_audio_encoder(name).special_options:
            assert getattr(build_audio_encoder(name, **{option: value}).options, option) == value
        else:
            with pytest.raises(UserError, match=f"{name} has no {option}"):
                build_audio_encoder(name, **{option: value})


@pytest.mark.parametrize("name", LIGHT)
def test_16_bit_samples_are_scaled_in_the_front_end(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal to the bit to floats, also with random stripes, and without a float copy of the batch in the encoder."""
    encoder = training(name, spec_augment={})
    samples = torch.randint(-32768, 32768, (2, encoder.sample_rate), dtype=torch.int16)
    lengths = torch.tensor([encoder.sample_rate, encoder.sample_rate // 2])
    dtypes, encode = set(), encoder.encode

    def recorded(waveform: Tensor, augment_seed: int = 0) -> TokenSequence:
        dtypes.add(waveform.dtype)
        return encode(waveform, augment_seed)

    monkeypatch.setattr(encoder, "encode", recorded)
    with torch.no_grad():
        whole, scaled = encoder(samples, lengths), encoder(samples.float() / 32768, lengths)
    assert torch.equal(whole.tokens, scaled.tokens) and torch.equal(whole.pooled, scaled.pooled)
    assert dtypes == {torch.int16, torch.float32}


@pytest.mark.parametrize("name", LIGHT)
def test_what_version_0_3_says_of_attention_is_no_option(name: str) -> None:
    """Its configurations say eager for every encoder, also for those without attention."""
    assert build_audio_encoder(name, attention="eager").options.attention == "eager"


def test_attention_is_fused_on_a_gpu_by_default() -> None:
    assert AudioEncoderOptions().attention == "auto"
    with FakeTensorMode():
        gpu, cpu = (torch.empty(1, device=device) for device in ("cuda", "cpu"))
    chosen = [[is_fused(attention, x) for x in (gpu, cpu)] for attention in ("auto", "eager", "sdpa")]
    assert chosen == [[True, False], [False, False], [True, True]]


@pytest.mark.parametrize("name", ["tiny_passt", "tiny_atst", "tiny_htsat"])
def test_the_default_attention_is_the_one_of_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, calls = build_audio_encoder(name), []
    waveform = noise(1, encoder.sample_rate)
    fused = torch.nn.functional.scaled_dot_product_attention
    for module in (torch.nn.functional, vit):
        monkeypatch.setattr(module, "scaled_dot_product_attention", lambda *given: calls.append(1) or fused(*given))
    with torch.no_grad():
        eager = encoder(waveform).tokens
        assert not calls
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
        torch.testing.assert_close(encoder(waveform).tokens, eager, rtol=1e-4, atol=1e-5)
    assert len(calls) == len(encoder.layers) - (1 if name == "tiny_htsat" else 2)


@pytest.mark.parametrize("name", LIGHT)
def test_augmentation_draws_by_the_seed_in_training_alone(name: str) -> None:
    encoder = training(name, spec_augment={"time_drop_width": 16, "freq_drop_width": 16})
    waveform = noise(2, encoder.sample_rate)
    with torch.no_grad():
        first, again = encoder(waveform).tokens, encoder(waveform).tokens
        other = encoder(waveform, augment_seed=1).tokens
        plain = encoder.eval()(waveform).tokens
    assert torch.equal(first, again) and not torch.equal(first, other) and not torch.equal(first, plain)


@pytest.mark.slow
def test_every_layer_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch gives a function up after eight variants, and these layers have more shapes."""
    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: original(self, backend="eager"))  # no C++ compiler
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True):
        build_audio_encoder("mn04", compile=True)(noise(1, 16_000))
