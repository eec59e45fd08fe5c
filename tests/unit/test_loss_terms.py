"""Loss terms by name, their weights and their inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from atr_scale.batch import TokenSequence
from atr_scale.errors import UserError
from atr_scale.losses import LOSS_TERMS, Budget, LossInputs, LossTerm, TermSection, build_objective, dense, tiled
from atr_scale.losses.inputs import INPUTS
from atr_scale.losses.soft_labels import SoftLabels, Teacher
from atr_scale.losses.targets import positives_mask
from atr_scale.losses.terms import PMR, PMRSection
from atr_scale.score_block import EmbeddingScores
from tests.losses import unit
from tests.sequences import random_sequence

N = 6
TAU = torch.tensor([0.1], dtype=torch.float64)
IDS = torch.tensor([[0, 10], [1, 11], [2, 12], [0, 13], [4, 14], [5, 11]])
OPTIONS: dict[str, dict[str, Any]] = {
    "nt_xent": {},
    "pmr": {"omega": 3.0, "detach_prior": False, "scale_by_batch": False},
    "cmsc": {"beta": 0.3, "beta_warmup_steps": 0, "target_temperature": None, "mode": "each"},
    "intra_modal": {},
    "distillation": {"temperature": None, "tables": ["given by the test"]},
}


WAYS = {"dense": Budget(dense=4 * N**2), "tiled": Budget(dense=4 * N**2 - 1)}


def refuse() -> Any:
    raise AssertionError("an input was made that no term needs")


def inputs(**changed: Any) -> LossInputs:
    """Scores of fixed vectors; the optional inputs refuse to be made unless given."""
    block = EmbeddingScores(unit(N, 5, 0), unit(N, 5, 1))
    return replace(LossInputs(block, TAU, IDS, refuse, refuse, refuse, refuse, refuse), **changed)


def all_inputs() -> dict[str, Callable[[], Any]]:
    return {
        "text": lambda: unit(N, 5, 2),
        "audio": lambda: unit(N, 5, 3),
        "teacher": lambda: SoftLabels.of(EmbeddingScores(unit(N, 5, 4), unit(N, 5, 5))),
    }


def sections(**terms: dict[str, Any]) -> dict[str, TermSection]:
    return {name: LOSS_TERMS[name].Section(**options) for name, options in terms.items()}


def expected() -> dict[str, Tensor]:
    """Each term of OPTIONS as the dense formula gives it."""
    scores = unit(N, 5, 0) @ unit(N, 5, 1).T
    text, audio = (x @ x.T for x in (unit(N, 5, 2), unit(N, 5, 3)))
    mask = positives_mask(IDS, IDS)
    return {
        "nt_xent": dense.nt_xent(scores, TAU, mask),
        "pmr": dense.pmr(scores, TAU, 3.0, mask),
        "cmsc": dense.cmsc(scores, text, audio, TAU, 0.3, TAU, mask),
        "intra_modal": (dense.intra_modal(text, TAU, mask) + dense.intra_modal(audio, TAU, mask)) / 2,
        "distillation": dense.distillation(scores, unit(N, 5, 4) @ unit(N, 5, 5).T, TAU),
    }


@pytest.mark.parametrize("way", WAYS)
def test_terms_are_named_and_the_loss_is_their_weighted_sum(way: str) -> None:
    weights = {name: 2.0**-n for n, name in enumerate(OPTIONS)}
    terms = {name: {"weight": weights[name], **options} for name, options in OPTIONS.items()}
    found = build_objective(sections(**terms), WAYS[way])(inputs(**all_inputs()))
    two_way = [name for name in OPTIONS if name != "intra_modal"]
    directions = [f"{name}/{direction}" for name in two_way for direction in ("t2a", "a2t")]
    assert list(found) == [*LOSS_TERMS, *directions, "loss"]
    want = expected()
    for name, value in want.items():
        assert abs(found[name] - value) < 1e-12, name
    assert abs(found["loss"] - sum(weights[name] * value for name, value in want.items())) < 1e-12
    assert found["loss"].shape == ()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["nt_xent", "pmr"])
def test_terms_of_weight_zero_are_not_computed(name: str, way: str) -> None:
    """Nor is what only they need: nothing else is made."""
    weights = dict.fromkeys(OPTIONS, 0.0) | {name: 1.0}
    terms = {key: {"weight": weights[key], **options} for key, options in OPTIONS.items()}
    found = build_objective(sections(**terms), WAYS[way])(inputs())
    assert list(found) == [name, f"{name}/t2a", f"{name}/a2t", "loss"] and found["loss"] == found[name]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "intra_modal"])
def test_directions_of_a_term(name: str, way: str) -> None:
    """They are the loss of each direction alone, whatever its share; a direction without a share has no value."""

    def found(share: float) -> dict[str, Tensor]:
        given = replace(inputs(**all_inputs()), temperature=TAU.clone().requires_grad_())
        term = {"weight": 0.5, **OPTIONS[name], "t2a_share": share}
        return build_objective(sections(**{name: term}), WAYS[way])(given)

    both, t2a, a2t = found(0.3), found(1.0), found(0.0)
    assert list(t2a) == [name, f"{name}/t2a", "loss"] and list(a2t) == [name, f"{name}/a2t", "loss"]
    for direction, alone in (("t2a", t2a), ("a2t", a2t)):
        assert abs(alone[name] - alone[f"{name}/{direction}"]) < 1e-12
        assert abs(both[f"{name}/{direction}"] - alone[name]) < 1e-12 and not both[f"{name}/{direction}"].requires_grad
    assert abs(0.3 * t2a[name] + 0.7 * a2t[name] - both[name]) < 1e-12 and abs(t2a[name] - a2t[name]) > 1e-6


@pytest.mark.parametrize("way", WAYS)
def test_directions_of_several_teachers_count_by_weight(way: str) -> None:
    """Also if one of the batch's pairs has no teacher, and if none has one."""
    known = torch.tensor([True] * (N - 1) + [False])

    def found(share: float, known: Tensor) -> dict[str, Tensor]:
        first, second = (EmbeddingScores(unit(N, 5, seed), unit(N, 5, seed + 1)) for seed in (4, 6))
        labels = SoftLabels((Teacher(first, first, 0.8, 0.1), Teacher(second, second, 0.2, 0.1)), known)
        term = {"weight": 1.0, "tables": ["given"], "t2a_share": share}
        return build_objective(sections(nt_xent={"weight": 0.0}, distillation=term), WAYS[way])(
            inputs(**{**all_inputs(), "teacher": lambda: labels})
        )

    for name, share in (("t2a", 1.0), ("a2t", 0.0)):
        alone = found(share, known)["distillation"]
        assert abs(found(0.3, known)[f"distillation/{name}"] - alone) < 1e-12 and alone > 0.1
        assert found(0.3, known & False)[f"distillation/{name}"] == 0


@pytest.mark.parametrize("way", WAYS)
def test_beta_rises_from_zero(way: str) -> None:
    given = inputs(**all_inputs())
    objective = build_objective(sections(cmsc={"weight": 1.0, "beta": 0.4, "beta_warmup_steps": 10}), WAYS[way])
    for step, beta in ((0, 0.0), (5, 0.2), (10, 0.4), (1000, 0.4)):
        value = tiled.cmsc(given.block, given.text_block, given.audio_block, TAU, beta, TAU, given.pairs)
        assert abs(objective(replace(given, step=step))["loss"] - value) < 1e-13, step


@pytest.mark.parametrize("way", WAYS)
def test_options_reach_their_terms(way: str) -> None:
    def loss(**term: dict[str, Any]) -> Tensor:
        return build_objective(sections(**term), WAYS[way])(inputs(**all_inputs()))["loss"]

    pmr = {"weight": 1.0, "omega": 3.0}
    cmsc = {"weight": 1.0, "beta": 0.3}
    distillation = {"weight": 1.0, "tables": ["given by the test"]}
    values = [
        loss(pmr=pmr),
        loss(pmr={**pmr, "scale_by_batch": True}),
        loss(pmr={**pmr, "t2a_share": 0.9}),
        loss(nt_xent={}),
        loss(nt_xent={"t2a_share": 0.9}),
        loss(cmsc=cmsc),
        loss(cmsc={**cmsc, "t2a_share": 0.9}),
        loss(cmsc={**cmsc, "mode": "add"}),
        loss(cmsc={**cmsc, "target_temperature": 0.5}),
        loss(distillation=distillation),
        loss(distillation={**distillation, "temperature": 0.5}),
    ]
    assert len({round(float(value), 6) for value in values}) == len(values)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["nt_xent", "pmr"])
def test_positives_and_their_mean_are_choices_of_the_objective(name: str, way: str) -> None:
    """IDS: one clip twice, and one caption text of two clips."""
    objective = build_objective(sections(**{name: {"weight": 1.0, **OPTIONS[name]}}), WAYS[way])
    scores = unit(N, 5, 0) @ unit(N, 5, 1).T
    by_clip, by_either = (positives_mask(ids, ids) for ids in (IDS[:, :1], IDS))
    assert by_clip.sum() == N + 2 and by_either.sum() == N + 4
    for rule, mask in (("clip", by_clip), ("clip_and_text", by_either)):
        for mean in ("queries", "pairs"):
            options = {key: value for key, value in OPTIONS[name].items() if key == "omega"}
            want = getattr(dense, name)(scores, TAU, positives=mask, positives_mean=mean, **options)
            found = objective(inputs(positives=rule, positives_mean=mean))["loss"]
            assert abs(found - want) < 1e-13, (rule, mean)


def test_a_term_is_told_both_ids_whatever_makes_a_positive() -> None:
    whole = inputs(positives="clip").whole
    assert torch.equal(whole.positives, positives_mask(IDS[:, :1], IDS[:, :1]))
    assert torch.equal(whole.clip_ids, IDS[:, 0]) and torch.equal(whole.caption_ids, IDS[:, 1])


def test_a_detached_prior_has_another_gradient() -> None:
    """The loss is the same."""
    for budget in WAYS.values():
        found = []
        for detach in (False, True):
            audio = unit(N, 5, 1).requires_grad_()
            term = PMR(PMRSection(weight=1.0, detach_prior=detach))
            term(inputs(block=EmbeddingScores(unit(N, 5, 0), audio)), budget).backward()
            assert audio.grad is not None
            found.append(audio.grad)
        assert (found[0] - found[1]).abs().max() > 1e-3


class Asking(LossTerm):
    """Takes one of everything, and has no tiled form."""

    def dense(
        self,
        scores: Tensor,
        temperature: Tensor,
        positives: Tensor,
        positives_mean: str,
        text_scores: Tensor,
        audio_scores: Tensor,
        teacher_scores: Tensor,
        soft_labels: SoftLabels[Tensor],
        clip_ids: Tensor,
        caption_ids: Tensor,
        text_embeddings: Tensor,
        audio_embeddings: Tensor,
        text_tokens: TokenSequence,
        audio_tokens: TokenSequence,
        step: int,
    ) -> Tensor:
        self.seen = dict(locals())
        return scores.sum()


def test_inputs_by_name() -> None:
    tokens = random_sequence([2, 1, 3, 1, 1, 2], 5, 7), random_sequence([4] * N, 5, 8)
    given = all_inputs() | {"text_tokens": lambda: tokens[0], "audio_tokens": lambda: tokens[1], "step": 9}
    term = Asking(TermSection(weight=1.0))
    assert set(term.inputs) == set(INPUTS)
    for budget in WAYS.values():
        term(inputs(**given), budget)
        seen = term.seen
        text, audio = unit(N, 5, 2), unit(N, 5, 3)
        for name, want in (
            ("scores", unit(N, 5, 0) @ unit(N, 5, 1).T),
            ("positives", positives_mask(IDS, IDS)),
            ("text_scores", text @ text.T),
            ("audio_scores", audio @ audio.T),
            ("teacher_scores", unit(N, 5, 4) @ unit(N, 5, 5).T),
            ("clip_ids", IDS[:, 0]),
            ("caption_ids", IDS[:, 1]),
            ("text_embeddings", text),
            ("audio_embeddings", audio),
        ):
            assert torch.equal(seen[name], want), name
        assert torch.equal(seen["soft_labels"].teachers[0].t2a, seen["teacher_scores"])
        assert seen["temperature"] is TAU and seen["step"] == 9 and seen["positives_mean"] == "queries"
        assert seen["text_tokens"] is tokens[0] and seen["audio_tokens"] is tokens[1]


def test_an_unknown_input_is_refused_when_the_class_is_made() -> None:
    with pytest.raises(UserError, match=r"Wrong\.dense asks for 'logits': known inputs are scores, temperature, "):

        class Wrong(LossTerm):
            def dense(self, scores: Tensor, logits: Tensor) -> Tensor:
                return logits.sum()


def term_both_ways(name: str, batch: int, width: int, dtype: torch.dtype, *budgets: Budget) -> list[list[Tensor]]:
    """Loss and gradients of everything, with ids that agree here and there."""
    options = {**OPTIONS[name], "weight": 1.0}
    ids = torch.stack([torch.arange(batch) % (batch - 2), torch.arange(batch) // 2 + 100], 1)
    found = []
    for budget in budgets:
        text, audio, *inside = (unit(batch, width, seed).to(dtype).requires_grad_() for seed in range(4))
        tau = TAU.to(dtype).requires_grad_()
        given = LossInputs(
            EmbeddingScores(text, audio),
            tau,
            ids,
            partial(inside.__getitem__, 0),
            partial(inside.__getitem__, 1),
            refuse,
            refuse,
            lambda: SoftLabels.of(EmbeddingScores(unit(batch, width, 4).to(dtype), unit(batch, width, 5).to(dtype))),
        )
        loss = build_objective(sections(**{name: options}), budget)(given)["loss"]
        gradients = torch.autograd.grad(loss, (text, audio, *inside, tau), allow_unused=True)
        found.append([loss.detach(), *(x for x in gradients if x is not None)])
    return found


@pytest.mark.parametrize("name", OPTIONS)
def test_dense_and_tiled_agree(name: str) -> None:
    one, other = term_both_ways(name, N, 5, torch.float64, *WAYS.values())
    assert len(one) == len(other) >= 3
    for x, y in zip(one, other, strict=True):
        assert (x - y).abs().max() < 1e-13


@pytest.mark.parametrize("batch", [1024, 1025])
@pytest.mark.parametrize("name", OPTIONS)
def test_both_ways_at_the_threshold(name: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32, as training does: the way that is taken, and its results against the other's."""
    taken = []
    term = LOSS_TERMS[name]
    whole = term.dense

    def spy(self: LossTerm, *args: Any, **kwargs: Any) -> Tensor:
        taken.append("dense")
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(term, "dense", spy)
    other = Budget(dense=0 if batch == 1024 else 2**40)
    one, two = term_both_ways(name, batch, 8, torch.float32, Budget(), other)
    assert taken == ["dense"], "of the two ways, one is dense"
    term_both_ways(name, batch, 8, torch.float32, Budget())
    assert len(taken) == (2 if batch == 1024 else 1)
    for x, y in zip(one, two, strict=True):
        assert (x - y).abs().max() <= 2e-5 * y.abs().max()


def test_mistakes() -> None:
    with pytest.raises(UserError, match="unknown loss term 'clip': known are nt_xent, pmr, cmsc"):
        build_objective({"clip": TermSection(weight=1.0)})
    with pytest.raises(UserError, match="no loss term has a positive weight"):
        build_objective(sections(nt_xent={"weight": 0.0}))
