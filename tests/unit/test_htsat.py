"""HTS-AT, and what LAION-CLAP's encoder shares with it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from golden.reference import Golden, write_checkpoint
from torch import Tensor, nn

from atr_scale.encoders import build_audio_encoder
from atr_scale.encoders.clap import CLAP
from atr_scale.encoders.htsat import HTSAT, SwinEncoder, original_entry
from atr_scale.encoders.pretrained.layout import Entry
from atr_scale.encoders.spec_augment import SpecAugmentSection
from atr_scale.errors import UserError
from tests.encoders import built

TINY = ["tiny_htsat", "tiny_clap"]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def noise(clips: int, samples: int, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(clips, samples, generator=torch.Generator().manual_seed(seed))


def tiny(name: str, **options: Any) -> SwinEncoder:
    """A tiny encoder with relative positions that matter; equal weights for equal names."""
    torch.manual_seed(1)
    encoder = built(SwinEncoder, name, **options)
    for parameter_name, parameter in encoder.named_parameters():
        if parameter_name.endswith("bias_table"):
            torch.nn.init.normal_(parameter)
    return encoder


def in_layout(encoder: SwinEncoder, number: int) -> dict[str, Any]:
    """What the encoder's original file in its layout of that number would hold."""
    layout = encoder.layouts[number]
    pieces: dict[str, dict[int, Tensor]] = {}
    for name, value in encoder.state_dict().items():
        if (entry := layout.origin(name)) is not None:
            pieces.setdefault(layout.prefix + entry.key, {})[entry.part or 0] = value.clone()
    state = {
        key: torch.cat([parts[i] for i in range(3)]) if len(parts) > 1 else parts[0] for key, parts in pieces.items()
    }
    return {"epoch": 3, layout.container: state} if layout.container else state


def keep_output(steps: dict[str, Tensor], name: str, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
    steps[name] = output


@pytest.mark.slow
@torch.no_grad()
def test_outputs_of_the_original(golden: Path, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(golden / "htsat", tmp_path / "htsat.ckpt", poisoned=True)
    reference = Golden(golden / "htsat" / "golden_a.npz")
    for attention in ("eager", "sdpa"):
        encoder = built(HTSAT, "htsat", checkpoint, attention=attention)
        steps: dict[str, Tensor] = {}
        for name, module in (
            ("patches", encoder.swin.patch_embed),
            ("stage1", encoder.swin.layers[0].downsample),
            ("tokens", encoder.swin.norm),
        ):
            module.register_forward_hook(partial(keep_output, steps, name))
        last_map = encoder.feature_map(reference.waveform)
        reference.check("mel", encoder.front_end(reference.waveform).transpose(1, 2))
        reference.check("image", encoder.image(reference.waveform).squeeze(1))
        for name, output in steps.items():
            reference.check(name, output)
        reference.check("map", last_map)
        frames = encoder.tscam_conv(last_map).flatten(2)
        reference.check("logits_frame", frames)
        reference.check("framewise", frames.sigmoid().transpose(1, 2).repeat_interleave(32, 1))
        reference.check("logits", encoder.tags(reference.waveform))
        sequence = encoder(reference.waveform)
        reference.check("embedding", sequence.pooled)
        torch.testing.assert_close(sequence.tokens, last_map.mean(2).transpose(1, 2))
        assert sequence.mask.shape == (1, 32) and sequence.mask.all()
        assert encoder.dim == 768 and encoder.sample_rate == 32_000


@pytest.mark.slow
@torch.no_grad()
def test_epsilon_of_the_norms_and_stretched_clips(golden: Path, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(golden / "htsat", tmp_path / "htsat.ckpt", variant="eps")
    encoder = built(HTSAT, "htsat", checkpoint)
    reference = Golden(golden / "htsat" / "golden_eps.npz")
    assert reference.waveform.shape[1] == 4 * encoder.sample_rate
    in_grid = encoder.feature_map(reference.waveform).unflatten(3, (4, 8)).permute(0, 3, 2, 4, 1)
    reference.check("tokens", in_grid.flatten(1, 3))
    reference.check("embedding", encoder(reference.waveform).pooled)
    reference.check("logits", encoder.tags(reference.waveform))


@torch.no_grad()
def test_the_network_is_that_of_transformers(tmp_path: Path) -> None:
    from transformers import ClapAudioConfig, ClapAudioModel

    widths: dict[str, Any] = {
        "patch_embeds_hidden_size": 16,
        "hidden_size": 128,
        "depths": [2] * 4,
        "num_attention_heads": [1, 2, 4, 8],
    }
    model = ClapAudioModel(ClapAudioConfig(**widths)).eval()
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    for name in TINY:
        encoder = built(SwinEncoder, name, tmp_path)
        waveform = noise(2, round(7.3 * encoder.sample_rate))
        waveform[1] *= 0.01
        mel = encoder.front_end(waveform)
        assert mel.shape == (2, 64, 731 if name == "tiny_htsat" else 1001)
        expected = model(mel.transpose(1, 2).unsqueeze(1))
        torch.testing.assert_close(encoder.feature_map(waveform), expected.last_hidden_state)
        torch.testing.assert_close(encoder(waveform).pooled, expected.pooler_output)
    with pytest.raises(UserError, match="without a classifier"):
        build_audio_encoder("tiny_htsat", tmp_path).tags(waveform)
    with pytest.raises(UserError, match="no classifier"):
        build_audio_encoder("tiny_clap", tmp_path).tags(waveform)


@pytest.mark.parametrize(
    ("name", "wrapper", "network", "unused"),
    [
        ("tiny_htsat", "", "sed_model.", ["sed_model.head.weight"]),
        (
            "tiny_clap",
            "module.",
            "audio_branch.",
            [
                *("audio_branch.head.weight", "audio_branch.tscam_conv.weight", "audio_transform.sequential.0.weight"),
                *("text_branch.x", "text_projection.0.weight", "text_transform.x", "logit_scale_a", "logit_scale_t"),
            ],
        ),
    ],
)
@torch.no_grad()
def test_round_trip_through_the_original_layout(
    name: str, wrapper: str, network: str, unused: list[str], tmp_path: Path
) -> None:
    encoder, path = tiny(name), tmp_path / "weights.pt"
    for parameter in encoder.parameters():
        parameter.add_(0.01 * torch.randn_like(parameter))
    contents = in_layout(encoder, 0)
    poisoned = ["spectrogram_extractor.stft.conv_real.weight", "logmel_extractor.melW"]
    poisoned += ["layers.0.blocks.1.attn_mask", "layers.0.blocks.1.attn.relative_position_index"]
    state = contents["state_dict"] | dict.fromkeys(
        [network + key for key in poisoned] + unused, torch.tensor([torch.nan])
    )
    state = contents["state_dict"] = {wrapper + key: value for key, value in state.items()}
    torch.save(contents, path)
    loaded = build_audio_encoder(name, path)
    waveform = noise(1, encoder.sample_rate)
    assert torch.equal(loaded(waveform).tokens, encoder(waveform).tokens)
    if name == "tiny_htsat":
        assert torch.equal(loaded.tags(waveform), encoder.tags(waveform))
    else:
        assert isinstance(loaded, CLAP) and isinstance(encoder, CLAP)
        assert torch.equal(loaded.project(torch.ones(1, 128)), encoder.project(torch.ones(1, 128)))

    key = wrapper + network + "layers.2.blocks.1.attn.qkv.weight"
    state[key + "_"] = state.pop(key)
    torch.save(contents, path)
    with pytest.raises(UserError) as error:
        build_audio_encoder(name, path)
    for part in (str(path), f"lacks '{key}'", f"unexpected '{key}_'", name):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_query_key_and_value_are_thirds_in_this_order() -> None:
    own, theirs = "swin.layers.1.blocks.0.attention.self.", "layers.1.blocks.0.attn.qkv.weight"
    parts = [original_entry(f"{own}{part}.weight") for part in ("query", "key", "value")]
    assert parts == [Entry(theirs, 0), Entry(theirs, 1), Entry(theirs, 2)]


def test_each_project_has_its_own_name(tmp_path: Path) -> None:
    for name, other in (TINY, reversed(TINY)):
        path = tmp_path / f"{name}.pt"
        torch.save(in_layout(tiny(name), 0), path)
        with pytest.raises(UserError, match=f"it is one of {name}"):
            build_audio_encoder(other, path)


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_a_clip_never_depends_on_its_batch_mates(name: str) -> None:
    encoder = tiny(name).train()
    rate = encoder.sample_rate
    lengths = [2 * rate, 3 * rate, 100, 0, 3 * rate]
    together = encoder(noise(5, 3 * rate), torch.tensor(lengths))
    assert together.tokens.shape == (5, 32, 128) and together.mask.all() and together.tokens.isfinite().all()
    for row, length in enumerate(lengths):
        alone = encoder(noise(5, 3 * rate)[row : row + 1, :length])
        torch.testing.assert_close(together.tokens[row], alone.tokens[0])
        torch.testing.assert_close(together.pooled[row], alone.pooled[0])
    assert not torch.allclose(together.pooled[1], together.pooled[4], atol=1e-3)


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_long_clips_are_windows(name: str) -> None:
    encoder = tiny(name)
    rate = encoder.sample_rate
    waveform = noise(1, 25 * rate)
    whole = encoder(waveform)
    padded = torch.nn.functional.pad(waveform, (0, 5 * rate))
    windows = [encoder.encode(piece) for piece in padded.split(10 * rate, 1)]
    assert whole.tokens.shape == (1, 80, 128)
    torch.testing.assert_close(whole.tokens[:, :64], torch.cat([w.tokens for w in windows[:2]], 1))
    torch.testing.assert_close(whole.tokens[:, 64:], windows[2].tokens[:, :16])


@torch.no_grad()
def test_long_clips_resized() -> None:
    encoder = tiny("tiny_htsat", long_clips="resize")
    waveform = noise(1, 2046 * 320)
    mel = encoder.front_end(waveform)
    norm = encoder.swin.batch_norm
    expected = (mel[0] - norm.running_mean[:, None]) / (norm.running_var[:, None] + norm.eps).sqrt()
    # With both ends kept, every other frame of 2047 lies exactly on one of 1024.
    image = encoder.image(waveform)
    assert image.shape == (1, 1, 256, 256)
    for chunk in range(4):
        rows = image[0, 0, 64 * chunk : 64 * chunk + 64]
        torch.testing.assert_close(rows, expected[:, 512 * chunk : 512 * chunk + 512 : 2], rtol=1e-4, atol=1e-4)
    assert encoder(waveform).tokens.shape == (1, 32, 128)
    with pytest.raises(UserError, match="no long_clips"):
        tiny("tiny_clap", long_clips="resize")


@pytest.mark.parametrize("name", TINY)
def test_fused_attention(name: str) -> None:
    eager, fused = tiny(name).train(), tiny(name, attention="sdpa").train()
    assert eager.state_dict().keys() == fused.state_dict().keys()
    assert eager.layers == fused.layers
    waveform = noise(2, 3 * eager.sample_rate)
    gradients = []
    for encoder in (eager, fused):
        sequence = encoder(waveform)
        sequence.tokens.square().mean().backward()
        gradients.append({n: p.grad for n, p in encoder.named_parameters() if p.requires_grad})
        if encoder is eager:
            expected = sequence
        else:
            torch.testing.assert_close(sequence.tokens, expected.tokens, rtol=0, atol=1e-5)
    for parameter_name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][parameter_name], gradient, rtol=1e-3, atol=1e-5, msg=parameter_name)
    kept = fused(waveform).pooled
    for block in fused.blocks:
        block.attention.self.dropout.p = 0.5
    assert not torch.allclose(fused(waveform).pooled, kept, atol=1e-3)
    torch.testing.assert_close(fused.eval()(waveform).pooled, kept)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_bf16_autocast(attention: str) -> None:
    encoder = tiny("tiny_htsat", attention=attention).train()
    waveform = noise(2, 3 * encoder.sample_rate)
    exact = encoder(waveform)
    with torch.autocast("cpu", torch.bfloat16):
        sequence, image = encoder(waveform), encoder.image(waveform)
    torch.testing.assert_close(image, encoder.image(waveform))  # decibels are too many for eight bits
    error = (sequence.pooled.float() - exact.pooled).norm() / exact.pooled.norm()
    assert 0 < error < 0.05
    sequence.tokens.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_double_precision(name: str) -> None:
    for attention in ("eager", "sdpa"):
        encoder = tiny(name, attention=attention)
        waveform = noise(1, encoder.sample_rate)
        single = encoder(waveform)
        double = encoder.double()(waveform)
        assert double.tokens.dtype == torch.float64
        torch.testing.assert_close(double.tokens.float(), single.tokens, rtol=1e-3, atol=1e-4)


def test_activation_checkpointing() -> None:
    plain, saving = tiny("tiny_htsat").train(), tiny("tiny_htsat", activation_checkpointing=True).train()
    calls: list[int] = []
    saving.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for encoder in (plain, saving):
        encoder(noise(2, 32_000)).tokens.square().mean().backward()
    assert len(calls) == 2
    for (name, one), other in zip(plain.named_parameters(), saving.parameters(), strict=True):
        if one.requires_grad:
            torch.testing.assert_close(other.grad, one.grad, msg=name)


def test_spec_augment_zeroes_stripes_of_the_normalised_mel_in_training_alone() -> None:
    stripes = SpecAugmentSection(time_drop_width=200, freq_drop_width=20)
    plain, augmented = tiny("tiny_htsat"), tiny("tiny_htsat", spec_augment=stripes)
    waveform = noise(2, 320_000)
    expected = plain.image(waveform)
    assert torch.equal(augmented.image(waveform), expected)
    assert torch.equal(plain.train().image(waveform), expected)
    image = augmented.train().image(waveform)
    zeroed = image.unflatten(2, (4, 64)).squeeze(1).transpose(1, 2).flatten(2) == 0
    assert zeroed.any() and not zeroed.all()
    assert zeroed.all(2).any() and zeroed.all(1).any()


@pytest.mark.parametrize("name", TINY)
def test_every_trained_parameter_belongs_to_one_layer(name: str) -> None:
    encoder = tiny(name)
    assert len(encoder.layers) == 1 + 8
    for parameter_name, parameter in encoder.named_parameters():
        if parameter.requires_grad:
            found = [layer for layer in encoder.layers if parameter_name.startswith(layer)]
            assert len(found) == 1, parameter_name
        else:
            assert parameter_name.startswith(("tscam_conv.", "audio_projection."))
    assert all(any(n.startswith(layer) for n, _ in encoder.named_parameters()) for layer in encoder.layers)


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_an_untrained_network_hears_differences(name: str) -> None:
    encoder = build_audio_encoder(name)
    rate = encoder.sample_rate
    hum = 0.1 * torch.sin(torch.arange(10 * rate) / 20)[None]
    sequence = encoder(torch.cat([noise(1, 10 * rate), hum]))
    assert 0.5 < sequence.tokens.std() < 2
    assert torch.cosine_similarity(sequence.pooled[0], sequence.pooled[1], 0) < 0.9
    with pytest.raises(UserError, match="classifier"):
        encoder.tags(hum)
