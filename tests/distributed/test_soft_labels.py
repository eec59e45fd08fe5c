"""The distillation term with several teachers, scores of each direction, and pairs without a teacher, over ranks.

Shape suffixes: B texts and audios of the global batch, b of this rank, n pairs that have a teacher.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from atr_scale import score_block as blocks
from atr_scale.batch import TokenSequence
from atr_scale.distributed.world import World
from atr_scale.losses import Budget, LossInputs
from atr_scale.losses.soft_labels import SoftLabels, Teacher
from atr_scale.losses.terms import Distillation, DistillationSection, TeacherTableSection
from atr_scale.score_block import EmbeddingScores, ScoreBlock, StoredScores
from tests.losses import unit
from tools.ranks import run_ranks

B, TAU = 12, 0.3
WAYS = {"dense": Budget(dense=1 << 30), "tiled": Budget(dense=0, kept=0)}
SECTION = DistillationSection(weight=1.0, tables=[TeacherTableSection(path="given by the test")], t2a_share=0.3)
KNOWN: dict[str, list[int] | None] = {
    "all": None,
    "some, none on the first rank": [6, 7, 9, 10, 11],
    "one": [8],
    "none": [],
}
# Seeds of the scores of t2a and of a2t, weight, temperature of each teacher.
TEACHERS: dict[str, list[tuple[int, int, float, float | None]]] = {
    "one": [(20, 20, 1.0, None)],
    "by direction": [(20, 30, 1.0, 0.2)],
    "probabilities": [(20, 20, 0.7, 0.1), (40, 50, 0.3, None)],
}


def scores_of(seed: int) -> tuple[Tensor, Tensor]:
    return unit(B, 5, seed), unit(B, 5, seed + 1)


def cases() -> list[tuple[str, str, str, bool]]:
    every = [(known, teachers, way, False) for known in KNOWN for teachers in TEACHERS for way in WAYS]
    return every + [("some, none on the first rank", "probabilities", way, True) for way in WAYS]


def refuse() -> TokenSequence:
    raise AssertionError("distillation reads no tokens")


def on_rank(known: str, teachers: str, way: str, stored: bool) -> tuple[float, list[np.ndarray]]:
    """The loss, and the sum over ranks of the gradients of texts, audios and temperature."""
    blocks.STRIPE_COLUMNS = 2
    world = World.current()
    rows = slice(world.rank * B // world.size, (world.rank + 1) * B // world.size)
    text, audio, temperature = unit(B, 7, 1), unit(B, 7, 2), torch.tensor([TAU], dtype=torch.float64)
    for leaf in (text, audio, temperature):
        leaf.requires_grad_()

    def block(of_texts: Tensor, of_audios: Tensor) -> ScoreBlock:
        whole = world.gather(of_texts[rows])
        return StoredScores(whole @ of_audios[rows].T) if stored else EmbeddingScores(whole, of_audios[rows])

    def labels() -> SoftLabels[ScoreBlock]:
        members = []
        for t2a, a2t, weight, own in TEACHERS[teachers]:
            first = block(*scores_of(t2a))
            members.append(Teacher(first, first if a2t == t2a else block(*scores_of(a2t)), weight, own))
        return SoftLabels(tuple(members), mask(known))

    student = block(text, audio)
    given = LossInputs(student, temperature, torch.zeros(1, 2), refuse, refuse, refuse, refuse, labels)  # type: ignore[arg-type]
    loss = Distillation(SECTION)(given, WAYS[way])
    loss.backward()
    gradients = [leaf.grad for leaf in (text, audio, temperature) if leaf.grad is not None]
    return loss.item(), [world.sum(gradient).numpy() for gradient in gradients]


def mask(known: str) -> Tensor | None:
    rows = KNOWN[known]
    return None if rows is None else torch.isin(torch.arange(B), torch.tensor(rows))


def by_hand(known: str, teachers: str) -> tuple[float, list[np.ndarray]]:
    """Query by query, from the definition; the mean is over all B queries of a direction."""
    text, audio, temperature = unit(B, 7, 1), unit(B, 7, 2), torch.tensor([TAU], dtype=torch.float64)
    for leaf in (text, audio, temperature):
        leaf.requires_grad_()
    rows = KNOWN[known]
    pairs, scores, total = torch.arange(B) if rows is None else torch.tensor(rows), text @ audio.T, 0 * temperature
    for t2a, a2t, weight, own in TEACHERS[teachers]:
        (t2a_text, t2a_audio), (a2t_text, a2t_audio) = scores_of(t2a), scores_of(a2t)
        for query in pairs.tolist():
            for share, mine, theirs in (
                (SECTION.t2a_share, scores[query, pairs], (t2a_text @ t2a_audio.T)[query, pairs]),
                (1 - SECTION.t2a_share, scores[pairs, query], (a2t_text @ a2t_audio.T)[pairs, query]),
            ):
                targets = (theirs / (own or TAU)).softmax(0)
                total = total - share * weight / B * (targets * (mine / temperature).log_softmax(0)).sum()
    total.sum().backward()
    gradients = (leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for leaf in (text, audio, temperature))
    return total.item(), [gradient.numpy() for gradient in gradients]


def every_case() -> dict[Any, Any]:
    return {case: on_rank(*case) for case in cases()}


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_loss_and_gradients_are_those_of_the_definition(size: int) -> None:
    """Dense and tiled, with pairs without a teacher, ranks that have none of them, and none in the whole batch."""
    for found in run_ranks(every_case, size) if size > 1 else [every_case()]:
        for case, (loss, gradients) in found.items():
            want, expected = by_hand(*case[:2])
            assert abs(loss - want) < 1e-13, case
            for got, gradient in zip(gradients, expected, strict=True):
                assert np.abs(got - gradient).max() < 1e-13, case
