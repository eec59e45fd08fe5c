"""Co-attention scores: MCAN's formulas pair by pair, no leak of the matching caption, padding, dropout, limits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, layer_norm, linear
from torch.utils._python_dispatch import TorchDispatchMode

from atr_scale.encoders import TokenSequence
from atr_scale.errors import UserError
from atr_scale.precision import Precision
from atr_scale.scorers import build_scorer
from atr_scale.scorers.scorer import Scorer
from tests.sequences import kept_numbers, random_sequence

DIM = 6
SIZES = {"width": 8, "heads": 2, "ffn_width": 12, "pool_width": 5, "joint": 7, "pairs_per_tile": 4}
WORDS, FRAMES = [3, 1, 5], [4, 6, 1, 2, 3]
SHAPES: list[dict[str, Any]] = [
    {"configuration": "single"},
    {"configuration": "stacking", "depth": 3},
    {"configuration": "iterating", "depth": 3},
    {"configuration": "single", "guidance": "both"},
    {"configuration": "stacking", "depth": 2, "guidance": "both"},
    {"configuration": "iterating", "depth": 2, "guidance": "both"},
    {"configuration": "stacking", "depth": 3, "share_weights": True},
    {"configuration": "iterating", "depth": 2, "share_weights": True, "guidance": "both"},
]


def scorer(dropout: float = 0.0, **options: Any) -> Scorer:
    """In float64, with every parameter away from its start, in evaluation mode where there is no dropout."""
    torch.manual_seed(0)
    found = build_scorer("coattention", dim=DIM, dropout=dropout, **{**SIZES, **options}).double()
    for parameter in found.parameters():
        nn.init.normal_(parameter, std=0.4)
    return found.train(dropout > 0)


def inputs(**options: Any) -> tuple[TokenSequence, TokenSequence]:
    return random_sequence(WORDS, DIM, 1, **options), random_sequence(FRAMES, DIM, 2, **options)


# The reference: one pair, no padding, no batch.


def attend(module: Any, x: Tensor, y: Tensor) -> Tensor:
    query, (key, value) = of(module.query, x), of(module.key_value, y).chunk(2, 1)
    out, size = [], x.shape[1] // SIZES["heads"]
    for head in range(SIZES["heads"]):
        part = slice(head * size, (head + 1) * size)
        out.append((query[:, part] @ key[:, part].T / math.sqrt(size)).softmax(1) @ value[:, part])
    return of(module.output, torch.cat(out, 1))


def of(module: Any, x: Tensor) -> Tensor:
    return linear(x, module.weight, module.bias)


def norm(module: Any, x: Tensor) -> Tensor:
    return layer_norm(x, x.shape[-1:], module.weight, module.bias)


def two_layers(module: Any, x: Tensor) -> Tensor:
    return of(module[3], of(module[0], x).clamp(min=0))


def self_attended(block: Any, y: Tensor) -> Tensor:
    y = norm(block.attention_norm, y + attend(block.attention, y, y))
    return norm(block.feed_forward_norm, y + two_layers(block.feed_forward, y))


def guided(block: Any, x: Tensor, y: Tensor) -> Tensor:
    x = norm(block.self_attention_norm, x + attend(block.self_attention, x, x))
    x = norm(block.guided_attention_norm, x + attend(block.guided_attention, x, y))
    return norm(block.feed_forward_norm, x + two_layers(block.feed_forward, x))


def pooled(module: Any, x: Tensor) -> Tensor:
    return of(module.projection, two_layers(module.weight, x).softmax(0).T @ x)[0]


def pair_score(module: Any, words: Tensor, frames: Tensor, configuration: str, depth: int, guidance: str) -> Tensor:
    def block(blocks: Any, layer: int) -> Any:
        return blocks[layer if len(blocks) > 1 else 0]

    def levels(side: Any, x: Tensor) -> list[Tensor]:
        found = []
        for layer in range(depth):
            x = self_attended(block(side.self_blocks, layer), x)
            found.append(x)
        return found if configuration == "stacking" else [found[-1]] * depth

    def led(side: Any, x: Tensor, guides: list[Tensor]) -> Tensor:
        for layer in range(depth):
            x = guided(block(side.guided_blocks, layer), x, guides[layer])
        return pooled(side.pooling, x)

    y, x = of(module.text.projection, words), of(module.audio.projection, frames)
    guides = levels(module.text, y)
    z_audio = led(module.audio, x, guides)
    if guidance == "both":
        z_text = led(module.text, y, levels(module.audio, x))
    else:
        z_text = pooled(module.text.pooling, guides[-1])
    return cosine_similarity(z_text, z_audio, dim=0)


def by_hand(
    module: Scorer,
    text: TokenSequence,
    audio: TokenSequence,
    configuration: str,
    depth: int = 1,
    guidance: str = "t2a",
    share_weights: bool = False,
) -> Tensor:
    clips, captions = ([t[m] for t, m in zip(x.tokens, x.mask, strict=True)] for x in (audio, text))
    rows = [
        [pair_score(module, words, frames, configuration, depth, guidance) for frames in clips] for words in captions
    ]
    return torch.stack([torch.stack(row) for row in rows])


@pytest.mark.parametrize("options", SHAPES)
def test_scores_and_gradients_equal_pairs_one_by_one(options: dict[str, Any]) -> None:
    """Of the tokens and of every parameter."""
    module, (text, audio) = scorer(**options), inputs(extra=2, gradient=True)
    found, expected = module.scores(text, audio), by_hand(module, text, audio, **options)
    assert found.shape == (len(WORDS), len(FRAMES))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weight = torch.randn_like(expected)
    leaves = [text.tokens, audio.tokens, *module.parameters()]
    got = torch.autograd.grad((found * weight).sum(), leaves)
    want = torch.autograd.grad((expected * weight).sum(), leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", SHAPES[:4])
def test_a_score_knows_nothing_but_its_pair(options: dict[str, Any]) -> None:
    """Not which caption is a clip's own, not the candidates' order, not who else is there, not the padding."""
    module, (text, audio) = scorer(**options), inputs()
    expected = module.scores(text, audio)
    for order in ([4, 1, 0, 3, 2], [2, 0], [3]):
        audios = torch.tensor(order)
        for rows in ([0, 1, 2], [2, 0, 1], [1]):
            texts = torch.tensor(rows)
            found = module.scores(text.take(texts), audio.take(audios))
            torch.testing.assert_close(found, expected[texts][:, audios], rtol=0, atol=1e-13)
    torch.testing.assert_close(module.scores(*inputs(extra=3, filler=torch.nan)), expected, rtol=0, atol=1e-13)


def test_a_clip_has_another_vector_for_every_caption() -> None:
    """One vector a clip and one a caption, both of width 2, would give scores of rank 2."""
    module = scorer(configuration="single", joint=2)
    text, audio = random_sequence([4] * 4, DIM, 1), random_sequence([5] * 4, DIM, 2)
    assert torch.linalg.svdvals(module.scores(text, audio).detach())[2] > 1e-6


@pytest.mark.parametrize("guidance", ["t2a", "both"])
def test_dropout_is_replayed_in_the_backward_pass(guidance: str) -> None:
    """The gradient is that of the function that was computed, dropped units and all."""
    module = scorer(dropout=0.3, configuration="iterating", depth=2, guidance=guidance)
    text, audio = inputs(gradient=True)
    direction = torch.randn_like(audio.tokens)

    def loss(step: float) -> Tensor:
        torch.manual_seed(7)
        moved = TokenSequence(audio.tokens + step * direction, audio.mask, audio.pooled)
        return module.scores(text, moved).sin().sum()

    first, second = (torch.autograd.grad(loss(0.0), [audio.tokens, *module.parameters()]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with torch.no_grad():
        slope = (loss(1e-6) - loss(-1e-6)) / 2e-6
    torch.testing.assert_close((first[0] * direction).sum(), slope, rtol=1e-6, atol=1e-7)
    trained, evaluated = (module.train(mode).scores(text, audio) for mode in (True, False))
    without = scorer(configuration="iterating", depth=2, guidance=guidance).scores(text, audio)
    assert torch.equal(evaluated, without) and (trained - evaluated).abs().max() > 1e-3


@pytest.mark.parametrize("options", SHAPES[2:6])
def test_nothing_real_is_finite(options: dict[str, Any]) -> None:
    module, (text, audio) = scorer(**options), inputs(gradient=True)
    text.mask[0], audio.mask[1] = False, False
    scores = module.scores(text, audio)
    scores.sum().backward()
    assert scores.isfinite().all()
    for value in (text.tokens, audio.tokens, *module.parameters()):
        assert value.grad is not None and value.grad.isfinite().all()
    assert not text.tokens.grad[0].any() and not audio.tokens.grad[1].any()  # type: ignore[index]


class Products(TorchDispatchMode):
    """dtypes of the factors of all matrix products, the backward pass and what it computes again included."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if "mm" in name or "attention" in name:
            self.dtypes |= {each.dtype for each in args[:3] if isinstance(each, Tensor)}
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("guidance", ["t2a", "both"])
@pytest.mark.slow
def test_products_have_the_precision_of_the_run(guidance: str) -> None:
    """And no other, whatever the autocast around it; scores are fp32."""
    module, (text, audio) = scorer(configuration="stacking", depth=2, guidance=guidance), inputs()
    expected = module.scores(text, audio)
    half_text, half_audio = (s.map(Tensor.bfloat16, Tensor.bfloat16) for s in (text, audio))
    module.float()
    for outside in (False, True):
        for precision, dtype, slack in (("fp32", torch.float32, 0.05), ("bf16", torch.bfloat16, 0.1)):
            module.precision = Precision(precision)  # type: ignore[arg-type]
            with Products() as products:
                with torch.autocast("cpu", torch.bfloat16, enabled=outside):
                    scores = module.scores(half_text, half_audio)
                scores.sum().backward()
            assert products.dtypes == {dtype} and scores.dtype == torch.float32
            torch.testing.assert_close(scores.double(), expected, rtol=0, atol=slack)
            assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


def test_nothing_a_pair_is_kept_for_the_backward_pass() -> None:
    module = scorer(configuration="iterating", depth=2)

    def kept(factor: int) -> int:
        text = random_sequence([4] * 4 * factor, DIM, 1, gradient=True)
        audio = random_sequence([5] * 4 * factor, DIM, 2, gradient=True)
        return kept_numbers(lambda: module.scores(text, audio))

    assert kept(4) <= 4 * kept(1)  # tokens are four times as many, pairs sixteen times


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"configuration": "double"},
            "'configuration': Input should be 'single', 'stacking' or 'iterating', got 'double'",
        ),
        ({"guidance": "a2t"}, "'guidance': Input should be 't2a' or 'both', got 'a2t'"),
        ({"configuration": "single", "depth": 2}, "depth is 2 but single has one layer: choose stacking or iterating"),
        ({"depth": 0}, "'depth': Input should be greater than or equal to 1, got 0"),
        ({"joint": 0.5}, "'joint': Input should be a valid integer, got a number with a fractional part, got 0.5"),
        ({"width": 10, "heads": 4}, "width 10 is no multiple of heads 4: change one of them"),
        ({"dropout": 1.0}, "'dropout': Input should be less than 1, got 1.0"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as raised:
        build_scorer("coattention", dim=DIM, **options)
    assert str(raised.value) == f"options of the scorer coattention: {message}"
