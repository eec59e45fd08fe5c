"""Terms as training calls them, dense and tiled: 1, 2 and 3 ranks against the formulas in one process, in float64."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from atr_scale.batch import TokenSequence
from atr_scale.distributed.world import World
from atr_scale.losses import LOSS_TERMS, Budget, LossInputs, LossTerm, TermSection
from atr_scale.losses.directions import listening
from atr_scale.losses.soft_labels import SoftLabels, Teacher
from atr_scale.losses.targets import positives_mask
from atr_scale.losses.temperature import Temperature
from atr_scale.score_block import EmbeddingScores, StoredScores
from atr_scale.scorers.scorer import gather_sequence
from tests.losses import unit
from tests.sequences import random_sequence
from tools.ranks import run_ranks

B, D = 12, 6
WAYS = {"dense": Budget(dense=4 * B**2), "tiled": Budget(dense=0)}
TERMS: dict[str, dict[str, Any]] = {
    "nt_xent": {"t2a_share": 0.3},
    "pmr": {"omega": 4.0, "t2a_share": 0.8},
    "cmsc": {"t2a_share": 0.6, "beta": 0.4, "beta_warmup_steps": 8, "target_temperature": 0.2},
    "intra_modal": {},
    "distillation": {"tables": ["given by the test"]},
    "sigmoid": {"initial_bias": -2.0},
    "gated": {},
}
STEP = 4


class Gated(LossTerm):
    """Reads vectors, tokens and ids of the global batch; has a matrix of its own."""

    Section = TermSection

    def __init__(self, section: TermSection) -> None:
        super().__init__(section)
        self.gate = nn.Parameter(torch.linspace(-1, 1, D * D).view(D, D))

    def dense(
        self,
        text_embeddings: Tensor,
        audio_embeddings: Tensor,
        text_tokens: TokenSequence,
        audio_tokens: TokenSequence,
        clip_ids: Tensor,
        caption_ids: Tensor,
    ) -> Tensor:
        other = (clip_ids[:, None] != clip_ids) & (caption_ids[:, None] != caption_ids)
        gated = (text_embeddings @ self.gate @ audio_embeddings.T).tanh()
        words, frames = ((x.tokens * x.mask[..., None]).sum(1) for x in (text_tokens, audio_tokens))
        return (gated * other).square().mean() + (words @ self.gate @ frames.T).square().mean()


class Towers(nn.Module):
    """Vectors of both sides, token sequences, the temperature, and one term."""

    def __init__(self, name: str) -> None:
        super().__init__()
        LOSS_TERMS["gated"] = Gated
        torch.manual_seed(0)
        self.text, self.audio = nn.Linear(7, D), nn.Sequential(nn.Linear(9, 16), nn.Tanh(), nn.Linear(16, D))
        self.temperature = Temperature(0.1, 0.01, 1.0, True)
        self.term = LOSS_TERMS[name](LOSS_TERMS[name].Section(weight=1.0, **TERMS[name]))
        self.double()

    def vectors(self, rows: slice) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1)
        text, audio = (torch.randn(B, n, generator=generator, dtype=torch.float64)[rows] for n in (7, 9))
        return normalize(self.text(text), dim=1), normalize(self.audio(audio), dim=1)

    def tokens(self, rows: slice) -> tuple[TokenSequence, TokenSequence]:
        """Of other lengths on every rank, made of the parameters of both sides."""
        found, last = [], self.audio[-1]
        assert isinstance(last, nn.Linear)
        for lengths, weight, seed in (
            (list(range(1, B + 1)), self.text.weight[:, :D], 3),
            ([4] * B, last.weight[:, :D], 4),
        ):
            whole = random_sequence(lengths, D, seed, filler=0.0)
            longest = max(lengths[rows])
            found.append(
                TokenSequence((whole.tokens @ weight)[rows, :longest], whole.mask[rows, :longest], whole.pooled[rows])
            )
        return found[0], found[1]

    def gradients(self) -> dict[str, np.ndarray]:
        return {name: p.grad.numpy() for name, p in self.named_parameters() if p.grad is not None}


def ids() -> Tensor:
    """[B, 2]: one clip three times and another twice, on several ranks; a caption of two clips."""
    clip, caption = torch.arange(B), torch.arange(B) + 100
    clip[[4, 9]], clip[11] = 0, 5
    caption[7] = caption[2]
    return torch.stack([clip, caption], 1)


Found = tuple[float, dict[str, float], dict[str, np.ndarray]]  # loss, its directions, gradients


def on_ranks(name: str, way: str, stored: bool) -> Found:
    """Gradients: their sum over ranks."""
    world, model = World.current(), Towers(name)
    share = B // world.size
    rows = slice(world.rank * share, (world.rank + 1) * share)
    text, audio = model.vectors(rows)
    words, frames = model.tokens(rows)
    everything = world.gather(text)
    teacher = unit(B, 5, 98), unit(B, 5, 99)[rows]
    given = LossInputs(
        block=StoredScores(everything @ audio.T) if stored else EmbeddingScores(everything, audio),
        temperature=model.temperature(),
        own_ids=ids()[rows],
        text=lambda: text,
        audio=lambda: audio,
        text_tokens=lambda: gather_sequence(words, world, with_tokens=True),
        audio_tokens=lambda: gather_sequence(frames, world, with_tokens=True),
        teacher=lambda: SoftLabels.of(EmbeddingScores(*teacher)),
        step=STEP,
        positives="clip",
        positives_mean="pairs",
    )
    with listening() as told:
        loss = model.term(given, WAYS[way])
    loss.backward()
    return loss.item(), numbers(told), {n: world.sum(torch.from_numpy(g)).numpy() for n, g in model.gradients().items()}


def numbers(told: dict[str, Tensor]) -> dict[str, float]:
    return {direction: value.item() for direction, value in told.items()}


def in_one_process(name: str) -> Found:
    """The term's own formula on whole matrices, without anything of what makes it a term of several ranks."""
    model = Towers(name)
    text, audio = model.vectors(slice(None))
    words, frames = model.tokens(slice(None))
    teacher = unit(B, 5, 98) @ unit(B, 5, 99).T
    whole: dict[str, Callable[[], Any]] = {
        "scores": lambda: text @ audio.T,
        "temperature": model.temperature,
        "positives": lambda: positives_mask(ids()[:, :1], ids()[:, :1]),
        "positives_mean": lambda: "pairs",
        "text_scores": lambda: text @ text.T,
        "audio_scores": lambda: audio @ audio.T,
        "teacher_scores": lambda: teacher,
        "soft_labels": lambda: SoftLabels((Teacher(teacher, teacher),)),
        "clip_ids": lambda: ids()[:, 0],
        "caption_ids": lambda: ids()[:, 1],
        "text_embeddings": lambda: text,
        "audio_embeddings": lambda: audio,
        "text_tokens": lambda: words,
        "audio_tokens": lambda: frames,
        "step": lambda: STEP,
    }
    with listening() as told:
        loss = model.term.dense(**{key: whole[key]() for key in model.term.inputs})
    loss.backward()
    return loss.item(), numbers(told), model.gradients()


def cases() -> list[tuple[str, str, bool]]:
    return [(name, way, stored) for name in TERMS for way in WAYS for stored in (False, True)]


def worker(example: str) -> dict[str, Any]:
    sys.path.insert(0, example)
    __import__("sigmoid_loss")
    alone = {name: in_one_process(name) for name in TERMS} if World.current().is_main else {}
    return {"ranks": {case: on_ranks(*case) for case in cases()}, "alone": alone}


@pytest.mark.parametrize("size", [1, 2, 3])
def test_terms_equal_one_process(size: int, example: str) -> None:
    """Value, directions, and gradients of both sides, of the temperature and of the term's own parameters; duplicates
    over ranks."""
    found = run_ranks(worker, size, example)
    alone = found[0]["alone"]
    assert {"term.bias", "term.log_scale"} < alone["sigmoid"][2].keys() and "term.gate" in alone["gated"][2]
    assert {name for name in TERMS if alone[name][1]} == {"nt_xent", "pmr", "cmsc", "distillation"}
    for rank in found:
        for case, (loss, directions, gradients) in rank["ranks"].items():
            want, wanted, expected = alone[case[0]]
            assert abs(loss - want) < 1e-13, case
            assert directions == pytest.approx(wanted, rel=0, abs=1e-12), case
            assert gradients.keys() == expected.keys(), case
            for name, gradient in expected.items():
                assert np.abs(gradients[name] - gradient).max() < 1e-13, (case, name)
