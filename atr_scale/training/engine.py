"""One update over all ranks: the only file that knows DeepSpeed.

DeepSpeed shards gradients, moments and (stage 3) parameters. Precision, loss scaling, the learning rate and the
decision whether an update happens are made here: parameters stay fp32 under autocast, and a non-finite value anywhere
leaves parameters and moments of all ranks as they were.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, get_total_norm

from atr_scale.batch import Batch
from atr_scale.config import TrainSection
from atr_scale.distributed.world import World
from atr_scale.errors import UserError
from atr_scale.model import NO_CONTEXT, Retriever, StepContext
from atr_scale.training.grad_cache import GradCache
from atr_scale.training.param_groups import optimizer_groups
from atr_scale.training.schedule import Seeds

logger = logging.getLogger(__name__)

FP16_INITIAL_SCALE, FP16_GROWTH_STEPS = 2.0**16, 1000


@dataclass(frozen=True)
class StepResult:
    """What an update has done. Its numbers stay on the device until they are asked for: reading them waits for it.

    values: loss terms of the update (means over its losses) and "temperature". norm: of the whole gradient.
    bad_ranks: ranks that saw a non-finite value.
    """

    values: dict[str, Tensor]
    norm: Tensor
    bad_ranks: tuple[int, ...]
    overflow: bool

    @property
    def applied(self) -> bool:
        return not self.bad_ranks

    @cached_property
    def _numbers(self) -> dict[str, float]:
        return dict(zip(self.values, torch.stack(list(self.values.values())).tolist(), strict=True))

    @property
    def terms(self) -> dict[str, float]:
        return {name: value for name, value in self._numbers.items() if name != "temperature"}

    @property
    def temperature(self) -> float:
        return self._numbers["temperature"]

    @property
    def gradient_norm(self) -> float:
        return float(self.norm)


class _SkippableAdamW(torch.optim.AdamW):
    """AdamW in one kernel, which unscales gradients and, when told to, leaves everything as it is.

    Every ZeRO stage ends in this optimizer's step on the parameters or on their shards, so one switch serves all.
    grad_scale: what the kernel divides gradients by, None for 1.
    """

    skip = False
    grad_scale: Tensor | None = None

    def __init__(self, groups: Any, **settings: Any) -> None:
        super().__init__(groups, fused=True, **settings)

    def step(self, closure: Any = None) -> Any:
        return None if self.skip else super().step(closure)


class Engine:
    """A retriever under DeepSpeed."""

    def __init__(self, model: Retriever, train: TrainSection, world: World, device: torch.device) -> None:
        self.world, self.device, self.train = world, device, train
        self.scale, self._good_steps = (FP16_INITIAL_SCALE if train.precision == "fp16" else 1.0), 0
        self._quiet_deepspeed()
        model.to(device)
        self._probe = torch.zeros((), device=device)
        share = train.global_batch_size // world.size
        chunked = train.micro_batch_size is not None and train.micro_batch_size < share
        # Of a single backward pass, ZeRO 2 and 3 reduce gradients while it runs, and never hold them whole.
        self._reduces_at_end = train.zero_stage < 2 or chunked or train.accum_steps > 1
        if not self._reduces_at_end:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.register_hook(self._watch)
        self.optimizer = _SkippableAdamW(
            list(optimizer_groups(model, train)), lr=train.lr, betas=train.betas, eps=train.eps
        )
        self.deepspeed, *_ = deepspeed.initialize(
            model=model, optimizer=self.optimizer, config=deepspeed_config(train, world.size)
        )
        self.deepspeed.train()
        self.model = model
        self._grad_cache: GradCache | None = None
        if chunked:
            assert train.micro_batch_size is not None
            self._grad_cache = GradCache(
                self.deepspeed, self.deepspeed.backward, device, train.micro_batch_size, train.kept_chunks
            )

    def update(
        self,
        batches: Iterable[Batch],
        learning_rates: dict[str, float],
        seeds: Iterable[Seeds],
        context: StepContext = NO_CONTEXT,
    ) -> StepResult:
        """One update from the losses of `batches`, one global batch each, with a seed pair for each.

        learning_rates: of the groups "audio", "text" and "heads", that of their fastest layer. context: of all forwards
        of the update, but for the seed of augmentation, which is each batch's own.
        """
        for group in self.deepspeed.optimizer.param_groups:
            # Groups of checkpoints from before there was layer decay have no scale.
            group["lr"] = learning_rates[group["name"]] * group.get("lr_scale", 1.0)
        self._probe.zero_()
        if not self.model.training:  # a walk over all modules
            self.deepspeed.train()
        values: dict[str, Tensor] = {}
        with self._reduced_once():
            for batch, seed in zip(batches, seeds, strict=True):
                own = replace(context, augment_seed=seed.augmentation)
                terms = self._add_gradients(batch, seed.dropout, own)
                for name, value in terms.items():
                    share = value.detach().float() / self.train.accum_steps
                    values[name] = values[name] + share if name in values else share
        self._probe += values["loss"] * 0
        bad_ranks = self._bad_ranks()
        self.optimizer.skip = bool(bad_ranks)
        self.optimizer.grad_scale = None if self.scale == 1 else torch.tensor(self.scale, device=self.device)
        norm = self._step() / self.scale
        return StepResult(values, norm, bad_ranks, self._adapt_scale(bool(bad_ranks)))

    def _add_gradients(self, batch: Batch, seed: int, context: StepContext) -> dict[str, Tensor]:
        """Adds the gradient of one loss to the parameters; returns its terms."""
        # Gradients are averaged over ranks, the loss is one sum over them: hence the world's size.
        factor = self.world.size * self.scale / self.train.accum_steps
        if self._grad_cache:
            return self._grad_cache.accumulate(batch, seed, factor, context)
        torch.manual_seed(seed)
        terms = self.deepspeed(batch.to(self.device), context)
        self.deepspeed.backward(terms["loss"] * factor)
        return terms

    @contextmanager
    def _reduced_once(self) -> Iterator[None]:
        """Gradients of all backward passes stay on their ranks, are looked at, and meet once, at the end."""
        if not self._reduces_at_end:
            yield
            return
        with self.deepspeed.no_sync() if self.train.zero_stage == 0 else self.deepspeed.coalesce_grad_reduction():
            yield
            self._probe += get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None]) * 0
        if self.train.zero_stage == 0:
            self.deepspeed.allreduce_gradients()

    def full_weights(self) -> dict[str, Tensor]:
        """The model's state as fp32 CPU tensors on the main rank ({} elsewhere), gathered where sharded."""
        out = {}
        for name, value in self.model.state_dict(keep_vars=True).items():
            shards = [value] if hasattr(value, "ds_id") else []
            with deepspeed.zero.GatheredParameters(shards, enabled=bool(shards)):
                if self.world.is_main:
                    out[name] = value.detach().cpu().clone().contiguous()
        return out

    def save(self, folder: Path, state: dict[str, Any]) -> None:
        """Everything a resume needs beside the frozen weights, one file a rank; all ranks call this."""
        state = {**state, "scale": self.scale, "good_steps": self._good_steps}
        self.deepspeed.save_checkpoint(
            str(folder), tag="deepspeed", client_state=state, save_latest=False, exclude_frozen_parameters=True
        )

    def load(self, folder: Path) -> dict[str, Any]:
        """The state given to `save`; frozen weights are those that the model had when this engine was made.

        Only for files whose checksums were verified: DeepSpeed unpickles them.
        """
        path, state = self.deepspeed.load_checkpoint(str(folder), tag="deepspeed", custom_load_fn=_load_learned)
        if path is None:
            raise UserError(f"no DeepSpeed state for {self.world.size} ranks in {folder}: start a new run folder")
        self.scale, self._good_steps = state["scale"], state["good_steps"]
        return state

    def _watch(self, gradient: Tensor) -> None:
        # A sum is finite only where all of its parts are; times zero it adds up without growing.
        self._probe += gradient.detach().sum().float() * 0

    def _bad_ranks(self) -> tuple[int, ...]:
        """Ranks on which a loss or gradient of this update is not finite; the same answer everywhere.

        The update's one wait for the device.
        """
        flags = self.world.gather((~self._probe.isfinite()).int().reshape(1))
        return tuple(rank for rank, bad in enumerate(flags.tolist()) if bad)

    def _adapt_scale(self, bad: bool) -> bool:
        """fp16 loss scaling: halve after an overflow, double after a long good stretch. True on an overflow."""
        if self.train.precision != "fp16":
            return False
        if bad:
            overflow, self.scale, self._good_steps = self.scale > 1, max(1.0, self.scale / 2), 0
            return overflow
        self._good_steps += 1
        if self._good_steps == FP16_GROWTH_STEPS:
            self.scale, self._good_steps = self.scale * 2, 0
        return False

    def _step(self) -> Tensor:
        """Clips the scaled gradient, here without ZeRO, where it is whole, else in DeepSpeed's step, and updates.
        Returns its norm before that."""
        limit = self.train.gradient_clipping * self.scale
        if self.train.zero_stage > 0:
            self.deepspeed.optimizer.clip_grad = limit
            self.deepspeed.step()
            return torch.as_tensor(self.deepspeed.get_global_grad_norm())
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = clip_grad_norm_(parameters, limit or math.inf)
        self.deepspeed.step()
        return norm

    def _quiet_deepspeed(self) -> None:
        deepspeed.utils.logger.setLevel(logging.ERROR)
        # It calls collectives by their older names.
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
        if self.device.type == "cpu":
            # Otherwise compiled at every start (minutes on two cores) for a reduction that gloo also does.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _load_learned(src: dict[str, Tensor], dst: nn.Module) -> None:
    """The state of all but frozen parameters; checkpoints of version 0.1 hold these too. Names are DeepSpeed's."""
    found = dst.load_state_dict(src, strict=False)
    frozen = {name for name, parameter in dst.named_parameters() if not parameter.requires_grad}
    assert not found.unexpected_keys and frozen.issuperset(found.missing_keys), found


def deepspeed_config(train: TrainSection, world_size: int) -> dict[str, Any]:
    """What DeepSpeed is told. It knows nothing of precision: its own modes round parameters or clip by group; nor of
    accumulation: it sees one step an update."""
    return {
        "train_micro_batch_size_per_gpu": train.global_batch_size // world_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": train.gradient_clipping if train.zero_stage > 0 else 0.0,
        "zero_optimization": {"stage": train.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
