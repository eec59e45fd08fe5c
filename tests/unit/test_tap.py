"""Text-aware attention pooling: the formula pair by pair, tiles, LayerNorm's epsilon, dropout, memory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, dropout, layer_norm, normalize

from atr_scale.batch import TokenSequence
from atr_scale.checkpoint import read_weights
from atr_scale.errors import UserError
from atr_scale.scorers import build_scorer, gram_pooling, tap, tiles
from atr_scale.scorers.tap import TextAwarePoolingScorer, with_zero_biases
from tests.sequences import kept_numbers, random_sequence
from tools.bench.measure import peak_mib

DIM, ATTENTION_DIM = 24, 12
WORDS = [1] * 5
MANY_WORDS = [1] * 13  # no fewer texts than the attention is wide: tiles are computed again
# Gram matrices pay up to 11 frames at these widths, 16 with the residual block.
FRAMES = {"grams": [6, 1, 4, 2, 6, 3, 5], "dense": [6, 20, 4, 2, 6, 3, 5]}


def build(residual: bool, spread: float = 0.4, probability: float = 0.0) -> TextAwarePoolingScorer:
    scorer = TextAwarePoolingScorer(DIM, ATTENTION_DIM, residual, probability).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in scorer.parameters():
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
    return scorer


def vector(scorer: TextAwarePoolingScorer, caption: Tensor, frames: Tensor, kept: Tensor | float = 1.0) -> Tensor:
    """z [D] of one pair, by the paper: caption [D], real frames [T, D]; `kept` is dropout's factor."""
    w = scorer.weights

    def norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * scale + shift

    biases = (w.query_bias, w.value_bias, w.out_bias) if w.residual else (0, 0, 0)
    query = norm(caption, w.norm_scale, w.norm_shift) @ w.query.T + biases[0]
    inputs = norm(frames, w.norm_scale, w.norm_shift)
    attention = (inputs @ w.key.T @ query / math.sqrt(ATTENTION_DIM)).softmax(0)
    pooled = attention @ (inputs @ w.value.T + biases[1]) @ w.out + biases[2]
    if w.residual:
        pooled = norm(pooled, w.inner_scale, w.inner_shift)
        pooled = pooled + kept * (pooled @ w.linear_weight.T + w.linear_bias)
    return norm(pooled, w.scale, w.shift)


def by_hand(scorer: TextAwarePoolingScorer, text: TokenSequence, audio: TokenSequence) -> Tensor:
    rows = [
        [
            normalize(caption, dim=0) @ normalize(vector(scorer, caption, tokens[mask]), dim=0)
            for tokens, mask in zip(audio.tokens, audio.mask, strict=True)
        ]
        for caption in text.pooled
    ]
    return torch.stack([torch.stack(row) for row in rows])


def assert_equal_with_gradients(found: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weight = torch.randn(found.shape, dtype=torch.float64)
    for got, want in zip(*(torch.autograd.grad((s * weight).sum(), leaves) for s in (found, expected)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("words", "tile"), [(WORDS, (1024, 2**19)), (WORDS, (2, 40)), (WORDS, (3, 1)), (MANY_WORDS, (5, 60))]
)
@pytest.mark.parametrize("spread", [0.4, 1e-3])
@pytest.mark.parametrize("kind", FRAMES)
@pytest.mark.parametrize("residual", [False, True])
def test_scores_and_gradients_equal_the_formula(
    residual: bool, kind: str, spread: float, words: list[int], tile: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parameters of 1e-3 leave variances far below LayerNorm's epsilon, which must then be in the right places."""
    monkeypatch.setattr(tiles, "CPU_TEXTS_PER_TILE", tile[0])
    monkeypatch.setattr(tiles, "CPU_TILE_NUMBERS", tile[1])
    scorer = build(residual, spread)
    text, audio = random_sequence(words, DIM, 1), random_sequence(FRAMES[kind], DIM, 2, extra=1, gradient=True)
    assert (audio.tokens.shape[1] <= scorer.weights.most_frames) == (kind == "grams")
    leaves = [text.pooled.requires_grad_(), audio.tokens, *scorer.parameters()]
    assert_equal_with_gradients(scorer.scores(text, audio), by_hand(scorer, text, audio), leaves)


class XPool(nn.Module):
    """The pooling block as X-Pool's paper and code describe it, with every module that it has there."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out, self.linear = (nn.Linear(DIM, DIM) for _ in range(5))
        self.first, self.second, self.third = (nn.LayerNorm(DIM) for _ in range(3))

    def forward(self, text: Tensor, video: Tensor) -> Tensor:
        """Captions [i, D] and frames [f, D] of one clip -> its pooled vectors [i, D]."""
        text, video = self.first(text), self.first(video)
        weights = (self.q(text) @ self.k(video).T / math.sqrt(DIM)).softmax(1)
        attended = self.second(self.out(weights @ self.v(video)))
        pooled: Tensor = self.third(attended + self.linear(attended))
        return pooled


@pytest.mark.parametrize("frames", [[6, 1, 4], [6, 70, 4]])  # Gram matrices, vectors
def test_the_residual_block_is_that_of_x_pool(frames: list[int]) -> None:
    """At random biases, those of the keys included."""
    block, generator = XPool().double(), torch.Generator().manual_seed(5)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    scorer = TextAwarePoolingScorer(DIM, DIM, residual=True, dropout=0.0).double()
    parts = {
        "norm_scale": block.first.weight, "norm_shift": block.first.bias,
        "query": block.q.weight, "query_bias": block.q.bias, "key": block.k.weight,
        "value": block.v.weight, "value_bias": block.v.bias,
        "out": block.out.weight.T, "out_bias": block.out.bias,
        "inner_scale": block.second.weight, "inner_shift": block.second.bias,
        "linear_weight": block.linear.weight, "linear_bias": block.linear.bias,
        "scale": block.third.weight, "shift": block.third.bias,
    }  # fmt: skip
    scorer.weights.load_state_dict(parts)
    text, audio = random_sequence(WORDS, DIM, 1), random_sequence(frames, DIM, 2)
    assert (max(frames) <= scorer.weights.most_frames) == (max(frames) == 6)
    for j, (tokens, mask) in enumerate(zip(audio.tokens, audio.mask, strict=True)):
        expected = cosine_similarity(block(text.pooled, tokens[mask]), text.pooled)
        torch.testing.assert_close(scorer.scores(text, audio)[:, j], expected, rtol=0, atol=1e-12)


def test_weights_of_version_0_2_have_zero_biases(tmp_path: Path) -> None:
    """It left them out of X-Pool's block; the paper's own pooling has none."""
    for residual in (False, True):
        scorer = build(residual)
        new = {f"scorer.{name}": value for name, value in scorer.state_dict().items()}
        old = {
            name: value for name, value in new.items() if not name.endswith(("query_bias", "value_bias", "out_bias"))
        }
        assert (len(new) - len(old)) == 3 * residual
        save_file({name: value.contiguous() for name, value in old.items()}, tmp_path / "model.safetensors")
        completed = read_weights(tmp_path)
        assert completed.keys() == new.keys() and with_zero_biases(new) is new
        fresh = build(residual, spread=0.1)
        fresh.load_state_dict({name.removeprefix("scorer."): value for name, value in completed.items()})
        assert all(not value.any() for name, value in completed.items() if name not in old)
        assert all(torch.equal(fresh.state_dict()[name.removeprefix("scorer.")], value) for name, value in old.items())


def test_gram_matrices_are_left_where_they_stop_paying() -> None:
    for residual, longest in ((False, 511), (True, 724)):
        scorer = build_scorer("tap", 1024, residual=residual)
        assert isinstance(scorer, TextAwarePoolingScorer)
        assert scorer.weights.most_frames == longest and f"Gram matrices up to {longest} frames" in repr(scorer)


def test_repr_says_that_dropout_takes_vectors() -> None:
    scorer = build(True, probability=0.3)
    assert "a vector for each pair because of dropout 0.3" in repr(scorer)
    assert "Gram matrices up to" in repr(scorer.eval())


def test_dropout_is_that_of_the_formula_and_is_replayed() -> None:
    """Every number of every pair is drawn; backward must meet the same draws, or the gradients differ."""
    scorer, probability = build(True, probability=0.3), 0.3
    text, audio = random_sequence(WORDS, DIM, 1), random_sequence(FRAMES["grams"], DIM, 2, gradient=True)
    torch.manual_seed(4)
    kept = dropout(torch.ones(len(audio.mask), len(WORDS), DIM, dtype=torch.float64), probability)
    expected = torch.stack(
        [
            normalize(vector(scorer, text.pooled[i], audio.tokens[j][audio.mask[j]], kept[j, i]), dim=0)
            @ normalize(text.pooled[i], dim=0)
            for i in range(len(WORDS))
            for j in range(len(audio.mask))
        ]
    ).view(len(WORDS), -1)
    torch.manual_seed(4)
    found = scorer.scores(text, audio)
    torch.manual_seed(5)
    assert_equal_with_gradients(found, expected, [audio.tokens, *scorer.parameters()])
    assert not torch.allclose(scorer.scores(text, audio), found, atol=1e-3)
    torch.testing.assert_close(scorer.eval().scores(text, audio), by_hand(scorer, text, audio), rtol=0, atol=1e-12)


def test_training_starts_from_dot_products_of_normalised_inputs() -> None:
    """X-Pool's identity start: with K = D nothing is projected away, the pooled vector is a mean of frames."""
    scorer = build_scorer("tap", DIM, attention_dim=DIM, residual=True).double()
    text, audio = random_sequence(WORDS, DIM, 1), random_sequence(FRAMES["grams"], DIM, 2)
    asked = layer_norm(text.pooled, (DIM,))
    for j, (tokens, mask) in enumerate(zip(audio.tokens, audio.mask, strict=True)):
        frames = layer_norm(tokens[mask], (DIM,))
        mean = (asked @ frames.T / math.sqrt(DIM)).softmax(1) @ frames
        expected = (normalize(layer_norm(mean, (DIM,)), dim=1) * normalize(text.pooled, dim=1)).sum(1)
        found = scorer.scores(text, audio)[:, j]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # the orthonormal start is made in fp32


@pytest.mark.parametrize("residual", [False, True])
def test_fp32_is_near_float64(residual: bool) -> None:
    scorer = build(residual)
    text, audio = random_sequence(WORDS, DIM, 1), random_sequence(FRAMES["grams"], DIM, 2)
    expected = scorer.scores(text, audio)
    narrow = [TokenSequence(s.tokens.float(), s.mask, s.pooled.float()) for s in (text, audio)]
    torch.testing.assert_close(scorer.float().scores(*narrow).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("words", [WORDS, MANY_WORDS])
@pytest.mark.parametrize("residual", [False, True])
def test_kept_tiles_change_nothing_but_the_work(
    residual: bool, words: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer, made = build(residual), list[int]()
    original = gram_pooling._Tile.of

    def counted(*arguments: Any) -> Any:
        made.append(1)
        return original(*arguments)

    monkeypatch.setattr(gram_pooling._Tile, "of", counted)
    monkeypatch.setattr(tap, "GROUP", 1000)
    monkeypatch.setattr(tiles, "CPU_TILE_NUMBERS", 2 * len(words) * 7)
    text, audio = random_sequence(words, DIM, 1), random_sequence(FRAMES["grams"], DIM, 2, gradient=True)
    found, work = list[tuple[Tensor, ...]](), list[int]()
    for budget in (0, 100 * 8 * len(words), 2**30):  # no tile, some tiles, all tiles
        monkeypatch.setattr(tiles, "CPU_KEPT_BYTES", budget)
        made.clear()
        scores = scorer.scores(text, audio)
        found.append((scores, *torch.autograd.grad(scores.sin().sum(), [audio.tokens, *scorer.parameters()])))
        work.append(len(made))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    assert work[0] == 2 * work[2] and work[2] < work[1] < work[0]


def test_a_graph_that_is_kept_gives_its_gradient_again() -> None:
    """A tile is used up by the first backward pass, and computed again in the second."""
    scorer = build(True)
    text, audio = random_sequence(WORDS, DIM, 1), random_sequence(FRAMES["grams"], DIM, 2, gradient=True)
    loss = scorer.scores(text, audio).sin().sum()
    first, second = (torch.autograd.grad(loss, audio.tokens, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-14)


def test_neither_pairs_of_vectors_nor_of_frames_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "CPU_KEPT_BYTES", 0)
    monkeypatch.setattr(tiles, "CPU_TILE_NUMBERS", 2**13)
    scorer, texts, clips, frames = build(True), 1600, 120, 8
    text, audio = random_sequence([1] * texts, DIM, 1), random_sequence([frames] * clips, DIM, 2, gradient=True)
    with torch.no_grad():
        scorer.scores(text.take(torch.arange(9)), audio)  # parameters' products are made
    alone = peak_mib(lambda: scorer.scores(text.take(torch.arange(300)), audio))
    assert peak_mib(lambda: scorer.scores(text, audio)) - alone < texts * clips * frames * 8 / 2**20
    assert kept_numbers(lambda: scorer.scores(text, audio)) < texts * clips * frames / 2


def test_options_out_of_range() -> None:
    for options, message in (
        ({"attention_dim": 0}, "'attention_dim': Input should be greater than or equal to 1, got 0"),
        ({"residual": True, "dropout": 1.0}, r"'dropout': Input should be less than 1, got 1.0"),
        ({"dropout": 0.3}, "dropout is part of the residual block"),
    ):
        with pytest.raises(UserError, match=message):
            build_scorer("tap", dim=DIM, **options)
