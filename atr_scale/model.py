"""The retriever: two encoders, their projections to a common width, and a scorer.

Shape suffixes: B captions of the global batch, b rows of this rank, L tokens of a padded caption, T tokens, D common
width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Self

from torch import Tensor, nn
from torch.nn.functional import normalize

from atr_scale.batch import Batch
from atr_scale.config import ObjectiveSection, TemperatureSection
from atr_scale.config_model import ModelSection, ProjectionSection
from atr_scale.distributed.world import World
from atr_scale.encoders import TextEncoder, TokenSequence, build_audio_encoder, build_text_encoder
from atr_scale.errors import UserError
from atr_scale.losses import LossInputs, build_objective
from atr_scale.losses.soft_labels import SoftLabels
from atr_scale.losses.temperature import Temperature
from atr_scale.precision import Autocast, Precision, autocast
from atr_scale.products import HeadProducts
from atr_scale.score_block import ScoreBlock, at_least_fp32
from atr_scale.scorers import build_scorer
from atr_scale.scorers.pooling import mean as mean_over_tokens
from atr_scale.scorers.scorer import Scorer, gather_sequence


class Encoded(NamedTuple):
    """The encoded rows of a batch. If neither scorer nor loss reads the tokens of a side, it has none (T = 0)."""

    text: TokenSequence
    audio: TokenSequence


@dataclass(frozen=True)
class StepContext:
    """Inputs of a forward pass in training beside its batch.

    step: number of optimizer steps so far; loss terms may depend on it.
    augment_seed: seed of the random draws of the audio encoder, equal on all ranks.
    teacher: gives the soft labels of a global batch, as blocks [B, b] of all its captions with the clips of this rank.
    """

    step: int = 0
    augment_seed: int = 0
    teacher: Callable[[Batch, World], SoftLabels[ScoreBlock]] | None = None


NO_CONTEXT = StepContext()


class Projection(nn.Module):
    """Projects tokens and pooled embeddings to the common width with the same map."""

    def __init__(self, width: int, section: ProjectionSection) -> None:
        super().__init__()
        self.map: nn.Module
        if section.kind == "none":
            self.map, self.dim = nn.Identity(), width
        elif section.kind == "linear":
            self.map, self.dim = nn.Linear(width, section.dim), section.dim
        else:
            # Linear, ReLU, Linear, with a hidden width of 2048 in Mei et al. and of `dim` in WavCaps.
            hidden = section.hidden_dim or section.dim
            self.map = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, section.dim))
            self.dim = section.dim

    def forward(self, sequence: TokenSequence, with_tokens: bool) -> TokenSequence:
        """with_tokens: also project the tokens. Otherwise they keep the width of the encoder."""
        return sequence.map(self.map if with_tokens else lambda tokens: tokens, self.map)


class Retriever(nn.Module):
    """Encodes and scores captions and clips. In training it computes the loss of a global batch."""

    def __init__(
        self,
        model: ModelSection,
        objective: ObjectiveSection,
        *,
        precision: Autocast = "fp32",
        tf32: bool = False,
        head_products: HeadProducts = "ieee",
        equal_rounds: Callable[[int], int] | None = None,
        text_encoder: TextEncoder | None = None,
    ) -> None:
        """model, objective: sections of a configuration.

        precision, tf32: of the encoders (`Precision`): their autocast, set here, and their fp32 products on a GPU,
        which `encoder_products` sets. Parameters stay fp32.
        head_products: precision of the matrix products of scorer and losses, see `atr_scale.products`.
        equal_rounds: see `encode_in_buckets`.
        text_encoder: used instead of the text encoder that `model` names, which then is not loaded.
        Raises UserError if an encoder or scorer cannot be built, or if the widths of the encoders do not fit.
        """
        super().__init__()
        self.precision, self.tf32 = precision, tf32
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
        self.scorer.products = head_products
        self.scorer.precision = Precision(precision, tf32)
        self.temperature = _temperature(objective.temperature)
        self.objective = build_objective(objective.terms)
        self.positives, self.positives_mean = objective.positives, objective.positives_mean
        self.reads_audio_tokens = self.scorer.reads_audio_tokens or "audio_tokens" in self.objective.inputs
        self.reads_text_tokens = self.scorer.reads_text_tokens or "text_tokens" in self.objective.inputs

    @property
    def sample_rate(self) -> int:
        """Sample rate of the waveforms that the audio encoder takes, in Hz."""
        return self.audio_encoder.sample_rate

    @property
    def encoders_learn(self) -> bool:
        """Whether an encoder or a projection has a parameter that is trained."""
        parts = (self.audio_encoder, self.text_encoder, self.audio_projection, self.text_projection)
        return any(parameter.requires_grad for part in parts for parameter in part.parameters())

    def encode_audio(self, waveform: Tensor, lengths: Tensor, augment_seed: int = 0) -> TokenSequence:
        """Waveforms float32 or int16 [b, samples] with lengths int64 [b] -> sequence with tokens [b, T, D]."""
        with autocast(waveform.device, self.precision):
            encoded: TokenSequence = self.audio_encoder(waveform, lengths, augment_seed)
            projected: TokenSequence = self.audio_projection(encoded, self.reads_audio_tokens)
        return projected

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> TokenSequence:
        """input_ids and attention_mask, both int64 [b, L] -> sequence with tokens [b, L, D]."""
        with autocast(input_ids.device, self.precision):
            encoded: TokenSequence = self.text_encoder(input_ids, attention_mask)
            projected: TokenSequence = self.text_projection(encoded, self.reads_text_tokens)
        return projected

    def forward(
        self,
        batch: Batch,
        context: StepContext = NO_CONTEXT,
        encoded: Encoded | None = None,
        encode_only: bool = False,
        cut: Callable[[TokenSequence], TokenSequence] | None = None,
    ) -> dict[str, Tensor] | Encoded:
        """Loss terms over the global batch: scalars that are equal on all ranks.

        "loss" is their weighted sum, "temperature" is the temperature. The backward pass of "loss" gives each rank a
        part of the gradient; the gradient is the sum over ranks.

        encoded: encoded rows of the batch. If given, waveform and captions of the batch are not read.
        encode_only: return `encode(batch, context)` instead. It goes through this method because hooks on it gather
        sharded parameters.
        cut: called with each encoding, the text's first; the loss is computed from what it returns.
        """
        if encode_only:
            return self.encode(batch, context)
        if encoded is not None:
            inputs = self.loss_inputs(batch, encoded, context)
        else:
            cut = cut or (lambda sequence: sequence)
            text = cut(self._own_text(batch))
            block = self._start_block(text)  # the texts of other ranks arrive while the clips are encoded
            audio = cut(self._own_audio(batch, context))
            inputs = self.loss_inputs(batch, Encoded(text, audio), context, block(audio))
        return {**self.objective(inputs), "temperature": inputs.temperature.detach().squeeze()}

    def encode(self, batch: Batch, context: StepContext = NO_CONTEXT) -> Encoded:
        """Encode the captions and the clips of a batch.

        The encoder with more weights to learn is the later one: a backward pass takes it first, and its gradients can
        cross the network while the other one's are computed.
        """
        if self.text_learns_more:
            audio = self._own_audio(batch, context)
            return Encoded(self._own_text(batch), audio)
        return Encoded(self._own_text(batch), self._own_audio(batch, context))

    @cached_property
    def text_learns_more(self) -> bool:
        """Whether more values are trained in the text encoder than in the audio encoder."""
        text, audio = (
            count_parameters(parameter for parameter in encoder.parameters() if parameter.requires_grad)
            for encoder in (self.text_encoder, self.audio_encoder)
        )
        return text > audio

    def _own_text(self, batch: Batch) -> TokenSequence:
        text = self.encode_text(batch.input_ids, batch.attention_mask)
        return text if self.reads_text_tokens else _pooled_only(text)

    def _own_audio(self, batch: Batch, context: StepContext) -> TokenSequence:
        audio = self.encode_audio(batch.waveform, batch.lengths, context.augment_seed)
        return audio if self.reads_audio_tokens else _pooled_only(audio)

    def _start_block(self, text: TokenSequence) -> Callable[[TokenSequence], ScoreBlock]:
        """Start to send what the scorer reads of this rank's texts. The function takes the audio, and waits."""
        world, scorer = World.current(), self.scorer
        if type(scorer).block is not Scorer.block:  # a scorer of a plugin may override that alone
            return lambda audio: scorer.block(text, audio, world)
        texts = scorer.start_gather(text, world)
        return lambda audio: scorer.block_of(texts(), audio, world)

    def loss_inputs(
        self, batch: Batch, encoded: Encoded, context: StepContext = NO_CONTEXT, block: ScoreBlock | None = None
    ) -> LossInputs:
        """Inputs of the objective. encoded: the encoded rows of `batch`. block: their scores, if they are there."""
        world, (text, audio) = World.current(), encoded

        def teacher() -> SoftLabels[ScoreBlock]:
            assert context.teacher is not None, "a loss term needs a teacher and none is given"
            return context.teacher(batch, world)

        return LossInputs(
            block=block or self.scorer.block(text, audio, world),
            temperature=self.temperature(),
            own_ids=batch.ids,
            text=lambda: _unit(whole(text, self.scorer.reads_text_tokens)),
            audio=lambda: _unit(whole(audio, self.scorer.reads_audio_tokens)),
            text_tokens=lambda: gather_sequence(text, world, with_tokens=True),
            audio_tokens=lambda: gather_sequence(audio, world, with_tokens=True),
            teacher=teacher,
            step=context.step,
            positives=self.positives,
            positives_mean=self.positives_mean,
            least_temperature=self.temperature.least,
        )

    def train(self, mode: bool = True) -> Self:
        """Set training mode, except for frozen modules, whose dropout stays off."""
        super().train(mode)
        for module in self.modules():
            parameters = list(module.parameters())
            if parameters and not any(p.requires_grad for p in parameters):
                module.eval()
        return self

    def parameter_groups(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Named trainable parameters of "audio", "text" and "heads" (projections, scorer, temperature, loss)."""
        groups: dict[str, list[tuple[str, nn.Parameter]]] = {"audio": [], "text": [], "heads": []}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                group = {"audio_encoder": "audio", "text_encoder": "text"}.get(name.split(".", 1)[0], "heads")
                groups[group].append((name, parameter))
        return groups


def whole(sequence: TokenSequence, by_tokens: bool) -> Tensor:
    """One embedding [b, D] for each clip or caption: the mean over its real tokens, or the encoder's pooled embedding.

    by_tokens: whether the scorer reads the tokens. Losses inside a modality then train the embeddings that the scorer
    aligns, and not a pooled one beside them, which nothing else would train.
    """
    return mean_over_tokens(sequence) if by_tokens else sequence.pooled


def count_parameters(parameters: Iterable[nn.Parameter]) -> int:
    """Number of values in all parameters."""
    return sum(p.numel() for p in parameters)


def _temperature(section: TemperatureSection) -> Temperature:
    return Temperature(section.initial, section.minimum, section.maximum, section.learnable)


def _pooled_only(sequence: TokenSequence) -> TokenSequence:
    tokens, mask = sequence.tokens, sequence.mask
    return sequence._replace(tokens=tokens.new_zeros(len(tokens), 0, tokens.shape[2]), mask=mask[:, :0].clone())


def _unit(value: Tensor) -> Tensor:
    return normalize(at_least_fp32(value), dim=-1)
