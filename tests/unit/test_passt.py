from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from golden.reference import Golden, write_checkpoint
from torch import Tensor

from atr_scale.encoders import build_audio_encoder
from atr_scale.encoders.passt import PaSST
from atr_scale.encoders.spec_augment import SpecAugmentSection
from atr_scale.errors import UserError
from tests.encoders import built


def noise(clips: int, seconds: float, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(clips, round(seconds * 32_000), generator=torch.Generator().manual_seed(seed))


def tiny(**options: Any) -> PaSST:
    """A tiny encoder with positions and special tokens that matter; equal weights for equal names."""
    torch.manual_seed(0)
    encoder = built(PaSST, "tiny_passt", **options)
    for name, parameter in encoder.named_parameters():
        if "embed" in name or "token" in name or "bias" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return encoder


def original_file(encoder: PaSST) -> dict[str, Tensor]:
    return {**encoder.state_dict(), "head_dist.weight": torch.full((3,), torch.nan), "head_dist.bias": torch.zeros(2)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["passt_s16", "passt_s10"])
@torch.no_grad()
def test_outputs_of_the_original(name: str, golden: Path, tmp_path: Path) -> None:
    encoder = built(PaSST, name, write_checkpoint(golden / name, tmp_path / "original.pt"))
    reference = Golden(golden / name / "golden_a.npz")
    for attention in ("eager", "sdpa"):
        encoder.options = encoder.options.model_copy(update={"attention": attention})
        mel = encoder.mel(reference.waveform, 0)
        patches = encoder.patches(mel)
        tokens = encoder.transform(patches)
        sequence = encoder(reference.waveform)
        reference.check("mel", mel)
        reference.check("patch_map", encoder.patch_embed(mel.unsqueeze(1)))
        reference.check("tokens", tokens)
        reference.check("cls", tokens[:, 0])
        reference.check("dist", tokens[:, 1])
        reference.check("token_map", tokens[:, 2:].unflatten(1, patches.shape[2:]))
        reference.check("frames", sequence.tokens)
        reference.check("embedding", sequence.pooled)
        reference.check("logits", encoder.tags(reference.waveform))
    assert sequence.mask.shape == sequence.tokens.shape[:2] and sequence.mask.all()
    assert encoder.dim == 768 and encoder.sample_rate == 32_000


@pytest.mark.slow
@pytest.mark.parametrize("name", ["passt_s16", "passt_s10"])
@torch.no_grad()
def test_epsilon_of_the_norms(name: str, golden: Path, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(golden / name, tmp_path / "original.pt", variant="eps")
    encoder = built(PaSST, name, checkpoint, attention="sdpa")
    reference = Golden(golden / name / "golden_eps.npz")
    reference.check("tokens", encoder.transform(encoder.patches(encoder.mel(reference.waveform, 0))))
    reference.check("embedding", encoder(reference.waveform).pooled)
    reference.check("logits", encoder.tags(reference.waveform))


@torch.no_grad()
def test_round_trip_through_the_original_layout(tmp_path: Path) -> None:
    encoder, path = tiny(), tmp_path / "weights.pt"
    state = original_file(encoder)
    torch.save(state, path)
    loaded = build_audio_encoder("tiny_passt", path)
    assert torch.equal(loaded.tags(noise(1, 1)), encoder.tags(noise(1, 1)))

    key = "blocks.1.attn.qkv.weight"
    state[key + "_"] = state.pop(key)
    torch.save(state, path)
    with pytest.raises(UserError, match=f"lacks '{key}'"):
        build_audio_encoder("tiny_passt", path)
    torch.save(build_audio_encoder("mn04").state_dict(), path)
    with pytest.raises(UserError, match="no checkpoint of tiny_passt"):
        build_audio_encoder("tiny_passt", path)


@pytest.mark.parametrize("stride, rows, columns", [(16, 8, {10: 62, 7.3: 45}), (10, 12, {10: 99, 7.3: 72})])
@torch.no_grad()
def test_grid_of_patches(stride: int, rows: int, columns: dict[float, int]) -> None:
    encoder = PaSST(stride, dim=16, depth=1, heads=2).eval()
    for seconds, number in columns.items():
        waveform = noise(2, seconds)
        waveform[1] *= 0.01
        assert encoder.patches(encoder.mel(waveform, 0)).shape == (2, 16, rows, number)
        sequence = encoder(waveform)
        assert sequence.tokens.shape == (2, number, 16) and sequence.mask.all()
        for row in range(2):
            torch.testing.assert_close(sequence.pooled[row], encoder(waveform[row : row + 1]).pooled[0])


@torch.no_grad()
def test_short_clips_use_the_first_positions() -> None:
    encoder = tiny()
    waveform = noise(1, 2)
    expected = encoder(waveform)
    encoder.time_new_pos_embed[..., expected.tokens.shape[1] :] = torch.nan
    assert torch.equal(encoder(waveform).tokens, expected.tokens)
    encoder.time_new_pos_embed[..., 0] += torch.randn(64, 1)
    assert not torch.allclose(encoder(waveform).tokens, expected.tokens, atol=1e-3)


@pytest.mark.parametrize("samples", [0, 1, 600, 4800, 4801])
@torch.no_grad()
def test_clips_shorter_than_a_patch(samples: int) -> None:
    encoder = tiny(s_patchout_t=10, s_patchout_f=2).train()
    waveform = noise(2, 1)[:, :samples]
    sequence = encoder(waveform)
    assert sequence.tokens.shape == (2, 1, 64) and sequence.tokens.isfinite().all()
    silence = torch.nn.functional.pad(waveform, (0, 4801 - samples))
    torch.testing.assert_close(sequence.pooled, encoder(silence).pooled)


@torch.no_grad()
def test_a_clip_never_depends_on_its_batch_mates() -> None:
    encoder = tiny(s_patchout_t=2, s_patchout_f=1).train()
    lengths = [64_000, 96_000, 100, 0, 96_000]
    waveform = noise(5, 3)
    together = encoder(waveform, torch.tensor(lengths))
    for row, length in enumerate(lengths):
        alone = encoder(waveform[row : row + 1, :length])
        count = alone.tokens.shape[1]
        assert together.mask[row].sum() == count and together.mask[row, :count].all()
        torch.testing.assert_close(together.tokens[row, :count], alone.tokens[0])
        torch.testing.assert_close(together.pooled[row], alone.pooled[0])
    assert not torch.allclose(together.pooled[1], together.pooled[4], atol=1e-3)


@torch.no_grad()
def test_long_clips_are_windows() -> None:
    encoder = tiny()
    waveform = noise(1, 25)
    whole = encoder(waveform)
    windows = [encoder.encode(piece) for piece in torch.nn.functional.pad(waveform, (0, 5 * 32_000)).split(320_000, 1)]
    assert whole.tokens.shape == (1, 62 + 62 + 31, 64)
    torch.testing.assert_close(whole.tokens[:, :124], torch.cat([w.tokens for w in windows[:2]], 1))
    # The last window holds 5 s.
    torch.testing.assert_close(whole.pooled, (windows[0].pooled + windows[1].pooled + windows[2].pooled / 2) / 2.5)


@torch.no_grad()
def test_patchout_leaves_out_rows_and_columns_in_order() -> None:
    encoder = tiny(s_patchout_t=15, s_patchout_f=2).train()
    place = torch.arange(8)[:, None] * 100 + torch.arange(62.0)
    kept = encoder.patchout(place.expand(3, 5, 8, 62), 0)
    assert kept.shape == (3, 5, 6, 47) and torch.equal(kept, kept[:1, :1].expand_as(kept))
    rows, columns = kept[0, 0, :, 0] // 100, kept[0, 0, 0] % 100
    assert torch.equal(kept[0, 0], rows[:, None] * 100 + columns)
    assert (rows.diff() > 0).all() and (columns.diff() > 0).all()
    assert torch.equal(encoder.patchout(place[None, None], 0)[0], kept[0, :1])
    assert not torch.equal(encoder.patchout(place[None, None], 1)[0], kept[0, :1])

    full, sequence = encoder.patches(encoder.mel(noise(2, 10), 1)), encoder(noise(2, 10), augment_seed=1)
    tokens = encoder.transform(encoder.patchout(full, 1))[:, 2:]
    assert sequence.tokens.shape == (2, 47, 64)
    torch.testing.assert_close(sequence.tokens, tokens.unflatten(1, (6, 47)).mean(1))
    assert encoder.eval()(noise(1, 10)).tokens.shape == (1, 62, 64)


def test_patchout_of_everything_is_refused() -> None:
    tiny(s_patchout_t=61, s_patchout_f=7)
    for options, number in (({"s_patchout_t": 62}, 61), ({"s_patchout_f": 8}, 7)):
        with pytest.raises(UserError, match=f"tiny_passt: give at most {number}"):
            tiny(**options)


@torch.no_grad()
def test_augmentation_is_of_training_and_off_by_default() -> None:
    waveform = noise(2, 10)
    expected = tiny()(waveform).tokens
    assert torch.equal(tiny().train()(waveform).tokens, expected)
    for option in (
        {"fmin_aug_range": 10, "fmax_aug_range": 2000},
        {"spec_augment": SpecAugmentSection()},
    ):
        encoder = tiny(**option)
        assert torch.equal(encoder(waveform).tokens, expected)
        assert not torch.allclose(encoder.train()(waveform).tokens, expected, atol=1e-3)
