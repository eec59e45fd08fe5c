"""A head on tokens of frozen encoders: projections, scorer and objective, as in atr_scale.model.Retriever."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from atr_scale.batch import TokenSequence
from atr_scale.config_model import ProjectionSection
from atr_scale.losses import LOSS_TERMS, LossInputs, build_objective, dense
from atr_scale.losses.soft_labels import SoftLabels
from atr_scale.losses.temperature import Temperature
from atr_scale.model import Projection, whole
from atr_scale.score_block import StoredScores
from atr_scale.scorers import build_scorer
from atr_scale.training.schedule import learning_rate
from tools.study.recipes import TEMPERATURE, WIDTH, Recipe

DISTILLATION_TEMPERATURE = 0.05  # of the paper, fixed
CLIPS_AT_ONCE = 25  # in evaluation


class Head(nn.Module):
    """Scores and loss of a recipe. A batch has B captions and B clips; rows of `ids` [B, k] decide the positives."""

    def __init__(self, audio_dim: int, text_dim: int, recipe: Recipe) -> None:
        super().__init__()
        section = ProjectionSection(kind="mlp", dim=WIDTH)
        self.audio, self.text = Projection(audio_dim, section), Projection(text_dim, section)
        self.scorer = build_scorer(recipe.scorer, WIDTH, **recipe.options)
        fixed = recipe.teacher is not None
        initial = DISTILLATION_TEMPERATURE if fixed else TEMPERATURE
        self.temperature = Temperature(initial, 0.01, 1.0, learnable=not fixed)
        terms = {name: LOSS_TERMS[name].Section(**options) for name, options in recipe.objective.items()}
        supervised = any(term.weight > 0 for term in terms.values())
        self.objective = build_objective(terms) if supervised else None
        self.distillation = recipe.distillation

    def project(self, text: TokenSequence, audio: TokenSequence) -> tuple[TokenSequence, TokenSequence]:
        return self.text(text, self.scorer.reads_text_tokens), self.audio(audio, self.scorer.reads_audio_tokens)

    def forward(
        self, text: TokenSequence, audio: TokenSequence, ids: Tensor, step: int, teachers: tuple[Tensor, ...] = ()
    ) -> Tensor:
        """The loss of a batch. teachers: scores [B, B] of each teacher; the distillation term is the mean over them."""
        text, audio = self.project(text, audio)
        scores = self.scorer.scores(text, audio)
        loss = scores.new_zeros(())
        if self.objective is not None:
            captions = whole(text, self.scorer.reads_text_tokens)
            clips = whole(audio, self.scorer.reads_audio_tokens)
            inputs = LossInputs(
                block=StoredScores(scores),
                temperature=self.temperature(),
                own_ids=ids,
                text=lambda: normalize(captions, dim=-1),
                audio=lambda: normalize(clips, dim=-1),
                text_tokens=lambda: text,
                audio_tokens=lambda: audio,
                teacher=lambda: SoftLabels.of(StoredScores(teachers[0])),
                step=step,
            )
            loss = loss + self.objective(inputs)["loss"]
        for teacher in teachers:
            term = dense.distillation(scores, teacher, DISTILLATION_TEMPERATURE)
            loss = loss + self.distillation / len(teachers) * term
        return loss

    @torch.no_grad()
    def score(self, text: TokenSequence, audio: TokenSequence) -> Tensor:
        """Scores [captions, clips] of whole splits, from the tokens of the encoders."""
        text, audio = self.project(text, audio)
        clips = torch.arange(len(audio.mask)).split(CLIPS_AT_ONCE)
        return torch.cat([self.scorer.scores(text, audio.take(some)) for some in clips], 1)


class Optimizer:
    """Adam with a linear warm-up over a tenth of the steps, then a cosine to zero. Gradients are clipped to norm 1."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, steps: int) -> None:
        self.adam = torch.optim.Adam(parameters, lr=lr)
        self.parameters, self.lr, self.steps = parameters, lr, steps

    def step(self, loss: Tensor, step: int) -> None:
        rate = learning_rate(step, peak=self.lr, warmup_steps=self.steps // 10, steps=self.steps, floor=0.0)
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.adam.step()
