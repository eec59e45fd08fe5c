"""What PaSST and ATST-Frame share: the layers of encoders/vit.py, under every option."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from atr_scale.encoders import AudioEncoder, build_audio_encoder

# Encoder -> options under which patches are left out.
TINY: dict[str, dict[str, Any]] = {"tiny_passt": {"s_patchout_t": 3}, "tiny_atst": {}}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def tiny(name: str, **options: Any) -> AudioEncoder:
    """The same random weights at each call."""
    torch.manual_seed(0)
    return build_audio_encoder(name, **options)


def noise(encoder: AudioEncoder, count: int, seconds: int) -> Tensor:
    return 0.1 * torch.randn(count, seconds * encoder.sample_rate, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", TINY)
def test_fused_attention_and_checkpointing_change_nothing(name: str) -> None:
    gradients, tokens = [], []
    for options in ({}, {"attention": "sdpa"}, {"activation_checkpointing": True}):
        encoder = tiny(name, **TINY[name], **options).train()
        sequence = encoder(noise(encoder, 2, 3))
        (sequence.tokens.square().mean() + sequence.pooled[:, 0].mean()).backward()
        tokens.append(sequence.tokens)
        gradients.append({name: p.grad for name, p in encoder.named_parameters() if p.requires_grad})
    for other, gradient in zip(tokens[1:], gradients[1:], strict=True):
        torch.testing.assert_close(other, tokens[0], rtol=0, atol=1e-5)
        for parameter, expected in gradients[0].items():
            torch.testing.assert_close(gradient[parameter], expected, rtol=1e-4, atol=1e-6, msg=parameter)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", TINY)
def test_bf16_autocast(name: str, attention: str) -> None:
    encoder = tiny(name, attention=attention).train()
    exact = encoder(noise(encoder, 2, 2)).pooled
    with torch.autocast("cpu", torch.bfloat16):
        pooled = encoder(noise(encoder, 2, 2)).pooled
    assert 0 < (pooled.float() - exact).norm() / exact.norm() < 0.05
    pooled.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_float64(name: str) -> None:
    encoder = tiny(name)
    expected = encoder(noise(encoder, 1, 2)).tokens
    torch.testing.assert_close(encoder.double()(noise(encoder, 1, 2)).tokens, expected.double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["passt_s16", "atst_frame"])
def test_each_parameter_belongs_to_one_layer(name: str) -> None:
    with torch.device("meta"):
        encoder = build_audio_encoder(name)
    assert len(encoder.layers) == 14
    for parameter, value in encoder.named_parameters():
        found = [number for number, prefixes in enumerate(encoder.layers) if parameter.startswith(prefixes)]
        assert len(found) == value.requires_grad == (not parameter.startswith("head.")), parameter
        if parameter.startswith("blocks."):
            assert found == [1 + int(parameter.split(".")[1])]
