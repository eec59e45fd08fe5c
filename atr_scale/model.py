"""The retriever: two encoders, their projections to a common width, and a scorer.

Shape suffixes: B texts of the global batch, b rows of this rank, L word pieces, T tokens, D common width.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from atr_scale.batch import Batch
from atr_scale.config import (
    ModelSection,
    ObjectiveSection,
    ProjectionSection,
    TemperatureSection,
)
from atr_scale.distributed.world import World
from atr_scale.encoders import TextEncoder, TokenSequence, build_audio_encoder, build_text_encoder
from atr_scale.errors import UserError
from atr_scale.losses import Objective, ObjectiveInputs, build_objective
from atr_scale.losses.temperature import Temperature
from atr_scale.score_block import ModalityScores, ScoreBlock, at_least_fp32
from atr_scale.scorers import build_scorer
from atr_scale.scorers.pooling import mean as mean_over_frames
from atr_scale.teachers.tables import TeacherEnsemble

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Encoded(NamedTuple):
    """What the loss reads of a batch's rows. A side whose tokens the scorer does not read has none (T = 0)."""

    text: TokenSequence
    audio: TokenSequence


class Projection(nn.Module):
    """A token sequence at the common width, tokens and pooled vector through the same map."""

    def __init__(self, width: int, section: ProjectionSection) -> None:
        super().__init__()
        self.map: nn.Module
        if section.kind == "none":
            self.map, self.dim = nn.Identity(), width
        elif section.kind == "linear":
            self.map, self.dim = nn.Linear(width, section.dim), section.dim
        else:
            # Mei et al. and WavCaps: Linear, ReLU, Linear at the joint width.
            self.map = nn.Sequential(nn.Linear(width, section.dim), nn.ReLU(), nn.Linear(section.dim, section.dim))
            self.dim = section.dim

    def forward(self, sequence: TokenSequence, with_tokens: bool) -> TokenSequence:
        """Tokens are projected only where the scorer reads them; otherwise they keep the encoder's width."""
        return sequence.map(self.map if with_tokens else lambda tokens: tokens, self.map)


class Retriever(nn.Module):
    """Scores any text against any audio; in training, the loss of a global batch."""

    def __init__(
        self, model: ModelSection, objective: ObjectiveSection, text_encoder: TextEncoder | None = None
    ) -> None:
        """text_encoder: in the place of the one that `model` names, which then is not loaded."""
        super().__init__()
        self.audio_encoder = build_audio_encoder(**model.audio.model_dump())
        self.text_encoder = text_encoder or build_text_encoder(
            model.text.name, **model.text.model_dump(exclude={"name"})
        )
        self.audio_projection = Projection(self.audio_encoder.dim, model.projection)
        self.text_projection = Projection(self.text_encoder.dim, model.projection)
        if self.audio_projection.dim != self.text_projection.dim:
            raise UserError(
                f"model.projection.kind is none but the encoders differ in width ({self.audio_projection.dim} and "
                f"{self.text_projection.dim}): set it to linear or mlp"
            )
        self.scorer = build_scorer(model.scorer.name, dim=self.audio_projection.dim, **model.scorer.options)
        self.temperature = _temperature(objective.temperature)
        self.objective = _objective(objective)
        self.step = 0  # updates made so far, set by the training loop: terms may depend on it
        self.teacher: TeacherEnsemble | None = None  # set before training where a term needs one
        self.augment_seed = 0  # of the audio encoder's draws, set by the engine before each loss
        self.precision = "fp32"  # or bf16, fp16: what the encoders compute in; parameters stay fp32

    @property
    def sample_rate(self) -> int:
        """Rate of the waveforms that the audio encoder takes, Hz."""
        return self.audio_encoder.sample_rate

    def encode_audio(self, waveform: Tensor, lengths: Tensor) -> TokenSequence:
        """[b, samples] float32 and [b] int64 -> tokens [b, T, D]."""
        with self._autocast(waveform):
            return self.audio_projection(
                self.audio_encoder(waveform, lengths, self.augment_seed), self.scorer.reads_frames
            )

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> TokenSequence:
        """[b, L] int64 twice -> tokens [b, L, D]."""
        with self._autocast(input_ids):
            return self.text_projection(self.text_encoder(input_ids, attention_mask), self.scorer.reads_words)

    def forward(
        self, batch: Batch, encoded: Encoded | None = None, encode_only: bool = False
    ) -> dict[str, Tensor] | Encoded:
        """Loss terms over the global batch, each a scalar equal on all ranks, "loss" their weighted sum, "temperature".

        The backward of "loss" gives this rank's share of the gradient: the sum over ranks is the gradient.

        encoded: the batch as encoded before; then neither its waveform nor its captions are read.
        encode_only: `encode` instead. Both are here because hooks that gather sharded parameters sit on this call.
        """
        if encode_only:
            return self.encode(batch)
        world = World.current()
        text, audio = encoded or self.encode(batch)
        inputs = ObjectiveInputs(
            block=self.scorer.block(text, audio, world),
            temperature=self.temperature(),
            ids=(world.gather(batch.ids), batch.ids),
            text_block=cache(lambda: ModalityScores(_unit(text.pooled), world)),
            audio_block=cache(lambda: ModalityScores(_unit(self._whole_clip(audio)), world)),
            teacher_block=lambda: self._teacher_block(batch, world),
            step=self.step,
        )
        return {**self.objective(inputs), "temperature": inputs.temperature.detach().squeeze()}

    def encode(self, batch: Batch) -> Encoded:
        """Both sides of some rows."""
        text = self.encode_text(batch.input_ids, batch.attention_mask)
        audio = self.encode_audio(batch.waveform, batch.lengths)
        return Encoded(
            text if self.scorer.reads_words else _pooled_only(text),
            audio if self.scorer.reads_frames else _pooled_only(audio),
        )

    def _whole_clip(self, audio: TokenSequence) -> Tensor:
        """One vector a clip [b, D] at the common width, from what the scorer reads of it."""
        return mean_over_frames(audio) if self.scorer.reads_frames else audio.pooled

    def _teacher_block(self, batch: Batch, world: World) -> ScoreBlock:
        assert self.teacher is not None, "distillation without a teacher"
        return self.teacher.block(batch, world)

    def train(self, mode: bool = True) -> Retriever:
        """Training mode for what is trained: frozen encoders and layers keep their dropout off."""
        super().train(mode)
        for module in self.modules():
            parameters = list(module.parameters())
            if parameters and not any(p.requires_grad for p in parameters):
                module.eval()
        return self

    def _autocast(self, like: Tensor) -> torch.autocast:
        """For the encoders alone: scores, logits and losses are fp32."""
        dtype = AUTOCAST.get(self.precision)
        return torch.autocast(like.device.type, dtype or torch.bfloat16, enabled=dtype is not None)

    def parameter_groups(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Trainable parameters by the names "audio", "text" and "heads" (projections, scorer, temperature)."""
        groups: dict[str, list[tuple[str, nn.Parameter]]] = {"audio": [], "text": [], "heads": []}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                group = {"audio_encoder": "audio", "text_encoder": "text"}.get(name.split(".", 1)[0], "heads")
                groups[group].append((name, parameter))
        return groups


def count_parameters(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def _temperature(section: TemperatureSection) -> Temperature:
    return Temperature(section.initial, section.minimum, section.maximum, section.learnable)


def _objective(section: ObjectiveSection) -> Objective:
    terms = {name: term.model_dump() for name, term in section.terms.items()}
    terms["distillation"].pop("tables")  # read by who sets `Retriever.teacher`
    return build_objective(**terms)


def _pooled_only(sequence: TokenSequence) -> TokenSequence:
    tokens, mask = sequence.tokens, sequence.mask
    return sequence._replace(tokens=tokens.new_zeros(len(tokens), 0, tokens.shape[2]), mask=mask[:, :0].clone())


def _unit(value: Tensor) -> Tensor:
    return normalize(at_least_fp32(value), dim=-1)
