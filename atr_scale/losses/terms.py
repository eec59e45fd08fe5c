"""Loss terms as modules. A term computes its dense formula, or a tiled form, for the global batch over all ranks.

A new term is a class here or in a plug-in, and an entry of LOSS_TERMS; docs/extending.md shows one, docs/losses.md has
the list.
"""

from __future__ import annotations

import inspect
import re
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from atr_scale.errors import UserError
from atr_scale.losses import dense, tiled
from atr_scale.losses.directions import tell, weighed
from atr_scale.losses.inputs import INPUTS, LossInputs
from atr_scale.losses.soft_labels import SoftLabels
from atr_scale.losses.targets import PositivesMean
from atr_scale.sections import Location, NonNegative, Positive, Section, Share

# The dense formula is used if one B x B matrix of fp32 takes no more bytes than this, which is up to B = 1,024. Below,
# the tiled form saves little or no time, and a few such matrices take little memory. Forward and backward on one CPU
# thread, d = 1,024, in ms, tiled/dense: B = 256 7/6 (NT-Xent) and 11/7 (PMR); 1,024 80/88 and 137/104; 4,096
# 1,292/1,852 and 2,275/2,795.
DENSE_BYTES = 4 * 2**20


class Budget(NamedTuple):
    """Bytes that decide how terms are computed.

    dense: the dense formula is used if one B x B matrix of fp32 takes no more. kept: what a tiled loss keeps for its
    backward pass; by default `tiles.loss_bytes`.
    """

    dense: int = DENSE_BYTES
    kept: int | None = None

    def allows_dense(self, texts: int) -> bool:
        """Whether a term with a tiled form uses its dense formula for a global batch of `texts` texts."""
        return 4 * texts**2 <= self.dense


DEFAULT_BUDGET = Budget()


class TermSection(Section):
    """Options that every loss term has."""

    weight: NonNegative = Field(0.0, description="factor of the term in the loss; 0 leaves it out")


class LossTerm(nn.Module):
    """A scalar loss of the global batch.

    A subclass sets `Section`, its options, and has `dense`, the formula on whole matrices. The names of the parameters
    of `dense` are the inputs that it needs, out of `WholeInputs`: no other input is computed or sent between ranks. An
    unknown name raises UserError when the class is defined. A subclass may have `tiled`, a form for large batches.
    Parameters of a term are trained in the group "heads" and saved with the model; each needs at least one dimension.

    section: the options of this term. inputs: the names of the parameters of `dense`.
    """

    Section: ClassVar[type[TermSection]] = TermSection
    inputs: ClassVar[tuple[str, ...]] = ()
    section: TermSection

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if not (isinstance(cls.Section, type) and issubclass(cls.Section, TermSection)):
            raise UserError(f"{cls.__name__}.Section is {cls.Section!r}: give a subclass of TermSection")
        if cls.dense is LossTerm.dense:  # a base of others
            return
        names = list(inspect.signature(cls.dense).parameters)
        if not isinstance(inspect.getattr_static(cls, "dense"), staticmethod | classmethod):
            del names[0]
        for name in names:
            if name not in INPUTS:
                raise UserError(f"{cls.__name__}.dense asks for {name!r}: known inputs are {', '.join(INPUTS)}")
        cls.inputs = tuple(names)

    def __init__(self, section: TermSection) -> None:
        super().__init__()
        if type(self).dense is LossTerm.dense:
            raise UserError(f"{type(self).__name__} has no method dense: give it the formula on whole matrices")
        self.section = section

    def dense(self, *args: Any, **kwargs: Any) -> Tensor:
        """The formula on whole matrices, a scalar; its parameters are attributes of `WholeInputs`."""
        raise NotImplementedError

    def tiled(self, inputs: LossInputs, kept_bytes: int | None) -> Tensor | None:
        """The same loss without a B x B matrix, for large batches; None if there is no such form.

        The same value on every rank; its backward pass yields this rank's part of the gradient. kept_bytes: see
        `Budget`.
        """
        return None

    def forward(self, inputs: LossInputs, budget: Budget = DEFAULT_BUDGET) -> Tensor:
        """The loss of the global batch, the same on every rank.

        The backward pass yields this rank's part of the gradient of encoders, temperature and the term's parameters;
        the sum over ranks is the gradient. In the dense form every rank computes the whole loss from the same matrices,
        and a gather sums the gradients of all ranks: hence the factor 1 / world size on the gradient.
        """
        if not budget.allows_dense(inputs.block.shape[0]):
            loss = self.tiled(inputs, budget.kept)
            if loss is not None:
                return loss
        loss = self.dense(**{name: getattr(inputs.whole, name) for name in self.inputs})
        return loss.detach() + (loss - loss.detach()) / inputs.block.world.size


class TwoWaySection(TermSection):
    """Options of every term that has a direction t2a and a direction a2t."""

    t2a_share: Annotated[float, Field(ge=0, le=1)] = Field(
        0.5, description="part of the term that is its text-to-audio direction; the rest is audio-to-text"
    )


class NTXentSection(TwoWaySection):
    weight: NonNegative = Field(1.0, description="factor of the term in the loss; 0 leaves it out")


class NTXent(LossTerm):
    """`dense.nt_xent`."""

    Section = NTXentSection
    section: NTXentSection

    def dense(self, scores: Tensor, temperature: Tensor, positives: Tensor, positives_mean: PositivesMean) -> Tensor:
        return dense.nt_xent(scores, temperature, positives, self.section.t2a_share, positives_mean)

    def tiled(self, inputs: LossInputs, kept_bytes: int | None) -> Tensor:
        share, mean, least = self.section.t2a_share, inputs.positives_mean, inputs.lowest_temperature
        return tiled.nt_xent(inputs.block, inputs.temperature, inputs.pairs, kept_bytes, share, mean, least)


class PMRSection(TwoWaySection):
    omega: Positive = Field(5.0, description="inverse temperature of the prior's softmax")
    detach_prior: bool = Field(False, description="whether the prior is constant, without a gradient through it")
    scale_by_batch: bool = Field(
        False, description="whether the prior is multiplied by its number of candidates (CAMoE)"
    )


class PMR(LossTerm):
    """`dense.pmr`."""

    Section = PMRSection
    section: PMRSection

    def dense(self, scores: Tensor, temperature: Tensor, positives: Tensor, positives_mean: PositivesMean) -> Tensor:
        return dense.pmr(scores, temperature, positives=positives, **self._options(positives_mean))

    def tiled(self, inputs: LossInputs, kept_bytes: int | None) -> Tensor:
        options = {**self._options(inputs.positives_mean), "least_temperature": inputs.lowest_temperature}
        return tiled.pmr(inputs.block, inputs.temperature, positives=inputs.pairs, **options)

    def _options(self, positives_mean: PositivesMean) -> dict[str, Any]:
        return {**self.section.model_dump(exclude={"weight"}), "positives_mean": positives_mean}


class CMSCSection(TwoWaySection):
    beta: Share = Field(0.2, description="part of the targets that comes from similarities inside a modality")
    beta_warmup_steps: Annotated[int, Field(ge=0)] = Field(
        0, description="optimizer steps over which beta rises from 0"
    )
    beta_warmup_epochs: NonNegative | None = Field(
        None, description="length of beta's rise in epochs, instead of beta_warmup_steps; training turns it into steps"
    )
    target_temperature: Positive | None = Field(
        None, description="temperature of these similarities; default: the model's"
    )
    mode: Literal["each", "add"] = Field(
        "each", description="each: similarities of texts for t2a, of audios for a2t; add: their mean for both"
    )

    @model_validator(mode="after")
    def one_warmup(self) -> CMSCSection:
        if self.beta_warmup_steps and self.beta_warmup_epochs is not None:
            raise ValueError("give beta_warmup_steps or beta_warmup_epochs: set the steps to 0, or the epochs to null")
        return self


class CMSC(LossTerm):
    """`dense.cmsc` with a warm-up of beta."""

    Section = CMSCSection
    section: CMSCSection

    def dense(
        self,
        scores: Tensor,
        text_scores: Tensor,
        audio_scores: Tensor,
        temperature: Tensor,
        positives: Tensor,
        step: int,
    ) -> Tensor:
        return dense.cmsc(
            scores,
            text_scores,
            audio_scores,
            temperature,
            self._beta(step),
            self._target_temperature(temperature),
            positives,
            self.section.mode,
            self.section.t2a_share,
        )

    def tiled(self, inputs: LossInputs, kept_bytes: int | None) -> Tensor:
        return tiled.cmsc(
            inputs.block,
            inputs.text_block,
            inputs.audio_block,
            inputs.temperature,
            self._beta(inputs.step),
            self._target_temperature(inputs.temperature),
            inputs.pairs,
            self.section.mode,
            kept_bytes,
            self.section.t2a_share,
            inputs.lowest_temperature,
        )

    def _beta(self, step: int) -> float:
        warmup = self.section.beta_warmup_steps
        return self.section.beta * (min(1.0, step / warmup) if warmup else 1.0)

    def _target_temperature(self, temperature: Tensor) -> float | Tensor:
        return temperature if self.section.target_temperature is None else self.section.target_temperature


class IntraModalSection(TermSection):
    """Options of the contrast inside each modality; the weight is gamma of arXiv 2403.10146."""


class IntraModal(LossTerm):
    """The mean of `dense.intra_modal` over texts and audios."""

    Section = IntraModalSection

    def dense(self, text_scores: Tensor, audio_scores: Tensor, temperature: Tensor, positives: Tensor) -> Tensor:
        both = [dense.intra_modal(scores, temperature, positives) for scores in (text_scores, audio_scores)]
        return torch.stack(both).mean()

    def tiled(self, inputs: LossInputs, kept_bytes: int | None) -> Tensor:
        both = [
            tiled.intra_modal(block, inputs.temperature, inputs.pairs, kept_bytes, inputs.lowest_temperature)
            for block in (inputs.text_block, inputs.audio_block)
        ]
        return torch.stack(both).mean()


class TeacherTableSection(Section):
    """One teacher of an ensemble."""

    path: Location = Field(description="file of a teacher table, as `atr-scale estimate` writes it")
    weight: Positive = Field(1.0, description="weight of the teacher; those of all teachers are scaled to sum 1")
    temperature: Positive | None = Field(
        None, description="temperature of the teacher's scores; default: that of the term"
    )


class DistillationSection(TwoWaySection):
    tables: list[TeacherTableSection] = Field(
        [], description="teacher tables: files, or mappings of path, weight and temperature"
    )
    temperature: Positive | None = Field(None, description="temperature of student and teachers; default: the model's")
    ensemble: Literal["cosines", "probabilities"] = Field(
        "cosines", description="what is averaged over teachers: their scores, or the softmaxes of these"
    )
    targets: Literal["estimated", "true", "random", "uniform"] = Field(
        "estimated",
        description="scores that give the soft labels: of tables, grades of a relevance file, of random embeddings, "
        "or all equal",
    )
    relevance: Location | None = Field(
        None, description="file of graded relevance for targets true: DCASE's CSV file, or an npz file"
    )
    missing: Literal["refuse", "skip"] = Field(
        "refuse", description="pairs without a teacher: refuse to train, or leave them out of this term"
    )

    @field_validator("tables", mode="before")
    @classmethod
    def paths_alone(cls, tables: Any) -> Any:
        """A table that is given as its path."""
        return [{"path": x} if isinstance(x, str) else x for x in tables] if isinstance(tables, list) else tables

    @field_validator("targets", mode="before")
    @classmethod
    def true_is_a_word(cls, targets: Any) -> Any:
        """YAML reads `true` as a truth value."""
        return "true" if targets is True else targets

    @model_validator(mode="after")
    def has_teachers(self) -> DistillationSection:
        if self.weight == 0:
            return self
        if self.targets == "estimated" and not self.tables:
            raise ValueError("distillation needs teachers: give tables that `atr-scale estimate` has written")
        if self.targets == "true" and not self.relevance:
            raise ValueError("targets: true reads grades: give their file in relevance")
        own = {table.temperature is None for table in self.tables}
        if self.ensemble == "cosines" and len(own) == 2 and self.temperature is None:
            raise ValueError(
                "some tables have a temperature and others the model's, which cannot be one mean of scores: give every "
                "table a temperature, or ensemble=probabilities"
            )
        return self


class Distillation(LossTerm):
    """`dense.distillation` of the teachers, whose scores the training loop looks up in the teacher tables.

    Its loss is the sum over teachers by weight. It is a mean over all pairs of the batch, to which a pair without a
    teacher adds zero.
    """

    Section = DistillationSection
    section: DistillationSection

    def dense(self, scores: Tensor, soft_labels: SoftLabels[Tensor], temperature: Tensor) -> Tensor:
        own, share = self._temperature(temperature), soft_labels.share(len(scores))
        if not share:
            return self._nothing(scores.sum() + temperature.sum())
        student, t2a_share = soft_labels.matrix(scores), self.section.t2a_share
        losses = []
        for teacher in (each.map(soft_labels.matrix) for each in soft_labels.teachers):
            of_teacher = teacher.temperature_or(own)
            with weighed(share * teacher.weight):
                loss = dense.distillation(student, teacher.t2a, own, of_teacher, teacher.a2t, t2a_share)
            losses.append(teacher.weight * loss)
        return share * torch.stack(losses).sum()

    def tiled(self, inputs: LossInputs, kept_bytes: int | None) -> Tensor:
        own, labels = self._temperature(inputs.temperature), inputs.soft_labels
        share = labels.share(inputs.block.shape[0])
        if not share:
            return self._nothing(
                torch.stack([tensor.sum() for tensor in (inputs.temperature, *inputs.block.tensors)]).sum()
            )
        student, t2a_share, least = labels.block(inputs.block), self.section.t2a_share, inputs.lowest_temperature
        losses = []
        for teacher in (each.map(labels.block) for each in labels.teachers):
            a2t = None if teacher.a2t is teacher.t2a else teacher.a2t
            temperature = teacher.temperature_or(own)
            with weighed(share * teacher.weight):
                loss = tiled.distillation(student, teacher.t2a, own, temperature, a2t, kept_bytes, t2a_share, least)
            losses.append(teacher.weight * loss)
        return share * torch.stack(losses).sum()

    def _nothing(self, value: Tensor) -> Tensor:
        """0, in which every parameter that `value` depends on keeps its place in the graph."""
        tell(0 * value, 0 * value, self.section.t2a_share)
        return 0 * value

    def _temperature(self, temperature: Tensor) -> float | Tensor:
        return temperature if self.section.temperature is None else self.section.temperature


LOSS_TERMS: dict[str, type[LossTerm]] = {
    "nt_xent": NTXent,
    "pmr": PMR,
    "cmsc": CMSC,
    "intra_modal": IntraModal,
    "distillation": Distillation,
}


def check_loss_terms() -> None:
    """Raises UserError if a plug-in has added an entry to LOSS_TERMS that is no term or has an impossible name."""
    for name, term in LOSS_TERMS.items():
        if not (isinstance(name, str) and re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name)):
            raise UserError(f"a loss term cannot be called {name!r}: use letters, digits, _ and -")
        if name == "loss" or hasattr(nn.ModuleDict(), name):  # names of metrics and of attributes
            raise UserError(f"a loss term cannot be called {name!r}, which means something else: rename it")
        if not (isinstance(term, type) and issubclass(term, LossTerm)):
            raise UserError(f"LOSS_TERMS[{name!r}] is {term!r}: give a subclass of LossTerm")
