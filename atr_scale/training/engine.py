"""One optimizer step over all ranks. Only this file knows DeepSpeed.

DeepSpeed shards gradients, optimizer state and (stage 3) parameters. Precision, loss scaling, the learning rate and the
decision whether to step are made here: parameters stay fp32 under autocast, and a non-finite value on any rank leaves
parameters and optimizer state of all ranks unchanged.
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
from atr_scale.config_train import TrainSection
from atr_scale.distributed.start import device_as_local_rank
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
    """The result of one optimizer step. Its numbers stay on the device; reading one waits for the device.

    values: loss terms (means over the losses of the step) and "temperature". norm: of the whole gradient.
    bad_ranks: ranks that saw a non-finite value. overflow: the loss scale of fp16 was too large.
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
    """AdamW in one kernel, which divides gradients by `grad_scale` (None for 1). With `skip` a step changes nothing.

    Every ZeRO stage ends in this optimizer's step on the parameters or on their shards, so one switch serves all.
    """

    skip = False
    grad_scale: Tensor | None = None

    def __init__(self, groups: Any, **settings: Any) -> None:
        super().__init__(groups, fused=True, **settings)

    def step(self, closure: Any = None) -> Any:
        return None if self.skip else super().step(closure)


class Engine:
    """A retriever under DeepSpeed. All ranks make every call together."""

    def __init__(self, model: Retriever, train: TrainSection, world: World, device: torch.device) -> None:
        self.world, self.device, self.train = world, device, train
        self.scale, self._good_steps = (FP16_INITIAL_SCALE if train.precision == "fp16" else 1.0), 0
        self._quiet_deepspeed()
        model.to(device)
        self._probe = torch.zeros((), device=device)
        local_batch = train.global_batch_size // world.size
        chunked = train.micro_batch_size is not None and train.micro_batch_size < local_batch
        # ZeRO 2 and 3 reduce the gradients of a single backward pass while it runs, and never hold them whole.
        self._reduces_at_end = train.zero_stage < 2 or chunked or train.accum_steps > 1
        if not self._reduces_at_end:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.register_hook(self._watch)
        self.optimizer = _SkippableAdamW(
            list(optimizer_groups(model, train)), lr=train.lr, betas=train.betas, eps=train.eps
        )
        with device_as_local_rank(device):
            self.deepspeed, *_ = deepspeed.initialize(
                model=model, optimizer=self.optimizer, config=deepspeed_config(train, world.size)
            )
        self.deepspeed.train()
        self.model = model
        self._grad_cache: GradCache | None = None
        if chunked:
            assert train.micro_batch_size is not None
            self._grad_cache = GradCache(
                self.deepspeed,
                lambda loss, last: self.deepspeed.backward(loss),
                device,
                train.micro_batch_size,
                train.kept_chunks,
                model.encoders_learn,
            )

    def update(
        self,
        batches: Iterable[Batch],
        learning_rates: dict[str, float],
        seeds: Iterable[Seeds],
        context: StepContext = NO_CONTEXT,
    ) -> StepResult:
        """One optimizer step on the mean loss of `batches`, the local parts of one global batch each.

        learning_rates: by group ("audio", "text", "heads"), the rate of its fastest layer. seeds: one pair for each
        batch. context: of all forward passes; each batch gets its own seed of augmentation instead of the context's.
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
                    part = value.detach().float() / self.train.accum_steps
                    values[name] = values[name] + part if name in values else part
        self._probe += values["loss"] * 0
        bad_ranks = self._bad_ranks()
        self.optimizer.skip = bool(bad_ranks)
        self.optimizer.grad_scale = None if self.scale == 1 else torch.tensor(self.scale, device=self.device)
        norm = self._step() / self.scale
        return StepResult(values, norm, bad_ranks, self._adapt_scale(bool(bad_ranks)))

    def _add_gradients(self, batch: Batch, seed: int, context: StepContext) -> dict[str, Tensor]:
        """Add the gradient of one loss to the parameters. Returns the terms of the loss."""
        # Gradients are averaged over ranks, but the loss is one sum over them: hence the world size.
        factor = self.world.size * self.scale / self.train.accum_steps
        if self._grad_cache:
            return self._grad_cache.accumulate(batch, seed, factor, context)
        torch.manual_seed(seed)
        terms: dict[str, Tensor] = self.deepspeed(batch.to(self.device), context)
        self.deepspeed.backward(terms["loss"] * factor)
        return terms

    @contextmanager
    def _reduced_once(self) -> Iterator[None]:
        """Gradients of all backward passes stay on their ranks, are checked, and are reduced once, at the end."""
        if not self._reduces_at_end:
            yield
            return
        with self.deepspeed.no_sync() if self.train.zero_stage == 0 else self.deepspeed.coalesce_grad_reduction():
            yield
            self._probe += get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None]) * 0
        if self.train.zero_stage == 0:
            self.deepspeed.allreduce_gradients()

    def full_weights(self) -> dict[str, Tensor]:
        """The model's state as fp32 CPU tensors on the main rank ({} on others); sharded parameters are gathered."""
        out = {}
        for name, value in self.model.state_dict(keep_vars=True).items():
            shards = [value] if hasattr(value, "ds_id") else []
            with deepspeed.zero.GatheredParameters(shards, enabled=bool(shards)):
                if self.world.is_main:
                    out[name] = value.detach().cpu().clone().contiguous()
        return out

    def save(self, folder: Path, state: dict[str, Any]) -> None:
        """Write all that a resume needs except the frozen weights, one file for each rank."""
        state = {**state, "scale": self.scale, "good_steps": self._good_steps}
        self.deepspeed.save_checkpoint(
            str(folder), tag="deepspeed", client_state=state, save_latest=False, exclude_frozen_parameters=True
        )

    def load(self, folder: Path) -> dict[str, Any]:
        """Load what `save` has written and return the state that was given to it. Frozen weights stay as they are.

        Only for files with verified checksums: DeepSpeed unpickles them. UserError if there are none for these ranks.
        """
        path, state = self.deepspeed.load_checkpoint(str(folder), tag="deepspeed", custom_load_fn=_load_learned)
        if path is None:
            raise UserError(f"no DeepSpeed state for {self.world.size} ranks in {folder}: start a new run folder")
        saved: dict[str, Any] = state
        self.scale, self._good_steps = saved["scale"], saved["good_steps"]
        return saved

    def _watch(self, gradient: Tensor) -> None:
        # A sum is finite only if all of its parts are; times zero it adds up without growing.
        self._probe += gradient.detach().sum().float() * 0

    def _bad_ranks(self) -> tuple[int, ...]:
        """Ranks on which a loss or gradient of this step is not finite; the same answer on every rank.

        This is the only wait for the device in a step.
        """
        flags = self.world.gather((~self._probe.isfinite()).int().reshape(1))
        return tuple(rank for rank, bad in enumerate(flags.tolist()) if bad)

    def _adapt_scale(self, bad: bool) -> bool:
        """fp16 loss scaling: halve after an overflow, double after many good steps in a row. True on an overflow."""
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
        """Clip the scaled gradient and step. Returns the norm of the scaled gradient before clipping.

        Without ZeRO the gradient is whole and is clipped here; DeepSpeed's step clips a sharded one.
        """
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
        # DeepSpeed calls collectives by their older names.
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
        if self.device.type == "cpu":
            # DeepSpeed would compile it at every start (minutes on two cores) for a reduction that gloo does too.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _load_learned(src: dict[str, Tensor], dst: nn.Module) -> None:
    """Load all parameters except frozen ones, which only checkpoints of version 0.1 hold. Names are DeepSpeed's.

    Raises UserError if this version trains a parameter that the run did not have: the optimizer has no state for it.
    """
    found = dst.load_state_dict(src, strict=False)
    assert not found.unexpected_keys, found
    learned = {name for name, parameter in dst.named_parameters() if parameter.requires_grad}
    new = sorted(learned.intersection(found.missing_keys))
    if new:
        raise UserError(
            f"this run was started with an older version, whose model had no {new[0]}: go on with that one, or start "
            "a new run from its weights with train.initial_checkpoint"
        )


def deepspeed_config(train: TrainSection, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration.

    It does not set a precision, for DeepSpeed's modes round parameters or clip by group, and no gradient accumulation:
    DeepSpeed sees a single accumulated gradient in each step.
    """
    return {
        "train_micro_batch_size_per_gpu": train.global_batch_size // world_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": train.gradient_clipping if train.zero_stage > 0 else 0.0,
        "zero_optimization": {"stage": train.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
