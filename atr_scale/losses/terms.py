"""Loss terms as modules: a dense formula on whole matrices, made an exact term of the global batch over ranks.

A term beyond these is a class here or in a plug-in, and an entry of LOSS_TERMS: docs/extending.md shows one.
"""

from __future__ import annotations

import inspect
import re
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from atr_scale.errors import UserError
from atr_scale.losses import dense, tiled
from atr_scale.losses.inputs import INPUTS, LossInputs
from atr_scale.losses.tiled.tiles import LOSS_BYTES
from atr_scale.sections import NonNegative, Positive, Section, Share

# The dense formula is used while one B x B matrix of fp32 takes no more than this, up to B = 1,024. Forward and
# backward on one CPU thread, d = 1,024, in ms, tiled/dense: B = 256 7/6 (NT-Xent) and 11/7 (PMR); 1,024 80/88 and
# 137/104; 4,096 1,292/1,852 and 2,275/2,795. Up to here the tiled form saves little or no time, and a few such matrices
# take little memory.
DENSE_BYTES = 4 * 2**20


class Budget(NamedTuple):
    """Bytes that decide how terms are computed.

    dense: of one B x B matrix of fp32, up to which the dense formula is used. kept: see `tiles.LOSS_BYTES`.
    """

    dense: int = DENSE_BYTES
    kept: int = LOSS_BYTES

    def allows_dense(self, texts: int) -> bool:
        return 4 * texts**2 <= self.dense


DEFAULT_BUDGET = Budget()


class TermSection(Section):
    """A loss term; the loss is the weighted sum of those with a positive weight."""

    weight: NonNegative = 0.0


class LossTerm(nn.Module):
    """A scalar loss of the global batch.

    A subclass names its section and has `dense`, whose parameters are the inputs that it needs, by their names in
    `WholeInputs`: nothing else is computed or sent between ranks. The class of an unknown name is refused (UserError).
    Parameters of its own are trained with the group "heads" and saved with the model; they need at least one dimension.

    section: the term's part of the configuration. inputs: the names that `dense` takes.
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
        """The formula on whole matrices, a scalar; see `WholeInputs` for what it may take."""
        raise NotImplementedError

    def tiled(self, inputs: LossInputs, kept_bytes: int) -> Tensor | None:
        """The same without a B x B matrix, for large batches; None if there is no such form.

        The same value on every rank, whose backward is this rank's share of the gradient.
        """
        return None

    def forward(self, inputs: LossInputs, budget: Budget = DEFAULT_BUDGET) -> Tensor:
        """The loss of the global batch, the same on every rank. Its backward is this rank's share: the sum over ranks
        is the gradient, of the encoders, of the temperature and of the term's own parameters.

        Every rank computes the same dense loss from the same matrices. Of a gradient that all ranks send back for what
        they gathered the sum arrives, hence a share of one over their number.
        """
        if not budget.allows_dense(inputs.block.shape[0]):
            loss = self.tiled(inputs, budget.kept)
            if loss is not None:
                return loss
        loss = self.dense(**{name: getattr(inputs.whole, name) for name in self.inputs})
        return loss.detach() + (loss - loss.detach()) / inputs.block.world.size


class NTXentSection(TermSection):
    weight: NonNegative = 1.0


class NTXent(LossTerm):
    Section = NTXentSection

    def dense(self, scores: Tensor, temperature: Tensor, positives: Tensor) -> Tensor:
        return dense.nt_xent(scores, temperature, positives)

    def tiled(self, inputs: LossInputs, kept_bytes: int) -> Tensor:
        return tiled.nt_xent(inputs.block, inputs.temperature, inputs.ids, kept_bytes)


class PMRSection(TermSection):
    omega: Positive = Field(5.0, description="scale of the prior's softmax")
    detach_prior: bool = Field(False, description="no gradient through the prior")
    scale_by_batch: bool = Field(False, description="prior times the number of candidates (CAMoE, with omega 0.1)")


class PMR(LossTerm):
    Section = PMRSection
    section: PMRSection

    def dense(self, scores: Tensor, temperature: Tensor, positives: Tensor) -> Tensor:
        own = self.section
        return dense.pmr(scores, temperature, own.omega, positives, own.detach_prior, own.scale_by_batch)

    def tiled(self, inputs: LossInputs, kept_bytes: int) -> Tensor:
        own = self.section
        return tiled.pmr(inputs.block, inputs.temperature, own.omega, inputs.ids, own.detach_prior, own.scale_by_batch)


class CMSCSection(TermSection):
    beta: Share = Field(0.2, description="share of the intra-modal similarities in the targets")
    beta_warmup_steps: Annotated[int, Field(ge=0)] = Field(0, description="beta rises from 0 over these updates")
    target_temperature: Positive | None = Field(None, description="of the similarities; default: the model's")
    mode: Literal["each", "add"] = Field(
        "each", description="texts guide t2a and audios a2t, or the mean of both guides both"
    )


class CMSC(LossTerm):
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
        targets, mode = self._target_temperature(temperature), self.section.mode
        return dense.cmsc(scores, text_scores, audio_scores, temperature, self._beta(step), targets, positives, mode)

    def tiled(self, inputs: LossInputs, kept_bytes: int) -> Tensor:
        return tiled.cmsc(
            inputs.block,
            inputs.text_block,
            inputs.audio_block,
            inputs.temperature,
            self._beta(inputs.step),
            self._target_temperature(inputs.temperature),
            inputs.ids,
            self.section.mode,
            kept_bytes,
        )

    def _beta(self, step: int) -> float:
        warmup = self.section.beta_warmup_steps
        return self.section.beta * (min(1.0, step / warmup) if warmup else 1.0)

    def _target_temperature(self, temperature: Tensor) -> float | Tensor:
        return temperature if self.section.target_temperature is None else self.section.target_temperature


class IntraModalSection(TermSection):
    """Contrast of texts with texts and of audios with audios; the weight is the paper's gamma."""


class IntraModal(LossTerm):
    Section = IntraModalSection

    def dense(self, text_scores: Tensor, audio_scores: Tensor, temperature: Tensor, positives: Tensor) -> Tensor:
        both = [dense.intra_modal(scores, temperature, positives) for scores in (text_scores, audio_scores)]
        return torch.stack(both).mean()

    def tiled(self, inputs: LossInputs, kept_bytes: int) -> Tensor:
        both = [
            tiled.intra_modal(block, inputs.temperature, inputs.ids, kept_bytes)
            for block in (inputs.text_block, inputs.audio_block)
        ]
        return torch.stack(both).mean()


class DistillationSection(TermSection):
    tables: list[str] = Field([], description="teachers' embeddings, as `atr-scale estimate` writes them")
    temperature: Positive | None = Field(None, description="of student and teachers in this term; default: the model's")

    @model_validator(mode="after")
    def has_teachers(self) -> DistillationSection:
        if self.weight > 0 and not self.tables:
            raise ValueError("distillation needs teachers: give tables that `atr-scale estimate` has written")
        return self


class Distillation(LossTerm):
    """Its teachers' tables are read by who trains, and come in as scores."""

    Section = DistillationSection
    section: DistillationSection

    def dense(self, scores: Tensor, teacher_scores: Tensor, temperature: Tensor) -> Tensor:
        return dense.distillation(scores, teacher_scores, self._temperature(temperature))

    def tiled(self, inputs: LossInputs, kept_bytes: int) -> Tensor:
        return tiled.distillation(inputs.block, inputs.teacher_block, self._temperature(inputs.temperature), kept_bytes)

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
    """UserError if plug-ins have put something into LOSS_TERMS that is no term, or under a name that cannot be one."""
    for name, term in LOSS_TERMS.items():
        if not (isinstance(name, str) and re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name)):
            raise UserError(f"a loss term cannot be called {name!r}: use letters, digits, _ and -")
        if name == "loss" or hasattr(nn.ModuleDict(), name):  # where terms are kept and logged by name
            raise UserError(f"a loss term cannot be called {name!r}, which means something else: rename it")
        if not (isinstance(term, type) and issubclass(term, LossTerm)):
            raise UserError(f"LOSS_TERMS[{name!r}] is {term!r}: give a subclass of LossTerm")
