from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from golden.reference import Golden, write_checkpoint
from torch import Tensor

from atr_scale.encoders import build_audio_encoder
from atr_scale.encoders.panns import Cnn14, Panns, ResNet38
from atr_scale.encoders.spec_augment import SpecAugmentSection
from atr_scale.errors import UserError
from tests.encoders import built

TINY = ["tiny_cnn14", "tiny_resnet38"]
RATE = 32_000


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def tiny(name: str, **options: Any) -> Panns:
    """With residual branches that do something: they start at zero."""
    encoder = built(Panns, name, **options)
    for key, parameter in encoder.named_parameters():
        if key.endswith("bn2.weight"):
            torch.nn.init.constant_(parameter, 0.5)
    return encoder


def noise(*shape: int, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("by_frames", [False, True])
@pytest.mark.parametrize("name", [*TINY, "mn04"])
def test_every_convolution_runs_in_channels_last(name: str, by_frames: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the layout of the features: the strides of one channel may describe both layouts."""
    encoder, layouts = build_audio_encoder(name), []
    mel = encoder.mel

    def laid_out(waveform: Tensor, seed: int) -> Tensor:
        return mel(waveform, seed).mT.contiguous().mT if by_frames else mel(waveform, seed).contiguous()

    def record(_: object, inputs: tuple[Tensor], output: Tensor) -> None:
        layouts.append([x.stride(1) for x in (*inputs, output)])

    monkeypatch.setattr(encoder, "mel", laid_out)
    for module in encoder.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(record)
    with torch.no_grad():
        encoder(noise(2, 2 * RATE))
    assert len(layouts) > 10 and all(strides == [1, 1] for strides in layouts)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cnn14", "resnet38"])
@torch.no_grad()
def test_outputs_of_the_original(name: str, golden: Path, tmp_path: Path) -> None:
    encoder = built(Panns, name, write_checkpoint(golden / name, tmp_path / "original.pt", poisoned=True))
    (tmp_path / "original.pt").unlink()
    reference = Golden(golden / name / "golden_a.npz")
    sequence = encoder(reference.waveform)
    logits = encoder.tags(reference.waveform)
    hidden = encoder.fc1(sequence.pooled)

    reference.check("mel", encoder.front_end(reference.waveform).transpose(1, 2))
    reference.check("mel_bn", encoder.normalised_mel(reference.waveform).transpose(1, 2))
    reference.check("frames", sequence.tokens.transpose(1, 2))
    reference.check("pooled", sequence.pooled)
    reference.check("fc1_pre_relu", hidden)
    reference.check("embedding", hidden.relu())
    reference.check("logits", logits)
    reference.check("clipwise", logits.sigmoid())
    assert sequence.mask.shape == (1, 31) and sequence.mask.all()
    assert encoder.dim == 2048 and encoder.sample_rate == RATE and not encoder.training


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_tiny_checkpoint_round_trip(name: str, tmp_path: Path) -> None:
    written, path, waveform = tiny(name), tmp_path / "tiny.pt", noise(1, RATE)
    state = written.state_dict()
    constants = {
        "spectrogram_extractor.stft.conv_real.weight": torch.full((513, 1, 1024), torch.nan),
        "spectrogram_extractor.stft.conv_imag.weight": torch.full((513, 1, 1024), torch.nan),
        "logmel_extractor.melW": torch.full((513, 64), torch.nan),
    }
    torch.save({"iteration": 7, "model": {**constants, **state}}, path)
    read = build_audio_encoder(name, path)
    assert torch.equal(read(waveform).tokens, written(waveform).tokens)
    assert torch.equal(read.tags(waveform), written.tags(waveform))

    def refused(stored: object, message: str) -> None:
        torch.save(stored, path)
        with pytest.raises(UserError, match=message) as error:
            build_audio_encoder(name, path)
        assert "\n" not in str(error.value)

    key = "conv_block1.bn2.running_var"
    renamed = {k if k != key else "conv_block1.bn3.running_var": v for k, v in state.items()}
    refused({"model": renamed}, f"lacks '{key}'")
    refused(state, "named tensors")


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_token_counts(name: str) -> None:
    encoder = build_audio_encoder(name)
    for samples, tokens in ((0, 1), (1, 1), (20 * 320, 1), (62 * 320, 1), (63 * 320, 2), (7.3 * RATE, 22)):
        sequence = encoder(noise(2, int(samples)))
        assert sequence.tokens.shape == (2, tokens, encoder.dim) and sequence.mask.all()
        assert sequence.pooled.shape == (2, encoder.dim) and sequence.pooled.isfinite().all()
    assert encoder.tags(noise(2, 0)).shape == (2, 527)


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_short_clips_are_filled_up_with_silence(name: str) -> None:
    encoder, short = tiny(name), noise(1, 5000)
    filled = torch.cat([short, torch.zeros(1, 31 * 320 - 5000)], 1)
    assert torch.equal(encoder(short).tokens, encoder(filled).tokens)


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_a_clip_never_depends_on_its_batch_mates(name: str) -> None:
    encoder = tiny(name)
    lengths = [2 * RATE, 3 * RATE, 100, RATE + 7, 0]
    waveform = noise(len(lengths), 3 * RATE)
    together = encoder(waveform, torch.tensor(lengths))
    for row, length in enumerate(lengths):
        alone = encoder(waveform[row : row + 1, :length])
        count = alone.tokens.shape[1]
        assert together.mask[row].sum() == count
        assert torch.equal(together.tokens[row, :count], alone.tokens[0])
        assert torch.equal(together.pooled[row], alone.pooled[0])


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_windows_where_asked_for(name: str) -> None:
    encoder, waveform = tiny(name), noise(1, 3 * RATE)
    assert encoder(waveform).tokens.shape[1] == 9
    halves = [encoder(waveform[:, : 2 * RATE]), encoder(torch.cat([waveform[:, 2 * RATE :], torch.zeros(1, RATE)], 1))]
    windowed = tiny(name, window_seconds=2.0)
    windowed.load_state_dict(encoder.state_dict())
    sequence = windowed(waveform)
    torch.testing.assert_close(sequence.tokens, torch.cat([halves[0].tokens, halves[1].tokens[:, :3]], 1))
    torch.testing.assert_close(sequence.pooled, (2 * halves[0].pooled + halves[1].pooled) / 3)  # 2 s and 1 s of audio


@pytest.mark.parametrize("name", TINY)
def test_bf16_autocast(name: str) -> None:
    encoder = tiny(name)
    waveform = noise(2, RATE)
    exact = encoder(waveform)
    with torch.autocast("cpu", torch.bfloat16):
        sequence = encoder(waveform)
    error = (sequence.pooled.float() - exact.pooled).norm() / exact.pooled.norm()
    assert 0 < error < 0.1
    sequence.pooled.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_double_and_bf16_weights(name: str) -> None:
    encoder, waveform = tiny(name), noise(1, RATE)
    single = encoder(waveform).pooled
    double = encoder.double()(waveform).pooled
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), single, atol=1e-4, rtol=1e-4)
    half = encoder.bfloat16()(waveform).pooled
    assert half.dtype == torch.bfloat16
    assert (half.float() - single).norm() < 0.1 * single.norm()


@pytest.mark.parametrize("name", TINY)
def test_activation_checkpointing_gives_the_same_gradients(name: str) -> None:
    plain = tiny(name).train()
    recomputing = tiny(name, activation_checkpointing=True).train()
    recomputing.load_state_dict(plain.state_dict())
    for encoder in (plain, recomputing):
        torch.manual_seed(1)
        encoder(noise(2, RATE)).pooled.square().sum().backward()
    for expected, parameter in zip(plain.parameters(), recomputing.parameters(), strict=True):
        if parameter.requires_grad:
            assert expected.grad is not None and expected.grad.any()
            torch.testing.assert_close(parameter.grad, expected.grad)


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_dropout_and_stripes_in_training_alone(name: str) -> None:
    waveform = noise(2, 2 * RATE)
    encoder = tiny(name, spec_augment=SpecAugmentSection())
    quiet, mel = encoder(waveform).tokens, encoder.normalised_mel(waveform)
    assert torch.equal(encoder(waveform).tokens, quiet)
    encoder.train()
    striped = encoder.normalised_mel(waveform)
    zero = striped == 0
    assert torch.equal(striped, mel.masked_fill(zero, 0)) and 0 < zero.float().mean() < 0.9
    assert not torch.equal(encoder(waveform).tokens, encoder(waveform).tokens)

    plain = tiny(name).train()
    plain.load_state_dict(encoder.state_dict())
    assert torch.equal(plain.normalised_mel(waveform), mel)
    rates = [m.p for m in plain.modules() if isinstance(m, torch.nn.Dropout)]
    assert sorted(rates) == ([0.2] * 6 if name == "tiny_cnn14" else [0.1] * 16 + [0.2] * 3)
    for module in plain.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    torch.testing.assert_close(plain(waveform).tokens, quiet)


@pytest.mark.parametrize(("name", "count"), [("tiny_cnn14", 6), ("tiny_resnet38", 18)])
def test_layers_hold_every_trainable_parameter_once(name: str, count: int) -> None:
    encoder = build_audio_encoder(name)
    assert len(encoder.layers) == count
    for key, parameter in encoder.named_parameters():
        owners = [layer for layer in encoder.layers if key.startswith(layer)]
        assert len(owners) == parameter.requires_grad, key
    assert {key.split(".")[0] for key, p in encoder.named_parameters() if not p.requires_grad} == {"fc1", "fc_audioset"}


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_random_weights_keep_the_variance_and_tell_clips_apart(name: str) -> None:
    encoder = built(Panns, name)
    hum = 0.1 * torch.sin(torch.arange(2 * RATE) / 20)[None]
    waveform = torch.cat([noise(1, 2 * RATE), hum])
    assert 0.1 < encoder.normalised_mel(waveform).square().mean().sqrt() < 3
    tokens = encoder(waveform).tokens
    scale = tokens.square().mean().sqrt()
    assert 0.05 < scale < 5
    assert (tokens[0] - tokens[1]).square().mean().sqrt() > 0.2 * scale


def test_special_options_are_refused() -> None:
    for name, option in (("tiny_cnn14", "s_patchout_t"), ("tiny_resnet38", "fmin_aug_range")):
        options: dict[str, Any] = {option: 2}
        with pytest.raises(UserError, match=option):
            build_audio_encoder(name, **options)


def test_published_sizes() -> None:
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in cls().parameters()) for cls in (Cnn14, ResNet38)]
    assert sizes == [80_753_615, 73_783_247]  # table III of the paper
