from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from golden.reference import Golden, write_checkpoint
from torch import Tensor

from atr_scale.encoders import build_audio_encoder
from atr_scale.encoders.atst import LAYOUTS, ATSTFrame
from atr_scale.encoders.spec_augment import SpecAugmentSection
from atr_scale.errors import UserError
from tests.encoders import built


def noise(clips: int, seconds: float, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(clips, round(seconds * 16_000), generator=torch.Generator().manual_seed(seed))


def tiny(**options: Any) -> ATSTFrame:
    """A tiny encoder with a classifier and with positions that matter; equal weights for equal names."""
    torch.manual_seed(0)
    encoder = built(ATSTFrame, "tiny_atst", **options)
    for name, parameter in encoder.named_parameters():
        if name == "pos_embed" or name.startswith("head.") or "bias" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.normal_(stored_mean(encoder))
    return encoder


def stored_mean(encoder: ATSTFrame) -> Tensor:
    mean = encoder.head.norm.running_mean
    assert mean is not None
    return mean


def original_file(encoder: ATSTFrame, number: int) -> dict[str, Any]:
    """What a file in the layout of that number holds, of the unused entries some."""
    layout, state = LAYOUTS[number], encoder.state_dict()
    origins = {name: entry for name in state if (entry := layout.origin(name)) is not None}
    entries = {layout.prefix + entry.key: state[name] for name, entry in origins.items()}
    poison = torch.full((3,), torch.nan)
    entries |= {(layout.prefix or "encoder.encoder.") + "mask_embed": poison}
    if number > 0:
        entries |= {key.replace("teacher", "student"): poison for key in entries}
        entries |= {"model.teacher.projector.1.running_mean": poison, "model.student.predictor.0.weight": poison}
    if number == 2:
        entries |= {layout.prefix + "cls_token": poison}
    return {"hyper_parameters": {"arch": "base"}, "epoch": 0, "state_dict": entries}


def outputs_of_blocks(encoder: ATSTFrame, waveform: Tensor) -> list[Tensor]:
    outputs: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _block, _input, output: outputs.append(output)) for block in encoder.blocks
    ]
    encoder(waveform)
    for hook in hooks:
        hook.remove()
    return outputs


def check_tokens(encoder: ATSTFrame, reference: Golden) -> None:
    sequence = encoder(reference.waveform)
    reference.check("tokens", sequence.tokens)
    reference.check("embedding", sequence.pooled)
    assert sequence.mask.shape == sequence.tokens.shape[:2] and sequence.mask.all()
    if "scene12" in reference.meta["outputs"]:
        reference.check("tokens_mean", sequence.tokens.mean(1))
        blocks = outputs_of_blocks(encoder, reference.waveform)
        reference.check("scene12", torch.cat([encoder.norm_frame(block).mean(1) for block in blocks], 1))


@pytest.mark.slow
@torch.no_grad()
def test_outputs_of_the_original(golden: Path, tmp_path: Path) -> None:
    folder = golden / "atst_frame"
    encoder = built(ATSTFrame, "atst_frame", write_checkpoint(folder, tmp_path / "original.ckpt"))
    reference = Golden(folder / "golden_a.npz")
    reference.check("mel", encoder.mel(reference.waveform, 0))
    for attention in ("eager", "sdpa"):
        encoder.options = encoder.options.model_copy(update={"attention": attention})
        check_tokens(encoder, reference)
        reference.check("logits", encoder.tags(reference.waveform))
    assert encoder.dim == 768 and encoder.sample_rate == 16_000


@pytest.mark.slow
@torch.no_grad()
def test_epsilon_of_the_norms(golden: Path, tmp_path: Path) -> None:
    folder = golden / "atst_frame"
    checkpoint = write_checkpoint(folder, tmp_path / "original.ckpt", variant="eps")
    encoder = built(ATSTFrame, "atst_frame", checkpoint, attention="sdpa")
    reference = Golden(folder / "golden_eps.npz")
    check_tokens(encoder, reference)
    reference.check("logits", encoder.tags(reference.waveform))


@pytest.mark.slow
@torch.no_grad()
def test_teacher_of_the_self_supervised_file(golden: Path, tmp_path: Path) -> None:
    folder = golden / "atst_frame"
    checkpoint = write_checkpoint(folder / "manifest_ssl.json", tmp_path / "original.ckpt")
    check_tokens(built(ATSTFrame, "atst_frame", checkpoint), Golden(folder / "golden_ssl_a.npz"))


@pytest.mark.parametrize("number", range(len(LAYOUTS)))
@torch.no_grad()
def test_round_trip_through_the_original_layouts(number: int, tmp_path: Path) -> None:
    encoder, path = tiny(), tmp_path / "weights.ckpt"
    contents = original_file(encoder, number)
    torch.save(contents, path)
    loaded, waveform = build_audio_encoder("tiny_atst", path), noise(1, 1)
    assert torch.equal(loaded(waveform).tokens, encoder(waveform).tokens)
    if number == 0:
        assert torch.equal(loaded.tags(waveform), encoder.tags(waveform))
    else:
        restored = build_audio_encoder("tiny_atst")
        restored.load_state_dict(loaded.state_dict())
        for without_classifier in (loaded, restored):
            with pytest.raises(UserError, match="came without a classifier: load the file fine-tuned on AudioSet"):
                without_classifier.tags(waveform)

    entries = contents["state_dict"]
    key = ("encoder.encoder." if number == 0 else "model.teacher.encoder.") + "blocks.1.attn.qkv.weight"
    entries[key + "_"] = entries.pop(key)
    torch.save(contents, path)
    with pytest.raises(UserError, match=f"lacks '{key}', has the unexpected '{key}_': "):
        build_audio_encoder("tiny_atst", path)


def test_a_file_without_the_container(tmp_path: Path) -> None:
    torch.save(original_file(tiny(), 0)["state_dict"], tmp_path / "weights.ckpt")
    with pytest.raises(UserError, match="does not hold the named tensors of tiny_atst"):
        build_audio_encoder("tiny_atst", tmp_path / "weights.ckpt")


@torch.no_grad()
def test_features_of_a_quiet_clip_beside_a_loud_one() -> None:
    front_end = tiny().front_end
    waveform = noise(2, 1)
    waveform[0, :8000] = 0
    waveform *= torch.tensor([[0.1], [10]])
    quiet, loud = front_end(waveform)
    assert torch.equal(quiet, front_end(waveform[:1])[0]) and torch.equal(loud, front_end(waveform[1:])[0])
    decibels = (quiet + 1) / 2 * (50.6842 + 79.6482) - 79.6482
    torch.testing.assert_close(decibels.max() - decibels.min(), torch.tensor(80.0))
    louder = (front_end(10 * waveform[1:]) - loud) / 2 * (50.6842 + 79.6482)
    torch.testing.assert_close(louder, torch.full_like(louder, 20))
    silence = front_end(torch.zeros(1, 16_000))
    torch.testing.assert_close(silence, torch.full_like(silence, (79.6482 - 100) / (50.6842 + 79.6482) * 2 - 1))


@torch.no_grad()
def test_patches_are_read_band_by_band() -> None:
    encoder = tiny()
    mel = torch.randn(1, 64, 11)
    tokens = encoder.patch_embed(mel)
    assert tokens.shape == (1, 2, 64)
    expected = encoder.patch_embed.patch_embed(mel[:, :, 4:8].reshape(1, 256))
    torch.testing.assert_close(tokens[:, 1], expected)


@pytest.mark.parametrize("samples, tokens", [(0, 1), (1, 1), (600, 1), (16_000, 25), (116_800, 182), (160_000, 250)])
@torch.no_grad()
def test_number_of_tokens(samples: int, tokens: int) -> None:
    waveform = noise(2, 10)[:, :samples]
    waveform[1] *= 0.01
    sequence = tiny()(waveform)
    assert sequence.tokens.shape == (2, tokens, 64) and sequence.tokens.isfinite().all() and sequence.mask.all()


@torch.no_grad()
def test_token_t_has_position_t_plus_one() -> None:
    encoder = tiny()
    expected = encoder(noise(1, 1)).tokens
    encoder.pos_embed[:, 0] = torch.nan
    encoder.pos_embed[:, 26:] = torch.nan
    assert torch.equal(encoder(noise(1, 1)).tokens, expected)
    encoder.pos_embed[:, 25] += torch.randn(64)
    assert not torch.allclose(encoder(noise(1, 1)).tokens, expected, atol=1e-3)


@torch.no_grad()
def test_a_clip_never_depends_on_its_batch_mates() -> None:
    encoder = tiny(batch_norm="local").train()
    lengths = [32_000, 48_000, 100, 0, 48_000]
    waveform = noise(5, 3) * torch.tensor([1e-3, 1, 1, 1, 10])[:, None]
    together = encoder(waveform, torch.tensor(lengths))
    for row, length in enumerate(lengths):
        alone = encoder(waveform[row : row + 1, :length])
        count = alone.tokens.shape[1]
        assert together.mask[row].sum() == count and together.mask[row, :count].all()
        torch.testing.assert_close(together.tokens[row, :count], alone.tokens[0])
        torch.testing.assert_close(together.pooled[row], alone.pooled[0])
    assert not torch.allclose(together.pooled[1], together.pooled[4], atol=1e-3)

    statistics = stored_mean(encoder).clone()
    pair = encoder.tags(waveform[3:])
    torch.testing.assert_close(pair[1:], encoder.tags(waveform[4:]))
    assert torch.equal(stored_mean(encoder), statistics)


@torch.no_grad()
def test_long_clips_are_windows() -> None:
    encoder = tiny()
    waveform = noise(1, 25)
    whole = encoder(waveform)
    windows = [encoder.encode(piece) for piece in torch.nn.functional.pad(waveform, (0, 5 * 16_000)).split(160_000, 1)]
    assert whole.tokens.shape == (1, 625, 64)
    torch.testing.assert_close(whole.tokens[:, :500], torch.cat([w.tokens for w in windows[:2]], 1))
    torch.testing.assert_close(whole.tokens[:, 500:], windows[2].tokens[:, :125])
    torch.testing.assert_close(whole.pooled, whole.tokens.mean(1))  # 625 tokens of 40 ms, none of padding


@torch.no_grad()
def test_spec_augment_is_of_training_and_off_by_default() -> None:
    waveform = noise(2, 10)
    expected = tiny()(waveform).tokens
    assert torch.equal(tiny().train()(waveform).tokens, expected)
    encoder = tiny(spec_augment=SpecAugmentSection())
    assert torch.equal(encoder(waveform).tokens, expected)
    assert not torch.allclose(encoder.train()(waveform).tokens, expected, atol=1e-3)
    with pytest.raises(UserError, match="no s_patchout_t"):
        tiny(s_patchout_t=1)
