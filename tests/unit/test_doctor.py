from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from atr_scale import doctor
from atr_scale.doctor import Measurement, describe_facts, diagnose, read_audio, read_labels, time_encoder, top_tags
from atr_scale.encoders import build_audio_encoder
from atr_scale.errors import UserError
from tools.ranks import run_ranks

MEASUREMENT = Measurement("CPU, 1 threads", "float32", 10.0, 4, 11.25, 2**20, 3.5, None)


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_measure_in_fresh_process", lambda *_: MEASUREMENT)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    torch.save(build_audio_encoder("mn04").state_dict(), tmp_path / "weights.pt")
    return tmp_path / "weights.pt"


def write_labels(path: Path, count: int = 527) -> Path:
    rows = [f'{i},/m/{i},"Sound, number {i}"' for i in range(count)]
    path.write_text("\n".join(["index,mid,display_name", *rows]))
    return path


def test_measure_leaves_the_encoder_as_it_was() -> None:
    encoder = build_audio_encoder("small_cnn")
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    measured = time_encoder(encoder, seconds=0.5, batch_size=3, repeats=2)
    assert measured.forward > 0 and measured.training > 0
    assert (measured.seconds, measured.batch_size, measured.dtype) == (0.5, 3, "float32")
    assert not encoder.training and all(p.grad is None for p in encoder.parameters())
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


HELD = 256 * 2**20


def measure_a_wasteful_forward() -> Measurement:
    encoder = build_audio_encoder("small_cnn")
    encode = encoder.encode

    def wasteful(waveform: torch.Tensor, augment_seed: int) -> object:
        torch.ones(HELD // 4).sum()
        return encode(waveform, augment_seed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder, "encode", wasteful)
        return time_encoder(encoder, seconds=0.5, batch_size=1, repeats=1)


def test_memory_of_a_forward_that_keeps_much() -> None:
    """In a fresh process: one that has freed much before may serve a tensor from that, and does not grow."""
    (measured,) = run_ranks(measure_a_wasteful_forward, 1)
    if measured.forward_memory is None:
        pytest.skip("the system does not tell the peak of memory")
    assert 0.9 * HELD < measured.forward_memory < 1.5 * HELD
    assert measured.training_memory is not None and measured.training_memory >= measured.forward_memory


def test_the_tags_are_the_most_probable_classes(checkpoint: Path, tmp_path: Path) -> None:
    encoder = build_audio_encoder("mn04", checkpoint)
    waveform = 0.1 * torch.randn(32_000, generator=torch.Generator().manual_seed(0))
    names = read_labels(write_labels(tmp_path / "labels.csv"))
    assert names[3] == "Sound, number 3" and len(names) == 527
    probabilities = encoder.tags(waveform[None])[0].sigmoid()
    tags = top_tags(encoder, waveform, names, count=3)
    assert list(tags) == [names[i] for i in probabilities.argsort(descending=True)[:3]]
    assert next(iter(tags.values())) == probabilities.max().item()
    best = probabilities.argmax().item()
    assert next(iter(top_tags(encoder, waveform, []))) == f"class {best}"
    with pytest.raises(UserError, match="3 labels for 527 classes"):
        top_tags(encoder, waveform, names[:3])
    with pytest.raises(UserError, match="has no classifier"):
        top_tags(build_audio_encoder("small_cnn"), waveform, names)


@pytest.mark.parametrize(
    "content", ["", "name\nDog\n", "index,mid,display_name\n1,/m/0,Dog\n", "index,mid,display_name\nx,/m/0,Dog\n"]
)
def test_broken_labels(tmp_path: Path, content: str) -> None:
    path = tmp_path / "labels.csv"
    path.write_text(content)
    with pytest.raises(UserError, match="no list of labels"):
        read_labels(path)
    with pytest.raises(UserError, match="no labels at"):
        read_labels(tmp_path / "nowhere.csv")


def test_audio_is_resampled(tmp_path: Path) -> None:
    tone = np.sin(2 * np.pi * 440 * np.arange(8000) / 8000)
    soundfile.write(tmp_path / "tone.wav", tone, 8000)
    waveform = read_audio(tmp_path / "tone.wav", 32_000)
    assert waveform.shape == (32_000,) and waveform.dtype == torch.float32
    assert torch.fft.rfft(waveform).abs().argmax() == 440
    (tmp_path / "words.wav").write_text("no audio")
    for name, reason in (("words.wav", "cannot be decoded"), ("nowhere.wav", "cannot read"), (".", "cannot read")):
        with pytest.raises(UserError, match=reason) as error:
            read_audio(tmp_path / name, 32_000)
        assert "\n" not in str(error.value)


@pytest.mark.usefixtures("unmeasured")
def test_facts_of_a_checkpoint_that_names_its_encoder(checkpoint: Path) -> None:
    facts = diagnose(checkpoint=checkpoint)
    assert facts["encoder"] == "mn04" and facts["layout"] == "original"
    assert facts["entries_loaded"] == len(torch.load(checkpoint))
    assert facts["entries_derived"] == facts["entries_unused"] == 0
    assert (facts["sample_rate"], facts["dim"], facts["native_seconds"]) == (32_000, 384, None)
    assert (facts["tokens_per_10_seconds"], facts["tokens_per_second"]) == (32, 3.2)
    assert 0 < facts["parameters_trained"] < facts["parameters"]
    rows = dict(describe_facts(facts))
    assert rows["forward"] == "11.2 clips/s, 1 MiB at the peak, beyond the weights"
    assert rows["forward, backward"] == "3.5 clips/s, peak memory unknown"
    assert str(checkpoint) in rows["checkpoint"] and "tags" not in rows


@pytest.mark.usefixtures("unmeasured")
def test_facts_without_a_checkpoint() -> None:
    facts = diagnose("tiny_atst")
    assert "layout" not in facts and facts["native_seconds"] == 10
    rows = dict(describe_facts(facts))
    assert rows["native length"] == "10 s, longer clips in windows" and "checkpoint" not in rows


@pytest.mark.usefixtures("unmeasured")
def test_what_cannot_be_examined(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing to examine: .*mn04"):
        diagnose()
    with pytest.raises(UserError, match="unknown audio encoder 'mn05'"):
        diagnose("mn05")
    with pytest.raises(UserError, match="--audio without --checkpoint"):
        diagnose("mn04", audio=tmp_path / "a.wav")
    with pytest.raises(UserError, match="--labels without --audio"):
        diagnose("mn04", checkpoint, labels=tmp_path / "labels.csv")
    with pytest.raises(UserError, match="no checkpoint of small_cnn; it is one of mn04"):
        diagnose("small_cnn", checkpoint)
    torch.save({"weight": torch.ones(3)}, checkpoint)
    with pytest.raises(UserError, match="fits no known encoder"):
        diagnose(checkpoint=checkpoint)
