"""The retriever: two encoders, their projections to a common width, and a scorer.

Shape suffixes: B texts of the global batch, b rows of this rank, L word pieces, T tokens, D common width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
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
from atr_scale.losses import LossInputs, build_objective
from atr_scale.losses.temperature import Temperature
from atr_scale.score_block import ScoreBlock, at_least_fp32
from atr_scale.scorers import build_scorer
from atr_scale.scorers.pooling import mean as mean_over_frames
from atr_scale.scorers.scorer import gather_sequence

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Encoded(NamedTuple):
    """What the loss reads of a batch's rows. A side whose tokens nothing reads has none (T = 0)."""

    text: TokenSequence
    audio: TokenSequence


@dataclass(frozen=True)
class StepContext:
    """What a forward of training knows beside its batch.

    step: updates made so far; terms may depend on it. augment_seed: fixes the audio encoder's draws, equal on all
    ranks. teacher: scores [B, b] of a batch, all captions of the global batch against this rank's clips.
    """

    step: int = 0
    augment_seed: int = 0
    teacher: Callable[[Batch, World], ScoreBlock] | None = None


NO_CONTEXT = StepContext()


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
        self,
        model: ModelSection,
        objective: ObjectiveSection,
        *,
        precision: str = "fp32",
        equal_rounds: Callable[[int], int] | None = None,
        text_encoder: TextEncoder | None = None,
    ) -> None:
        """precision: fp32, bf16 or fp16, what the encoders compute in; parameters stay fp32. equal_rounds: see
        `AudioEncoder`. text_encoder: in the place of the one that `model` names, which then is not loaded."""
        super().__init__()
        self.precision = precision
        self.audio_encoder = build_audio_encoder(**model.audio.model_dump(), equal_rounds=equal_rounds)
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
        self.objective = build_objective(objective.terms)
        self.reads_audio_tokens = self.scorer.reads_audio_tokens or "audio_tokens" in self.objective.inputs
        self.reads_text_tokens = self.scorer.reads_text_tokens or "text_tokens" in self.objective.inputs

    @property
    def sample_rate(self) -> int:
        """Rate of the waveforms that the audio encoder takes, Hz."""
        return self.audio_encoder.sample_rate

    def encode_audio(self, waveform: Tensor, lengths: Tensor, augment_seed: int = 0) -> TokenSequence:
        """[b, samples] float32 and [b] int64 -> tokens [b, T, D]."""
        with self._autocast(waveform):
            return self.audio_projection(self.audio_encoder(waveform, lengths, augment_seed), self.reads_audio_tokens)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> TokenSequence:
        """[b, L] int64 twice -> tokens [b, L, D]."""
        with self._autocast(input_ids):
            return self.text_projection(self.text_encoder(input_ids, attention_mask), self.reads_text_tokens)

    def forward(
        self,
        batch: Batch,
        context: StepContext = NO_CONTEXT,
        encoded: Encoded | None = None,
        encode_only: bool = False,
    ) -> dict[str, Tensor] | Encoded:
        """Loss terms over the global batch, each a scalar equal on all ranks, "loss" their weighted sum, "temperature".

        The backward of "loss" gives this rank's share of the gradient: the sum over ranks is the gradient.

        encoded: the batch as encoded before; then neither its waveform nor its captions are read.
        encode_only: `encode` instead. Both are here because hooks that gather sharded parameters sit on this call.
        """
        if encode_only:
            return self.encode(batch, context)
        inputs = self.loss_inputs(batch, encoded or self.encode(batch, context), context)
        return {**self.objective(inputs), "temperature": inputs.temperature.detach().squeeze()}

    def encode(self, batch: Batch, context: StepContext = NO_CONTEXT) -> Encoded:
        """Both sides of some rows."""
        text = self.encode_text(batch.input_ids, batch.attention_mask)
        audio = self.encode_audio(batch.waveform, batch.lengths, context.augment_seed)
        return Encoded(
            text if self.reads_text_tokens else _pooled_only(text),
            audio if self.reads_audio_tokens else _pooled_only(audio),
        )

    def loss_inputs(self, batch: Batch, encoded: Encoded, context: StepContext = NO_CONTEXT) -> LossInputs:
        """What the objective is computed from; `encoded` are the rows of `batch`."""
        world, (text, audio) = World.current(), encoded

        def teacher() -> ScoreBlock:
            assert context.teacher is not None, "a term asks for a teacher and there is none"
            return context.teacher(batch, world)

        return LossInputs(
            block=self.scorer.block(text, audio, world),
            temperature=self.temperature(),
            own_ids=batch.ids,
            text=lambda: _unit(text.pooled),
            audio=lambda: _unit(self._whole_clip(audio)),
            text_tokens=lambda: gather_sequence(text, world, with_tokens=True),
            audio_tokens=lambda: gather_sequence(audio, world, with_tokens=True),
            teacher=teacher,
            step=context.step,
        )

    def _whole_clip(self, audio: TokenSequence) -> Tensor:
        """One vector a clip [b, D] at the common width, from what the scorer reads of it."""
        return mean_over_frames(audio) if self.scorer.reads_audio_tokens else audio.pooled

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
        """Trainable parameters by the names "audio", "text" and "heads" (projections, scorer, temperature, loss)."""
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


def _pooled_only(sequence: TokenSequence) -> TokenSequence:
    tokens, mask = sequence.tokens, sequence.mask
    return sequence._replace(tokens=tokens.new_zeros(len(tokens), 0, tokens.shape[2]), mask=mask[:, :0].clone())


def _unit(value: Tensor) -> Tensor:
    return normalize(at_least_fp32(value), dim=-1)
