"""The forward and backward passes of an optimizer step, and the reduction of their gradients, by ZeRO stage."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from atr_scale.batch import Batch
from atr_scale.config_train import TrainSection
from atr_scale.distributed.world import World
from atr_scale.model import Retriever, StepContext
from atr_scale.training.cut import Cut
from atr_scale.training.gradient_reduction import GradientReduction
from atr_scale.training.partitions import Partitions

STAGE_2_BUCKETS = 8  # in flight at most, so that gradients are never whole in memory


class Passes(ABC):
    """Adds up the gradients of a step and reduces them over ranks.

    forward: the retriever's call. last_loss: whether the loss that is computed now is the last one of the step.
    factor: of a loss; what the reduction divides by. owned: after a step, the gradients that this rank owns, by group
    of parameters ("audio", "text", "heads"); all ranks have the same groups.
    """

    factor = 1.0

    def __init__(self, forward: Any, model: Retriever) -> None:
        self.forward = forward
        self.last_loss = True
        self.owned: dict[str, list[Tensor]] = {}
        self._group = {
            parameter: group for group, members in model.parameter_groups().items() for _, parameter in members
        }

    def _own(self, gradients: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
        """The gradients that this rank owns, each with a parameter of its group."""
        self.owned = {group: [] for group in dict.fromkeys(self._group.values())}
        for parameter, gradient in gradients:
            self.owned[self._group[parameter]].append(gradient)

    @abstractmethod
    def step(self) -> Any:
        """A context for all passes of a step, at the end of which gradients are reduced."""

    @abstractmethod
    def loss(self, batch: Batch, context: StepContext, factor: float | Tensor) -> dict[str, Tensor]:
        """Add the gradient of factor * loss of a batch on the device. Returns the loss terms."""

    @abstractmethod
    def backward(self, scalar: Tensor, last: bool) -> None:
        """Add the gradient of a scalar. last: whether it is the last backward pass of this loss."""

    @abstractmethod
    def local_sum(self) -> Tensor:
        """After a step: finite only if all gradients of this rank were, before they met those of others."""


class ReducedPasses(Passes):
    """ZeRO 0 to 2: `GradientReduction` sums gradients during the last backward pass, and DeepSpeed shares the state."""

    def __init__(self, model: Retriever, engine: Any, train: TrainSection, world: World) -> None:
        super().__init__(model, model)
        learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._reduction = GradientReduction(
            learned,
            world,
            dtype=torch.bfloat16 if train.gradient_dtype == "bf16" else None,
            sharding=Partitions(engine.optimizer).sharding if train.zero_stage > 0 else None,
            most_in_flight=STAGE_2_BUCKETS if train.zero_stage == 2 else None,
        )
        # Of each partition a parameter of its group, or the parameters themselves.
        self._owners = [group[0] for group in engine.optimizer.bit16_groups] if train.zero_stage > 0 else learned
        self._model = model

    @contextmanager
    def step(self) -> Iterator[None]:
        yield
        self._own(zip(self._owners, self._reduction.finish(), strict=True))

    def loss(self, batch: Batch, context: StepContext, factor: float | Tensor) -> dict[str, Tensor]:
        # By itself autograd takes the audio encoder first, and the texts' gradients are summed over ranks beside it.
        cut = Cut() if self._model.text_learns_more else None
        terms: dict[str, Tensor] = self.forward(batch, context, cut=cut)
        self.backward(terms["loss"] * factor, last=cut is None)
        if cut:
            passes = cut.passes()
            if self.last_loss:
                self._reduction.begin([roots for roots, _ in passes])
            for roots, gradients in passes:
                torch.autograd.backward(roots, gradients)
        return terms

    def backward(self, scalar: Tensor, last: bool) -> None:
        if last and self.last_loss:
            self._reduction.begin([[scalar]])
        scalar.backward()

    def local_sum(self) -> Tensor:
        return self._reduction.local_sum()


class ShardedPasses(Passes):
    """ZeRO 3: DeepSpeed gathers parameters, and reduces gradients during a single backward pass, or after the last."""

    def __init__(self, engine: Any, several: bool, world: World, device: torch.device) -> None:
        """several: whether a step has more than one backward pass."""
        super().__init__(engine, engine.module)
        self._engine, self._several = engine, several
        self.factor = float(world.size)  # DeepSpeed averages over ranks
        self._probe = torch.zeros((), device=device)
        if not several:
            for parameter in engine.module.parameters():
                if parameter.requires_grad:
                    parameter.register_hook(self._watch)

    @contextmanager
    def step(self) -> Iterator[None]:
        self._probe.zero_()
        with self._engine.coalesce_grad_reduction() if self._several else nullcontext():
            yield
            if self._several:
                own = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
                self._probe += get_total_norm(own) * 0
        optimizer = self._engine.optimizer
        self._own(
            pair
            for number, gradients in optimizer.averaged_gradients.items()
            for pair in zip(optimizer.fp16_groups[number], gradients, strict=True)
        )

    def loss(self, batch: Batch, context: StepContext, factor: float | Tensor) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = self.forward(batch, context)
        self._engine.backward(terms["loss"] * factor)
        return terms

    def backward(self, scalar: Tensor, last: bool) -> None:
        self._engine.backward(scalar)

    def local_sum(self) -> Tensor:
        return self._probe

    def _watch(self, gradient: Tensor) -> None:
        # A sum is finite only if all of its parts are; times zero it adds up without growing.
        self._probe += gradient.detach().sum().float() * 0
