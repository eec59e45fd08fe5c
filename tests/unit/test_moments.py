"""Moments: the attention of each scorer by its formula, words, times, spans, and the front door."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, layer_norm, normalize

import atr_scale
from atr_scale.batch import TokenSequence
from atr_scale.config import RunConfig
from atr_scale.data.tokenizer import ReadWord
from atr_scale.errors import UserError
from atr_scale.inference import TrainedModel
from atr_scale.moments import in_order_of_time, moments_of, spans_of
from atr_scale.scorers import build_scorer
from atr_scale.scorers.co_attention import CoAttentionScorer
from atr_scale.scorers.scorer import Scorer
from atr_scale.scorers.tap import TextAwarePoolingScorer
from tests.sequences import random_sequence
from tests.tiny_run import save_run, tiny_config

DIM, WORDS, FRAMES = 6, 4, 7
RATE = 16_000


def pair() -> tuple[TokenSequence, TokenSequence]:
    """One text and one clip, each with padding behind it."""
    return random_sequence([WORDS], DIM, 1, extra=1), random_sequence([FRAMES], DIM, 2, extra=2)


def drawn(scorer: Scorer) -> Any:
    """The scorer in float64, with every parameter away from its start."""
    torch.manual_seed(0)
    scorer = scorer.double().eval()
    for parameter in scorer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return scorer


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("residual", [False, True])
def test_tap_weights_are_those_of_the_score(residual: bool) -> None:
    scorer: TextAwarePoolingScorer = drawn(build_scorer("tap", DIM, attention_dim=5, residual=residual))
    text, audio = pair()
    caption = TokenSequence.unpadded(torch.cat([text.pooled, text.tokens[0]])[None], text.pooled)
    (sentence, *words), w = scorer.attention(caption, audio), scorer.weights

    def norm(x: Tensor) -> Tensor:
        return layer_norm(x, (DIM,), w.norm_scale, w.norm_shift)

    frames = norm(audio.tokens[0, :FRAMES])
    query_bias, value_bias, out_bias = (w.query_bias, w.value_bias, w.out_bias) if residual else (0, 0, 0)

    def weights(asking: Tensor) -> Tensor:
        return ((norm(asking) @ w.query.T + query_bias) @ (frames @ w.key.T).T / math.sqrt(5)).softmax(-1)

    close(sentence[:FRAMES], weights(text.pooled[0]))
    close(torch.stack(words)[:WORDS, :FRAMES], weights(text.tokens[0, :WORDS]))
    assert not sentence[FRAMES:].any(), "padding is not heard"
    # The weights with the rest of the formula give the score.
    pooled = sentence[:FRAMES] @ (frames @ w.value.T + value_bias) @ w.out + out_bias
    if residual:
        pooled = layer_norm(pooled, (DIM,), w.inner_scale, w.inner_shift)
        pooled = pooled + pooled @ w.linear_weight.T + w.linear_bias
    score = cosine_similarity(layer_norm(pooled, (DIM,), w.scale, w.shift), text.pooled[0], dim=0)
    close(scorer.scores(text, audio)[0, 0], score)


@pytest.mark.parametrize("normalise", ["none", "clipped_l2", "clipped_l2_leaky"])
def test_lgmm_weights_give_its_scores(normalise: str) -> None:
    text, audio = pair()
    words, frames = normalize(text.tokens[0, :WORDS], dim=1), normalize(audio.tokens[0, :FRAMES], dim=1)

    def pooled(cosines: Tensor) -> Tensor:
        return (2.0 * cosines).exp().mean().log() / 2.0

    scorers = {
        direction: build_scorer("lgmm", DIM, direction=direction, normalise=normalise, lambda1=3.0, lambda2=2.0)
        for direction in ("words_over_frames", "frames_over_words", "both")
    }
    found = scorers["words_over_frames"].attention(text, audio)[:WORDS, :FRAMES]
    by_words = pooled(cosine_similarity(words, found @ frames, dim=1))
    close(by_words, scorers["words_over_frames"].scores(text, audio)[0, 0])
    for scorer in scorers.values():
        close(scorer.attention(text, audio)[:WORDS, :FRAMES], found)
    if normalise == "none":  # the norm is over all frames, so a frame alone has another one
        by_frames = pooled(scorers["frames_over_words"].scores_of_frames(text, audio)[:FRAMES])
        close(by_frames, scorers["frames_over_words"].scores(text, audio)[0, 0])


@torch.no_grad()
@pytest.mark.parametrize("guidance", ["t2a", "both"])
@pytest.mark.parametrize(("configuration", "depth"), [("single", 1), ("stacking", 3), ("iterating", 2)])
def test_co_attention_weights_are_those_inside_the_score(configuration: str, depth: int, guidance: str) -> None:
    options = {"width": 8, "heads": 2, "ffn_width": 12, "pool_width": 5, "joint": 7, "dropout": 0.0}
    scorer: CoAttentionScorer = drawn(
        build_scorer("coattention", DIM, configuration=configuration, depth=depth, guidance=guidance, **options)
    )
    text, audio = pair()
    seen: dict[str, tuple[Tensor, ...]] = {}

    def watch(name: str, module: Any) -> None:
        module.register_forward_hook(lambda _, inputs, output: seen.update({name: (*inputs, output)}))

    watch("over text", scorer.audio.guided_blocks[-1].guided_attention)
    if guidance == "both":
        watch("over audio", scorer.text.guided_blocks[-1].guided_attention)
    scorer.scores(text, audio)
    inside = dict(seen)

    def weights(name: str, module: Any) -> Tensor:
        """By head, from what went into the module; with its values they give what came out of it."""
        x, context, mask, output = inside[name]
        query, (key, value) = module.query(x)[0], module.key_value(context)[0].chunk(2, 1)
        real, heads = mask[0], [slice(0, 4), slice(4, 8)]
        by_head = [(query[:, h] @ key[real][:, h].T / 2).softmax(1) for h in heads]
        attended = torch.cat([w @ value[real][:, h] for w, h in zip(by_head, heads, strict=True)], 1)
        close(module.output(attended), output[0])
        return torch.stack(by_head).mean(0)

    found = scorer.attention(text, audio)
    if guidance == "both":
        words = weights("over audio", scorer.text.guided_blocks[-1].guided_attention)
        close(found[:WORDS, :FRAMES], words[:WORDS])
    else:
        frames = weights("over text", scorer.audio.guided_blocks[-1].guided_attention)
        close(found[:WORDS, :FRAMES], frames[:FRAMES].T)


@torch.no_grad()
@pytest.mark.parametrize("name", ["tap", "lgmm", "coattention"])
def test_a_frame_is_scored_as_a_clip_of_its_own(name: str) -> None:
    scorer = drawn(build_scorer(name, DIM))
    text, audio = pair()
    third = TokenSequence.unpadded(audio.tokens[:, 2:3], audio.pooled)
    close(scorer.scores_of_frames(text, audio)[2], scorer.scores(text, third)[0, 0])


def test_tokens_that_share_a_time_are_averaged() -> None:
    times = np.array([[0, 2], [2, 4], [1, 3], [3, 5.0]])
    found, values = in_order_of_time(times, np.array([[1, 2, 3, 4], [0, 0, 0, 8]], np.float32))
    assert found.tolist() == [[0, 1], [1, 2], [2, 3], [3, 4], [4, 5]]
    assert values.tolist() == [[1, 2, 2.5, 3, 4], [0, 0, 0, 4, 8]] and values.dtype == np.float32
    apart, same = in_order_of_time(np.array([[0, 2], [3, 5.0]]), np.array([[0.1, 0.2]], np.float32))
    assert apart.tolist() == [[0, 2], [3, 5]] and same.tolist() == np.array([[0.1, 0.2]], np.float32).tolist()


def test_words_are_means_of_their_pieces_and_scaled() -> None:
    attention = torch.tensor([[9.0, 9, 9, 9], [0.1, 0.3, 0, 9], [0.3, 0.1, 0, 9], [0, 0, 0, 9]])
    scores = torch.tensor([0.5, 0.2, 7, 9])
    times = np.array([[0, 1], [1, 2], [2, 2], [2, 3.0]])
    mask = torch.tensor([True, True, True, False])  # the third has no audio, the fourth is padding
    found = moments_of(attention, scores, [ReadWord("two", [1, 2]), ReadWord("none", [3])], mask, times)
    assert found.words == ["two", "none"] and found.times.tolist() == [[0, 1], [1, 2]]
    assert found.weights.tolist() == [[1, 1], [0, 0]] and found.scores.tolist() == pytest.approx([0.5, 0.2])


def test_spans() -> None:
    times = np.array([[0, 1], [1, 2], [2, 4], [4, 5], [5, 6], [6, 7.0]])
    best, other = spans_of(np.array([0, 0.6, 0.9, 0.4, 1, 0.3], np.float32), times)
    assert (best.start, best.stop, best.score) == (5, 6, 1)
    assert [other.start, other.stop, other.score] == pytest.approx([1, 4, 0.8])
    (everything,) = spans_of(np.full(6, 0.5, np.float32), times)
    assert (everything.start, everything.stop) == (0, 7), "equal scores name no part, and the list is not empty"


# The front door.


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("moments")


Loader = Callable[..., TrainedModel]


@pytest.fixture(scope="module")
def load(place: Path) -> Loader:
    """A model that was never trained, by its scorer. change: of its configuration."""

    def make(scorer: str, change: Callable[[RunConfig], None] = lambda config: None, **options: Any) -> TrainedModel:
        run = place / f"run-{len(list(place.iterdir()))}"
        config = tiny_config(place, run)
        change(config)
        return atr_scale.load(save_run(config, run, 1, scorer), **options)

    return make


def tone(seconds: float, rate: int = RATE) -> np.ndarray[Any, np.dtype[np.float32]]:
    samples = np.arange(round(seconds * rate)) / rate
    return (0.3 * np.sin(2 * np.pi * (300 + 200 * np.floor(samples)) * samples)).astype(np.float32)


@pytest.mark.parametrize("scorer", ["tap", "lgmm", "coattention"])
def test_the_words_of_a_text_in_a_clip(scorer: str, load: Loader) -> None:
    model = load(scorer)
    text, clip = "A low, (and)  BRIGHTER tone-12", tone(2.5, 20_000)
    found = model.moments(text, clip, sample_rate=20_000)
    assert found.words == ["A", "low,", "(and)", "BRIGHTER", "tone-12"]
    assert found.weights.shape == (5, len(found.times)) and found.weights.dtype == np.float32
    assert found.weights.min() >= 0 and found.weights.max(1).tolist() == [1] * 5
    assert found.scores.shape == (len(found.times),) and found.scores.dtype == np.float32
    assert found.times[0, 0] == 0 and found.times[-1, 1] == 2.5
    assert all(before[1] == after[0] for before, after in pairwise(found.times))
    assert found.spans and found.spans == sorted(found.spans, key=lambda span: -span.score)
    one, again = model.locate(["tone", text], clip, sample_rate=20_000)
    assert one.words == ["tone"] and one.weights.shape[0] == 1
    np.testing.assert_allclose(again.weights, found.weights, atol=1e-6)


def test_the_pieces_of_words_belong_to_them(load: Loader) -> None:
    """The row of a word of LGMM is the mean over its pieces, computed here from the encodings."""
    model = load("lgmm")
    found = model.moments("low tone-12", tone(1.0), RATE)
    ids, mask = model.tokenizer(["low tone-12"])
    pieces = model.module.text_encoder.tokenizer.convert_ids_to_tokens(ids[0])  # type: ignore[attr-defined]
    with torch.no_grad():
        words = normalize(model.module.encode_text(ids, mask).tokens[0], dim=1)
        frames = normalize(
            model.module.encode_audio(torch.tensor(tone(1.0)[None]), torch.tensor([RATE])).tokens[0], dim=1
        )
    rows = (4.0 * words @ frames.T).softmax(1)
    first = pieces.index("tone")
    expected = rows[first:-1].mean(0)  # the last piece is [SEP]
    assert pieces[:3] == ["[CLS]", "low", "tone"] and len(rows[first:-1]) > 2
    np.testing.assert_allclose(found.weights[1], expected / expected.max(), rtol=1e-4)


def test_tap_reads_each_word_as_a_text_of_its_own(load: Loader) -> None:
    model = load("tap")
    text, first, last = model.locate(["low tone", "low", "tone"], tone(2.0), RATE)
    np.testing.assert_allclose(text.weights, [first.weights[0], last.weights[0]], rtol=1e-4)
    assert abs(first.weights - last.weights).max() > 0.01 and abs(text.scores - last.scores).max() > 0.01


def test_a_text_that_is_cut_and_a_clip_in_windows(load: Loader) -> None:
    def windows(config: RunConfig) -> None:
        config.data.captions.max_tokens = 6
        config.data.captions.cleaning = "lower_no_punctuation"
        config.model.audio.window_seconds, config.model.audio.window_hop_seconds = 1.0, 0.75

    model = load("tap", windows, precision="bf16")
    found = model.moments("Low - tone! " * 500, tone(3.2), RATE)
    assert found.words == ["Low", "tone!", "Low", "tone!"], "what the model does not read is left out"
    assert found.times[-1, 1] == 3.2 and (np.diff(found.times.ravel()) >= 0).all()
    assert np.isfinite(found.weights).all() and found.weights.max() == 1
    assert model.moments("low", tone(3.2), RATE, seconds=1.0).times[-1, 1] == 1.0


@pytest.mark.parametrize("scorer", ["meanmax", "attention"])
def test_scorers_without_attention_over_frames_are_refused(scorer: str, load: Loader) -> None:
    model = load(scorer)
    assert not model.locates
    with pytest.raises(
        UserError, match=f"^moments: the scorer {scorer} of this model has no attention over frames: use"
    ):
        model.moments("low", tone(1.0), RATE)


def test_mistakes_are_named(load: Loader) -> None:
    model = load("lgmm")
    assert model.locates
    for text, audio, words in (
        (" ", tone(1.0), "text is ' '"),
        (["low"], tone(1.0), r"text is \['low'\]: give a text"),
        ("low", "missing.wav", "audio, missing.wav, cannot be read"),
        ("low", np.zeros((2, 5), np.float32), "audio has the shape"),
    ):
        with pytest.raises(UserError, match=words):
            model.moments(text, audio, RATE)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="audio is a waveform: give its sample_rate"):
        model.moments("low", tone(1.0))
