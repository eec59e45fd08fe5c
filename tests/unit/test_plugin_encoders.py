"""Encoders and a scorer that live outside of the package: entries of its dicts, with options of their own."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import normalize

from atr_scale.batch import Batch
from atr_scale.config import parse_config
from atr_scale.encoders import (
    AUDIO_ENCODERS,
    TEXT_ENCODERS,
    AudioEncoder,
    TextEncoder,
    TokenSequence,
    build_audio_encoder,
    build_text_encoder,
    load_text_encoder,
)
from atr_scale.encoders.audio import AudioEncoderOptions
from atr_scale.encoders.pretrained.load import fitting_encoders
from atr_scale.encoders.text import TextEncoderOptions
from atr_scale.errors import UserError
from atr_scale.model import Retriever
from atr_scale.scorers import SCORERS
from atr_scale.scorers.scorer import Scorer
from atr_scale.sections import Count, Section


class FramesOptions(AudioEncoderOptions):
    width: Count = Field(description="samples of a frame")
    heights: tuple[float, ...] = (1.0, 2.0)
    window_seconds: float | None = 2.0


class Frames(AudioEncoder):
    """A token a frame of samples, scaled by a number drawn in training."""

    Options = FramesOptions
    sample_rate = 100

    def __init__(self, width: int, heights: tuple[float, ...]) -> None:
        super().__init__()
        self.width, self.heights, self.dim = width, heights, 4
        self.frame = nn.Linear(width, self.dim)

    def encode(self, waveform_BS: Tensor, augment_seed: int = 0) -> TokenSequence:
        tokens = self.frame(waveform_BS.unfold(1, self.width, self.width)) * (1 + augment_seed * self.training)
        return TokenSequence(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool), tokens.mean(1))

    @property
    def layers(self) -> list[tuple[str, ...]]:
        return [("frame.",)]


class LettersOptions(TextEncoderOptions):
    alphabet: str = "abc"


class Letters(TextEncoder):
    """A token a letter."""

    Options = LettersOptions
    common_options = frozenset({"pooling"})

    def __init__(self, alphabet: str) -> None:
        super().__init__()
        self.alphabet, self.dim = alphabet, 4
        self.embedding = nn.Embedding(1 + len(alphabet), self.dim)
        self.tokenizer = self.token_ids

    def token_ids(self, captions: list[str], **_: Any) -> Mapping[str, Tensor]:
        rows = [torch.tensor([1 + self.alphabet.index(letter) for letter in caption]) for caption in captions]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> TokenSequence:
        tokens = self.embedding(input_ids)
        pooled = tokens[:, 0] if self.options.pooling == "first" else tokens.mean(1)
        return TokenSequence(tokens, attention_mask.bool(), pooled)

    @property
    def layers(self) -> list[tuple[str, ...]]:
        return [("embedding.",)]

    def save_files(self, folder: Path) -> None:
        (folder / "alphabet.txt").write_text(self.alphabet)

    @classmethod
    def load(cls, folder: Path, options: TextEncoderOptions) -> Letters:
        return cls((folder / "alphabet.txt").read_text())


class DistanceScorer(Scorer):
    class Options(Section):
        power: Count = 2

    reads_audio_tokens = False

    def __init__(self, dim: int, power: int) -> None:
        super().__init__()
        self.power = power

    def scores(self, text: TokenSequence, audio: TokenSequence) -> Tensor:
        return -torch.cdist(normalize(text.pooled, dim=1), normalize(audio.pooled, dim=1), p=self.power)


@pytest.fixture(autouse=True)
def entries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(AUDIO_ENCODERS, "frames", Frames)
    monkeypatch.setitem(AUDIO_ENCODERS, "same_frames", partial(Frames))
    monkeypatch.setitem(TEXT_ENCODERS, "letters", Letters)
    monkeypatch.setitem(SCORERS, "distance", DistanceScorer)


def values(**model: Any) -> dict[str, Any]:
    return {
        "run": {"dir": "runs/x"},
        "data": {"train": [{"shards": "a"}]},
        "model": {
            "audio": {"name": "frames", "width": 10},
            "text": {"name": "letters", "alphabet": "ab"},
            "scorer": {"name": "distance"},
            **model,
        },
        "train": {"steps": 10},
    }


def test_16_bit_samples_reach_a_plug_in_as_floats() -> None:
    encoder = build_audio_encoder("frames", width=10)
    samples = torch.randint(-32768, 32768, (2, 350), dtype=torch.int16)  # cut into windows of 2 s
    for lengths in (None, torch.tensor([350, 120])):
        assert torch.equal(encoder(samples, lengths).tokens, encoder(samples.float() / 32768, lengths).tokens)


def test_a_retriever_of_plug_ins() -> None:
    config = parse_config(values(), "here")
    model = Retriever(config.model, config.objective)
    assert isinstance(model.audio_encoder, Frames) and isinstance(model.text_encoder, Letters)
    assert model.audio_encoder.width == 10 and model.audio_encoder.heights == (1.0, 2.0)
    assert model.audio_encoder.window == 200 and model.text_encoder.alphabet == "ab"
    assert isinstance(model.text_encoder, Letters)
    tokens = model.text_encoder.token_ids(["a", "bb"])
    batch = Batch(
        torch.randn(2, 300), torch.tensor([300, 150]), tokens["input_ids"], tokens["attention_mask"],
        torch.arange(2), torch.arange(2), torch.zeros(2, dtype=torch.int64), torch.arange(2),
    )  # fmt: skip
    loss = model(batch)["loss"]
    loss.backward()
    assert loss.isfinite() and model.audio_encoder.frame.weight.grad is not None


def test_their_options_go_through_a_saved_configuration() -> None:
    audio = {"name": "same_frames", "width": 10, "heights": [3.0], "batch_norm": "local"}
    config = parse_config(values(audio=audio, scorer={"name": "distance", "options": {"power": 1}}), "here")
    saved = yaml.safe_load(config.to_yaml())
    assert saved["model"]["audio"] | audio == saved["model"]["audio"]
    assert saved["model"]["text"]["alphabet"] == "ab" and saved["model"]["scorer"]["options"] == {"power": 1}
    assert parse_config(saved, "saved") == config


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"audio": {"name": "frames", "widht": 3}},
            "'model.audio.widht'; did you mean 'model.audio.width'?",
        ),
        ({"audio": {"name": "frames"}}, "'model.audio.width' is missing"),
        ({"audio": {"name": "frames", "width": 0}}, "'model.audio.width': Input should be greater than or equal to 1"),
        ({"audio": {"name": "mn04", "width": 3}}, "unknown key 'model.audio.width'; known keys: batch_norm, "),
        (
            {"text": {"name": "letters", "alphabets": "a"}},
            "did you mean 'model.text.alphabet'?",
        ),
        ({"text": {"name": "bert", "alphabet": "a"}}, "unknown key 'model.text.alphabet'"),
        (
            {"scorer": {"name": "distance", "options": {"pow": 1}}},
            "did you mean 'model.scorer.options.power'?",
        ),
    ],
)
def test_mistakes_are_told_as_in_any_section(model: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        parse_config(values(**model), "here")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_common_options_that_a_text_encoder_does_not_have() -> None:
    assert build_text_encoder("letters", "mean").options.pooling == "mean"
    with pytest.raises(UserError, match="the text encoder letters has no dropout: leave it at None"):
        build_text_encoder("letters", dropout=0.1)


def test_a_text_encoder_comes_back_from_its_files(tmp_path: Path) -> None:
    built = build_text_encoder("letters", "mean", alphabet="xyz")
    built.save_files(tmp_path)
    loaded = load_text_encoder(tmp_path, name="letters", pooling="mean", alphabet="xyz")
    loaded.load_state_dict(built.state_dict())
    assert isinstance(loaded, Letters)
    tokens = loaded.token_ids(["zx"])
    assert torch.equal(loaded(**tokens).pooled, built(**tokens).pooled)


def test_an_encoder_that_must_be_told_its_options_is_no_candidate_for_a_checkpoint() -> None:
    state = build_audio_encoder("frames", width=10).state_dict()
    assert fitting_encoders(state) == []


def test_a_layer_by_its_seed() -> None:
    encoder, waveform = build_audio_encoder("frames", width=10).train(), torch.randn(1, 300)
    torch.testing.assert_close(encoder(waveform, augment_seed=2).tokens, 3 * encoder(waveform).tokens)
