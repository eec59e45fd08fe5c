"""What LAION-CLAP's audio encoder has of its own; the rest is in test_htsat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden.reference import Golden, write_checkpoint

from atr_scale.encoders import build_audio_encoder
from atr_scale.encoders.clap import CLAP
from atr_scale.errors import UserError
from tests.encoders import built

RATE = 48_000
TINY_AUDIO = {
    "patch_embeds_hidden_size": 16,
    "hidden_size": 128,
    "depths": [2, 2, 2, 2],
    "num_attention_heads": [1, 2, 4, 8],
}
TINY_TEXT = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "max_position_embeddings": 20,
}


def noise(clips: int, samples: int, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(clips, samples, generator=torch.Generator().manual_seed(seed))


def clap_model(**audio: Any) -> Any:
    from transformers import ClapConfig, ClapModel

    torch.manual_seed(0)
    return ClapModel(ClapConfig(audio_config=TINY_AUDIO | audio, text_config=TINY_TEXT)).eval()


@pytest.mark.slow
@torch.no_grad()
def test_outputs_of_the_original(golden: Path, tmp_path: Path) -> None:
    folder = golden / "clap_laion_audio"
    checkpoint = write_checkpoint(folder, tmp_path / "clap.pt", poisoned=True)
    reference = Golden(folder / "golden_a.npz")
    for attention in ("eager", "sdpa"):
        encoder = built(CLAP, "clap", checkpoint, attention=attention)
        sequence = encoder(reference.waveform)
        projected = encoder.project(sequence.pooled)
        reference.check("mel", encoder.front_end(reference.waveform).transpose(1, 2))
        reference.check("map", encoder.feature_map(reference.waveform))
        reference.check("embedding", sequence.pooled)
        reference.check("projected", projected)
        reference.check("normalised", torch.nn.functional.normalize(projected))
        assert sequence.tokens.shape == (1, 32, 768) and encoder.sample_rate == RATE


@torch.no_grad()
def test_a_whole_clap_of_transformers(tmp_path: Path) -> None:
    model = clap_model()
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    encoder = built(CLAP, "tiny_clap", tmp_path)
    waveform = noise(2, round(7.3 * RATE))
    mel = encoder.front_end(waveform).transpose(1, 2).unsqueeze(1)
    expected = model.get_audio_features(input_features=mel).pooler_output
    projected = torch.nn.functional.normalize(encoder.project(encoder(waveform).pooled))
    torch.testing.assert_close(projected, expected)


def test_without_its_projection(tmp_path: Path) -> None:
    clap_model().audio_model.save_pretrained(tmp_path)
    encoder = built(CLAP, "tiny_clap", tmp_path)
    with pytest.raises(UserError, match="without audio_projection"):
        encoder.project(torch.ones(1, 128))


def test_feature_fusion_is_refused(tmp_path: Path) -> None:
    model = clap_model(enable_fusion=True, fusion_type="aff_2d")
    model.save_pretrained(tmp_path / "whole")
    model.audio_model.save_pretrained(tmp_path / "audio")
    original = tmp_path / "fusion.pt"
    weight = torch.zeros(96, 1, 4, 12)
    torch.save({"state_dict": {"module.audio_branch.patch_embed.mel_conv2d.weight": weight}}, original)
    for path in (tmp_path / "whole", tmp_path / "audio", original):
        with pytest.raises(UserError, match="feature fusion"):
            build_audio_encoder("tiny_clap", path)
    with pytest.raises(UserError, match="feature fusion"):
        build_audio_encoder("tiny_htsat", tmp_path / "audio")


@pytest.mark.parametrize("seconds", [0.3, 4.0, 7.3, 10.0])
def test_preparation_of_waveforms(seconds: float) -> None:
    """Against transformers' own preparation, in float64, of samples as a 16-bit file holds them."""
    from transformers import ClapFeatureExtractor

    extractor = ClapFeatureExtractor(frequency_min=50, truncation="rand_trunc", padding="repeatpad")
    waveform = 12 * noise(2, round(seconds * RATE))
    waveform[1] *= 0.01
    assert waveform[0].abs().max() > 1
    mel = build_audio_encoder("tiny_clap").front_end(waveform)
    for row, clip in enumerate(waveform.numpy()):
        stored = (np.clip(clip, -1, 1) * 32767).astype(np.int16)
        expected = extractor((stored / 32767).astype(np.float32), sampling_rate=RATE)["input_features"]
        np.testing.assert_allclose(mel[row].T, np.asarray(expected).reshape(1001, 64), rtol=0, atol=0.02)


def test_repeated_as_often_as_it_fits() -> None:
    front_end = build_audio_encoder("tiny_clap").front_end
    for samples, times in ((0, 0), (1, 480_000), (100_000, 4), (240_000, 2), (350_400, 1), (480_000, 1)):
        clip = (noise(1, samples, seed=2) * 32767).round() / 32767 if samples else torch.zeros(1, 0)
        expected = np.zeros((1, 480_000), np.float32)
        expected[:, : samples * times] = np.tile(clip.numpy(), times)
        np.testing.assert_allclose(front_end.prepare(clip), expected, rtol=0, atol=1.01 / 32767)


def test_base_size() -> None:
    with torch.device("meta"):
        encoder = built(CLAP, "clap_base")
    assert encoder.dim == 1024 and len(encoder.blocks) == 18
    assert encoder.swin.layers[2].blocks[11].attention.self.query.weight.shape == (512, 512)
