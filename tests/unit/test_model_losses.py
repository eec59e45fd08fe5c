"""What the model gives to its loss terms: embeddings, teacher, step, tokens."""

from __future__ import annotations

import pytest
import torch
from pydantic import create_model
from torch import Tensor
from torch.nn.functional import normalize

from atr_scale.batch import Batch, TokenSequence, caption_id, stable_id
from atr_scale.config import ObjectiveSection, RunConfig
from atr_scale.distributed.world import World
from atr_scale.losses import LOSS_TERMS, LossTerm, TermSection, dense
from atr_scale.losses.soft_labels import SoftLabels
from atr_scale.losses.targets import positives_mask
from atr_scale.model import Encoded, Retriever, StepContext
from atr_scale.precision import Precision
from atr_scale.score_block import EmbeddingScores, ScoreBlock
from tests.losses import unit
from tests.tiny_run import tiny_config


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
        stored_ids=torch.tensor([stable_id(caption) for caption in captions]),
    )


def retriever(config: RunConfig, scorer: str, **weights: float) -> Retriever:
    config = config.model_copy(deep=True)
    config.model.scorer.name, config.model.text.pooling = scorer, "first"
    config.objective.nt_xent.weight = 0.0
    for name, weight in weights.items():
        config.objective.terms[name].weight = weight
    torch.manual_seed(0)
    return Retriever(config.model, config.objective).eval()


@pytest.mark.parametrize("scorer", ["pooled", "mean", "lgmm"])
def test_the_model_compares_whole_clips_and_captions_inside_their_modality(config: RunConfig, scorer: str) -> None:
    """Pooled embeddings of the encoders, or the mean over what the scorer reads: frames, and tokens of a caption."""
    model = retriever(config, scorer, cmsc=1.0, intra_modal=0.5)
    data = batch()
    found = model(data)
    words = model.encode_text(data.input_ids, data.attention_mask)
    sequence = model.encode_audio(data.waveform, data.lengths)
    assert sequence.mask.all() and words.mask.any(1).all()
    means = [torch.stack([t[m].mean(0) for t, m in zip(x.tokens, x.mask, strict=True)]) for x in (words, sequence)]
    text = normalize(means[0] if scorer == "lgmm" else words.pooled, dim=1)
    audio = normalize(sequence.pooled if scorer == "pooled" else means[1], dim=1)
    mask, tau = positives_mask(data.ids, data.ids), model.temperature()
    cmsc = dense.cmsc(model.scorer.scores(words, sequence), text @ text.T, audio @ audio.T, tau, 0.2, tau, mask)
    intra = (dense.intra_modal(text @ text.T, tau, mask) + dense.intra_modal(audio @ audio.T, tau, mask)) / 2
    assert found["cmsc"].item() == pytest.approx(cmsc.item(), rel=1e-5)
    assert found["intra_modal"].item() == pytest.approx(intra.item(), rel=1e-5)
    assert found["loss"].item() == pytest.approx((cmsc + intra / 2).item(), rel=1e-5)
    found["loss"].backward()
    for projection in (model.text_projection, model.audio_projection):
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in projection.parameters())


def test_lgmm_trains_no_embedding_that_it_does_not_align(config: RunConfig) -> None:
    """The first token's is read by nothing, so intra-modal contrast can be left out without a change elsewhere."""
    model, data = retriever(config, "lgmm", nt_xent=1.0, cmsc=1.0, intra_modal=1.0), batch()
    text, audio = model.encode(data)
    pooled = [x.pooled.detach().requires_grad_() for x in (text, audio)]
    other = [torch.randn_like(x).requires_grad_() for x in pooled]
    losses = [
        model(data, encoded=Encoded(text._replace(pooled=t), audio._replace(pooled=a))) for t, a in (pooled, other)
    ]
    assert all(torch.equal(losses[0][name], losses[1][name]) for name in losses[0])
    losses[0]["loss"].backward()
    assert all(x.grad is None or not x.grad.any() for x in pooled)


def test_the_model_asks_its_teacher_about_the_batch(config: RunConfig) -> None:
    model = retriever(config, "pooled", distillation=1.0)
    data = batch()
    asked: list[Batch] = []

    def teacher(rows: Batch, world: World) -> SoftLabels[ScoreBlock]:
        asked.append(rows)
        return SoftLabels.of(EmbeddingScores(unit(5, 4, 0).float(), unit(5, 4, 1).float(), world))

    found = model(data, StepContext(teacher=teacher))
    scores = model.scorer.scores(
        model.encode_text(data.input_ids, data.attention_mask), model.encode_audio(data.waveform, data.lengths)
    )
    want = dense.distillation(scores, (unit(5, 4, 0) @ unit(5, 4, 1).T).float(), model.temperature())
    assert asked == [data] and found["distillation"].item() == pytest.approx(want.item(), rel=1e-5)


def test_the_step_reaches_the_terms(config: RunConfig) -> None:
    config = config.model_copy(deep=True)
    config.objective.cmsc.beta_warmup_steps = 4
    model = retriever(config, "pooled", cmsc=1.0)
    losses = [model(batch(), StepContext(step))["loss"].item() for step in (0, 2, 4, 8)]
    assert losses[2] == losses[3] and len({*losses[:3]}) == 3


class Tokens(LossTerm):
    """Reads what the scorer does not."""

    def dense(self, text_tokens: TokenSequence, audio_tokens: TokenSequence) -> Tensor:
        words, frames = (x.tokens[x.mask] for x in (text_tokens, audio_tokens))
        return words.square().mean() + frames.square().mean()


def test_tokens_that_only_a_term_reads_are_projected_and_kept(config: RunConfig) -> None:
    plain, data = retriever(config, "pooled", nt_xent=1.0), batch()
    assert [x.tokens.shape[1] for x in plain.encode(data)] == [0, 0]
    terms = create_model("Terms", __base__=ObjectiveSection, tokens=(TermSection, TermSection(weight=1.0)))
    LOSS_TERMS["tokens"] = Tokens
    try:
        torch.manual_seed(0)
        model = Retriever(config.model, terms()).eval()
    finally:
        del LOSS_TERMS["tokens"]
    text, audio = model.encode(data)
    assert text.tokens.shape[2] == audio.tokens.shape[2] == 16
    want = text.tokens[text.mask].square().mean() + audio.tokens[audio.mask].square().mean()
    assert model(data)["tokens"].item() == pytest.approx(want.item(), rel=1e-6)


def test_the_precision_of_the_encoders_reaches_the_scorer(config: RunConfig) -> None:
    model = Retriever(config.model, config.objective, precision="bf16", tf32=True)
    assert model.scorer.precision == Precision("bf16", True)
