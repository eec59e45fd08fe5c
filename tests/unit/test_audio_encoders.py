from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden.reference import Golden, state_dict
from torch import Tensor

from atr_scale.encoders import AUDIO_ENCODERS, AudioEncoder, TokenSequence, build_audio_encoder
from atr_scale.encoders.mobilenet import MobileNet
from atr_scale.errors import UserError
from tests.encoders import LIGHT, built, noise, training

CONVOLUTIONAL = ["mn04", "small_cnn", "tiny_cnn14", "tiny_resnet38"]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def assert_like_alone(
    encoder: AudioEncoder, together: TokenSequence, waveform: Tensor, lengths: list[int], exact: bool
) -> None:
    """exact: a clip of a length of its own is the same to the last bit."""
    for row, length in enumerate(lengths):
        alone = encoder(waveform[row : row + 1, :length])
        count = alone.tokens.shape[1]
        assert together.mask[row].tolist() == [True] * count + [False] * (together.mask.shape[1] - count)
        assert not together.tokens[row, count:].any()
        tolerance = 0.0 if exact and lengths.count(length) == 1 else 1e-4
        for of_batch, own in ((together.tokens[row, :count], alone.tokens[0]), (together.pooled[row], alone.pooled[0])):
            torch.testing.assert_close(of_batch, own, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["mn04", "mn10", pytest.param("mn40", marks=pytest.mark.slow)])
@torch.no_grad()
def test_outputs_of_the_original(name: str, golden: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "original.pt"
    torch.save(state_dict(golden / name), checkpoint)
    encoder = built(MobileNet, name, checkpoint)
    reference = Golden(golden / name / "golden_a.npz")
    sequence = encoder(reference.waveform)

    mel = encoder.front_end(reference.waveform)
    stages = [mel.unsqueeze(1)]
    for layer in encoder.features:
        stages.append(layer(stages[-1]))
    reference.check("mel", mel)
    reference.check("stem", stages[1])
    reference.check("block4", stages[5])
    reference.check("map", stages[17])
    reference.check("frames", sequence.tokens.transpose(1, 2))
    reference.check("embedding", sequence.pooled)
    reference.check("logits", encoder.tags(reference.waveform))
    assert sequence.mask.shape == sequence.tokens.shape[:2] and sequence.mask.all()
    assert sequence.tokens.shape[2] == sequence.pooled.shape[1] == encoder.dim
    assert encoder.sample_rate == 32_000


@pytest.fixture(scope="module")
def weights(real_data: Path) -> Path:
    return real_data / "weights" / "efficientat_mn04_as"


@pytest.mark.real_data
@torch.no_grad()
def test_original_weights_on_real_clips(weights: Path) -> None:
    encoder = build_audio_encoder("mn04", weights / "mn04_as_mAP_432.pt")
    with np.load(weights / "reference_outputs.npz") as reference:
        for i in range(5):
            waveform = torch.from_numpy(reference[f"clip{i}_wave32k_int16"].astype(np.float32) / 32767)[None]
            mel = torch.from_numpy(reference[f"clip{i}_mel"])
            torch.testing.assert_close(encoder.front_end(waveform)[0], mel, atol=3e-3, rtol=0)
            features = torch.from_numpy(reference[f"clip{i}_features"])
            torch.testing.assert_close(encoder(waveform).pooled[0], features, atol=3e-5, rtol=0)
            logits = torch.from_numpy(reference[f"clip{i}_logits"])
            torch.testing.assert_close(encoder.tags(waveform)[0], logits, atol=3e-4, rtol=0)
        features = torch.from_numpy(reference["synth_features"])
        pooled = encoder(torch.from_numpy(reference["synth_wave_f32"])).pooled
        torch.testing.assert_close(pooled, features, atol=3e-5, rtol=0)


@pytest.mark.real_data
@torch.no_grad()
def test_original_weights_on_esc50(weights: Path, real_data: Path) -> None:
    import soundfile

    encoder = build_audio_encoder("mn04", weights / "mn04_as_mAP_432.pt")
    with np.load(weights / "reference_esc50_fold1_hq.npz") as reference:
        names, features, logits = reference["filenames"], reference["features"], reference["logits"]
    for row in range(0, len(names), 20):
        samples, rate = soundfile.read(real_data / "esc50_fold1_hq" / "audio" / str(names[row]), dtype="float32")
        assert rate == encoder.sample_rate
        waveform = torch.from_numpy(samples)[None]
        torch.testing.assert_close(encoder(waveform).pooled[0], torch.from_numpy(features[row]), atol=3e-5, rtol=0)
        torch.testing.assert_close(encoder.tags(waveform)[0], torch.from_numpy(logits[row]), atol=3e-4, rtol=0)


class RunsCode:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def test_wrong_checkpoints_are_one_clear_line(tmp_path: Path) -> None:
    path, ran = tmp_path / "weights.pt", tmp_path / "code-ran"
    state = build_audio_encoder("mn04").state_dict()
    key = "features.4.block.2.conc_se_layers.0.fc1.weight"
    lacking = {k: v for k, v in state.items() if k != key}

    def refused(stored: object, *parts: str) -> None:
        torch.save(stored, path)
        with pytest.raises(UserError) as error:
            build_audio_encoder("mn04", path)
        message = str(error.value)
        assert "\n" not in message and str(path) in message
        for part in parts:
            assert part in message

    refused(lacking, f"lacks '{key}'", "mn04")
    refused({**state, "features.17.weight": torch.zeros(1)}, "unexpected 'features.17.weight'")
    refused({**lacking, key + "_": state[key]}, f"lacks '{key}'")
    refused({**state, key: torch.zeros(3)}, f"shape of '{key}'")
    refused({"epoch": 3}, "named tensors")
    refused([torch.zeros(3)], "named tensors")
    refused({**state, "evil": RunsCode(ran)}, "plain tensors")
    assert not ran.exists()
    refused(build_audio_encoder("mn10").state_dict(), "it is no checkpoint of mn04")
    torch.save(state, path)
    build_audio_encoder("mn04", path)


@pytest.mark.parametrize("content", [b"", b"RIFF....WAVEfmt ", b"<html>not found</html>\n" * 50])
def test_files_that_are_no_checkpoint(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    for place, hint in ((path, "original weights file"), (tmp_path, "folder"), (tmp_path / "nowhere.pt", "check the")):
        with pytest.raises(UserError, match=hint) as error:
            build_audio_encoder("mn04", place)
        assert "\n" not in str(error.value)


def test_cut_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(build_audio_encoder("mn04").state_dict(), path)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(UserError, match="no checkpoint of plain tensors"):
        build_audio_encoder("mn04", path)


def test_unknown_names() -> None:
    with pytest.raises(UserError, match="mn04, mn10, mn40, small_cnn"):
        build_audio_encoder("mn05")
    with pytest.raises(UserError, match=r"'batch_norm': .*'frozen' or 'local', got 'synced'"):
        build_audio_encoder("mn04", batch_norm="synced")


@pytest.mark.parametrize("name", LIGHT)
@torch.no_grad()
def test_a_clip_never_depends_on_its_batch_mates(name: str) -> None:
    encoder = training(name)
    rate = encoder.sample_rate
    lengths = [2 * rate, 3 * rate, 2 * rate, 100, rate + 7, 0, 3 * rate]
    waveform = noise(len(lengths), 3 * rate)
    together = encoder(waveform, torch.tensor(lengths))
    assert_like_alone(encoder, together, waveform, lengths, exact=True)

    # What the others contain, beyond their ends included, makes no difference to the last bit.
    others = noise(len(lengths), 3 * rate, seed=1)
    others[0] = waveform[0]
    changed = encoder(others, torch.tensor(lengths))
    assert torch.equal(changed.tokens[0], together.tokens[0])
    assert torch.equal(changed.pooled[0], together.pooled[0])
    assert not torch.equal(changed.pooled[1], together.pooled[1])


@pytest.mark.parametrize("name", LIGHT)
@torch.no_grad()
def test_windows_of_a_clip_never_depend_on_its_batch_mates(name: str) -> None:
    encoder = build_audio_encoder(name, window_seconds=1.0, window_hop_seconds=0.75)
    rate = encoder.sample_rate
    lengths = [int(2.4 * rate), rate // 2, rate, int(1.9 * rate)]
    waveform = noise(len(lengths), int(2.4 * rate))
    together = encoder(waveform, torch.tensor(lengths))
    assert_like_alone(encoder, together, waveform, lengths, exact=False)
    first = encoder(waveform[:1, :rate])
    torch.testing.assert_close(together.tokens[0, : first.tokens.shape[1]], first.tokens[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LIGHT)
def test_full_lengths_are_the_default(name: str) -> None:
    encoder = build_audio_encoder(name)
    waveform = noise(2, encoder.sample_rate)
    given = encoder(waveform, torch.full((2,), encoder.sample_rate))
    assert torch.equal(encoder(waveform).tokens, given.tokens) and given.mask.all()


@pytest.mark.parametrize("name", LIGHT)
def test_bf16_autocast(name: str) -> None:
    encoder = training(name)
    waveform = noise(2, encoder.sample_rate)
    exact = encoder(waveform)
    with torch.autocast("cpu", torch.bfloat16):
        sequence = encoder(waveform)
    error = (sequence.pooled.float() - exact.pooled).norm() / exact.pooled.norm()
    assert 0 < error < 0.15
    sequence.pooled.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", LIGHT)
def test_every_trained_parameter_belongs_to_one_layer_and_learns(name: str) -> None:
    encoder = training(name)
    layers = encoder.layers
    sequence = encoder(noise(2, encoder.sample_rate))
    (sequence.tokens.square().sum() + sequence.pooled.square().sum()).backward()
    reached = set()
    for parameter_name, parameter in encoder.named_parameters():
        found = [number for number, prefixes in enumerate(layers) if parameter_name.startswith(prefixes)]
        if parameter.requires_grad:
            assert len(found) == 1, parameter_name
            assert parameter.grad is not None, parameter_name
            reached.update(found)
        else:
            assert parameter.grad is None, parameter_name
    assert reached == set(range(len(layers)))


@pytest.mark.parametrize("name", LIGHT)
def test_tags(name: str) -> None:
    encoder = build_audio_encoder(name)
    waveform = noise(2, encoder.sample_rate)
    for parameter in encoder.parameters():
        if not parameter.requires_grad:  # the classifier
            torch.nn.init.normal_(parameter, std=0.1)
    if type(encoder).logits is AudioEncoder.logits:
        with pytest.raises(UserError, match="cannot tag"):
            encoder.tags(waveform)
    else:
        tags = encoder.tags(waveform)
        assert tags.shape == (2, 527) and tags.isfinite().all() and not tags.requires_grad
        assert not torch.allclose(tags[0], tags[1])


TOKENS = {
    "mn04": 32, "small_cnn": 32, "tiny_cnn14": 31, "tiny_resnet38": 31, "tiny_htsat": 32, "tiny_clap": 32,
    "tiny_passt": 62, "tiny_atst": 250,
}  # fmt: skip


@pytest.mark.parametrize("name", LIGHT)
@torch.no_grad()
def test_tokens_of_ten_seconds(name: str) -> None:
    encoder = build_audio_encoder(name)
    sequence = encoder(noise(1, 10 * encoder.sample_rate))
    assert sequence.tokens.shape == (1, TOKENS[name], encoder.dim) and sequence.pooled.shape == (1, encoder.dim)


@pytest.mark.parametrize("name", CONVOLUTIONAL)
@torch.no_grad()
def test_tokens_follow_time(name: str) -> None:
    encoder = build_audio_encoder(name)
    rate = encoder.sample_rate
    hiss, hum = noise(1, 4 * rate), torch.sin(torch.arange(4 * rate) / 50)[None]
    pure = encoder(torch.cat([hiss, hum])).tokens.mean(1)
    tokens = encoder(torch.cat([hiss, hum], 1)).tokens[0]
    distances = torch.cdist(tokens, pure)
    assert distances[2].argmin() == 0 and distances[-3].argmin() == 1


def first_norm(encoder: MobileNet) -> torch.nn.BatchNorm2d:
    norm = encoder.get_submodule("features.0.1")
    assert isinstance(norm, torch.nn.BatchNorm2d)
    return norm


def stored(norm: torch.nn.BatchNorm2d) -> Tensor:
    """Copies of a batch norm's mean and variance, one above the other."""
    assert norm.running_mean is not None and norm.running_var is not None
    return torch.stack([norm.running_mean, norm.running_var])


def test_frozen_batch_norm_ignores_the_batch_and_trains_its_weights() -> None:
    encoder = built(MobileNet, "mn04")
    norm = first_norm(encoder)
    waveform = noise(3, 32_000)
    expected = encoder(waveform)
    encoder.train()
    assert encoder.training and not norm.training
    statistics = stored(norm)
    sequence = encoder(waveform)
    assert torch.equal(sequence.tokens, expected.tokens)
    sequence.tokens.square().mean().backward()
    for parameter in (norm.weight, norm.bias):
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0
    assert torch.equal(stored(norm), statistics)


def test_frozen_batch_norm_inside_another_module() -> None:
    encoder, head = built(MobileNet, "mn04"), torch.nn.BatchNorm1d(4)
    torch.nn.ModuleDict({"audio": encoder, "head": head}).train()
    assert not first_norm(encoder).training and head.training


def test_local_batch_norm_uses_the_batch_in_training_alone() -> None:
    encoder = built(MobileNet, "mn04", batch_norm="local")
    norm = first_norm(encoder)
    waveform = noise(3, 32_000)
    expected = encoder(waveform).tokens
    encoder.train()
    before = stored(norm)
    assert not torch.allclose(encoder(waveform).tokens, expected)
    assert not torch.equal(stored(norm)[0], before[0])
    encoder.eval()
    after = stored(norm)
    encoder(waveform)
    assert torch.equal(stored(norm), after)


def test_the_tagging_head_is_not_trained() -> None:
    encoder = built(MobileNet, "mn04")
    assert not any(p.requires_grad for p in encoder.classifier.parameters())
    assert all(p.requires_grad for p in encoder.features.parameters())


def test_importing_encoders_is_light() -> None:
    code = "import sys, atr_scale.encoders; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_names() -> None:
    names = (
        "cnn14 resnet38 htsat clap clap_base passt_s16 passt_s10 atst_frame mn04 mn10 mn40 small_cnn "
        "tiny_cnn14 tiny_resnet38 tiny_htsat tiny_clap tiny_passt tiny_atst"
    )
    assert list(AUDIO_ENCODERS) == names.split()
