"""Loss terms by name, their weights and what they ask of the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from atr_scale.batch import Batch, caption_id
from atr_scale.config import RunConfig
from atr_scale.distributed.world import World
from atr_scale.errors import UserError
from atr_scale.losses import TERMS, ObjectiveInputs, build_objective, dense, tiled
from atr_scale.losses.targets import positives_mask
from atr_scale.model import Retriever
from atr_scale.score_block import EmbeddingScores, ModalityScores, ScoreBlock
from tests.losses import unit
from tests.tiny_run import tiny_config

N = 6
TAU = torch.tensor([0.1], dtype=torch.float64)
IDS = torch.tensor([[0, 10], [1, 11], [2, 12], [0, 13], [4, 14], [5, 11]])
OPTIONS: dict[str, dict[str, Any]] = {
    "nt_xent": {},
    "pmr": {"omega": 3.0, "detach_prior": False, "scale_by_batch": False},
    "cmsc": {"beta": 0.3, "beta_warmup_steps": 0, "target_temperature": None, "mode": "each"},
    "intra_modal": {},
    "distillation": {"temperature": None},
}


def refuse() -> ScoreBlock:
    raise AssertionError("a block was made that no term needs")


def inputs(**changed: Any) -> ObjectiveInputs:
    """Scores of fixed vectors; the optional blocks refuse to be made unless given."""
    plain = ObjectiveInputs(
        EmbeddingScores(unit(N, 5, 0), unit(N, 5, 1)), TAU, (IDS, IDS), refuse, refuse, teacher_block=refuse
    )
    return replace(plain, **changed)


def all_blocks() -> dict[str, Callable[[], ScoreBlock]]:
    return {
        "text_block": lambda: ModalityScores(unit(N, 5, 2)),
        "audio_block": lambda: ModalityScores(unit(N, 5, 3)),
        "teacher_block": lambda: EmbeddingScores(unit(N, 5, 4), unit(N, 5, 5)),
    }


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


def test_terms_are_named_and_the_loss_is_their_weighted_sum() -> None:
    weights = {name: 2.0**-n for n, name in enumerate(OPTIONS)}
    objective = build_objective(**{name: {"weight": weights[name], **options} for name, options in OPTIONS.items()})
    found = objective(inputs(**all_blocks()))
    assert list(found) == [*TERMS, "loss"]
    want = expected()
    for name, value in want.items():
        assert abs(found[name] - value) < 1e-12, name
    assert abs(found["loss"] - sum(weights[name] * value for name, value in want.items())) < 1e-12
    assert found["loss"].shape == ()


@pytest.mark.parametrize("name", ["nt_xent", "pmr"])
def test_terms_of_weight_zero_are_not_computed(name: str) -> None:
    """Nor is what only they need: no other block is made."""
    weights = dict.fromkeys(OPTIONS, 0.0) | {name: 1.0}
    objective = build_objective(**{key: {"weight": weights[key], **options} for key, options in OPTIONS.items()})
    found = objective(inputs())
    assert list(found) == [name, "loss"] and found["loss"] == found[name]


def test_beta_rises_from_zero() -> None:
    options = {"weight": 1.0, "beta": 0.4, "beta_warmup_steps": 10}
    blocks = all_blocks()
    objective = build_objective(cmsc=options)
    for step, beta in ((0, 0.0), (5, 0.2), (10, 0.4), (1000, 0.4)):
        value = tiled.cmsc(inputs().block, blocks["text_block"](), blocks["audio_block"](), TAU, beta, TAU, (IDS, IDS))
        assert abs(objective(inputs(step=step, **blocks))["loss"] - value) < 1e-13, step


def test_options_reach_their_terms() -> None:
    blocks = all_blocks()

    def loss(**term: dict[str, Any]) -> Tensor:
        return build_objective(**term)(inputs(**blocks))["loss"]

    pmr = {"weight": 1.0, "omega": 3.0}
    cmsc = {"weight": 1.0, "beta": 0.3}
    values = [
        loss(pmr=pmr),
        loss(pmr={**pmr, "scale_by_batch": True}),
        loss(cmsc=cmsc),
        loss(cmsc={**cmsc, "mode": "add"}),
        loss(cmsc={**cmsc, "target_temperature": 0.5}),
        loss(distillation={"weight": 1.0}),
        loss(distillation={"weight": 1.0, "temperature": 0.5}),
    ]
    assert len({round(float(value), 6) for value in values}) == len(values)


def test_mistakes() -> None:
    with pytest.raises(UserError, match="unknown loss term 'clip': known are nt_xent, pmr, cmsc"):
        build_objective(clip={"weight": 1.0})
    with pytest.raises(UserError, match="no loss term has a positive weight"):
        build_objective(nt_xent={"weight": 0.0})


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("tiny")
    return tiny_config(folder, folder / "run")


def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    captions = ["a dog barks", "rain falls", "a dog barks", "a car passes", "wind"]
    input_ids = torch.randint(5, 20, (5, 7), generator=generator)
    return Batch(
        waveform=0.1 * torch.randn(5, 16000, generator=generator),
        lengths=torch.full((5,), 16000),
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        clip_ids=torch.arange(5),
        caption_ids=torch.tensor([caption_id(caption) for caption in captions]),
        caption_index=torch.zeros(5, dtype=torch.int64),
    )


def retriever(config: RunConfig, scorer: str, **weights: float) -> Retriever:
    config = config.model_copy(deep=True)
    config.model.scorer.name = scorer
    config.objective.nt_xent.weight = 0.0
    for name, weight in weights.items():
        getattr(config.objective, name).weight = weight
    torch.manual_seed(0)
    return Retriever(config.model, config.objective).eval()


@pytest.mark.parametrize("scorer", ["pooled", "mean"])
def test_the_model_compares_whole_clips_and_captions_inside_their_modality(config: RunConfig, scorer: str) -> None:
    """Pooled vectors of the encoders, or the mean of frames where the scorer reads frames."""
    model = retriever(config, scorer, cmsc=1.0, intra_modal=0.5)
    data = batch()
    found = model(data)
    text = normalize(model.encode_text(data.input_ids, data.attention_mask).pooled, dim=1)
    sequence = model.encode_audio(data.waveform, data.lengths)
    assert sequence.mask.all()
    audio = normalize(sequence.pooled if scorer == "pooled" else sequence.tokens.mean(1), dim=1)
    mask, tau = positives_mask(data.ids, data.ids), model.temperature()
    cmsc = dense.cmsc(text @ audio.T, text @ text.T, audio @ audio.T, tau, 0.2, tau, mask)
    intra = (dense.intra_modal(text @ text.T, tau, mask) + dense.intra_modal(audio @ audio.T, tau, mask)) / 2
    assert found["cmsc"].item() == pytest.approx(cmsc.item(), rel=1e-5)
    assert found["intra_modal"].item() == pytest.approx(intra.item(), rel=1e-5)
    assert found["loss"].item() == pytest.approx((cmsc + intra / 2).item(), rel=1e-5)
    found["loss"].backward()
    for projection in (model.text_projection, model.audio_projection):
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in projection.parameters())


def test_the_model_asks_its_teacher_about_the_batch(config: RunConfig) -> None:
    model = retriever(config, "pooled", distillation=1.0)
    data = batch()
    asked: list[Batch] = []

    class Teacher:
        def block(self, rows: Batch, world: World) -> EmbeddingScores:
            asked.append(rows)
            return EmbeddingScores(unit(5, 4, 0).float(), unit(5, 4, 1).float(), world)

    model.teacher = Teacher()
    found = model(data)
    scores = model.scorer.scores(
        model.encode_text(data.input_ids, data.attention_mask), model.encode_audio(data.waveform, data.lengths)
    )
    want = dense.distillation(scores, (unit(5, 4, 0) @ unit(5, 4, 1).T).float(), model.temperature())
    assert asked == [data] and found["distillation"].item() == pytest.approx(want.item(), rel=1e-5)


def test_the_step_reaches_the_terms(config: RunConfig) -> None:
    config = config.model_copy(deep=True)
    config.objective.cmsc.beta_warmup_steps = 4
    model = retriever(config, "pooled", cmsc=1.0)
    losses = []
    for model.step in (0, 2, 4, 8):
        losses.append(model(batch())["loss"].item())
    assert losses[2] == losses[3] and len({*losses[:3]}) == 3
