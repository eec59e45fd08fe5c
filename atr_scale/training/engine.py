"""One optimizer step over all ranks. This file, `passes.py` and `partitions.py` alone know DeepSpeed.

DeepSpeed shards gradients, optimizer state and (stage 3) parameters. Precision, loss scaling, the learning rate,
clipping and, below stage 3, the reduction of gradients are made here: parameters stay fp32 under autocast, and a
non-finite value on any rank leaves parameters and optimizer state of all ranks unchanged. The host waits for nothing:
the optimizer reads from tensors on the device whether it may step.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from atr_scale.batch import Batch, on_device
from atr_scale.checkpoint_writer import HostCopies
from atr_scale.config_train import TrainSection
from atr_scale.distributed.start import device_as_local_rank
from atr_scale.distributed.world import World
from atr_scale.errors import UserError
from atr_scale.model import NO_CONTEXT, Retriever, StepContext
from atr_scale.training.grad_cache import GradCache
from atr_scale.training.loss_scale import LossScale
from atr_scale.training.optimizer_state import (
    OLD_FOLDER,
    HeldPiece,
    StoredMoments,
    file_of,
    moments,
    pieces,
    share,
    updates_made,
)
from atr_scale.training.param_groups import optimizer_groups
from atr_scale.training.passes import Passes, ReducedPasses, ShardedPasses
from atr_scale.training.schedule import Seeds
from atr_scale.training.step_result import StepResult
from atr_scale.training.weight_copies import WeightCopies

logger = logging.getLogger(__name__)


class _MaskedAdamW(torch.optim.AdamW):
    """AdamW in one kernel, which reads two scalars on the device.

    grad_scale: divides gradients. found_inf: 1 if a step is to change nothing, its counters included. Every ZeRO stage
    ends in this optimizer's step on the parameters or on their shards, so one mask serves all.
    """

    grad_scale: Tensor
    found_inf: Tensor

    def __init__(self, groups: Any, **settings: Any) -> None:
        super().__init__(groups, fused=True, **settings)


class Engine:
    """A retriever under DeepSpeed. All ranks make every call together."""

    def __init__(self, model: Retriever, train: TrainSection, world: World, device: torch.device) -> None:
        self.world, self.device, self.train, self.model = world, device, train, model
        self.scale = LossScale(train.precision == "fp16", device)
        self._quiet_deepspeed()
        model.to(device)
        local_batch = train.global_batch_size // world.size
        chunked = train.micro_batch_size is not None and train.micro_batch_size < local_batch
        self.optimizer = _MaskedAdamW(
            list(optimizer_groups(model, train)), lr=train.lr, betas=train.betas, eps=train.eps
        )
        with device_as_local_rank(device):
            self.deepspeed, *_ = deepspeed.initialize(
                model=model, optimizer=self.optimizer, config=deepspeed_config(train, world.size)
            )
        self.deepspeed.train()
        self._passes: Passes
        self._counts: list[int] = []  # of gradients in each group
        self._outside = torch.empty(0, device=device)  # [groups, gradients] bool: which are not in a group
        if train.zero_stage == 3:
            self._passes = ShardedPasses(self.deepspeed, chunked or train.accum_steps > 1, world, device)
        else:
            self._passes = ReducedPasses(model, self.deepspeed, train, world)
        self._weights = WeightCopies(model, world)
        self._grad_cache: GradCache | None = None
        if chunked:
            assert train.micro_batch_size is not None
            self._grad_cache = GradCache(
                self._passes.forward,
                self._passes.backward,
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
        stop: bool = False,
    ) -> StepResult:
        """One optimizer step on the mean loss of `batches`, the local parts of one global batch each.

        learning_rates: by group ("audio", "text", "heads"), the rate of its fastest layer. seeds: one pair for each
        batch. context: of all forward passes; each batch gets its own seed of augmentation instead of the context's.
        stop: whether this rank was told to stop, which all ranks learn from the result.
        """
        for group in self.deepspeed.optimizer.param_groups:
            # Groups of checkpoints from before there was layer decay have no scale.
            group["lr"] = learning_rates[group["name"]] * group.get("lr_scale", 1.0)
        if not self.model.training:  # a walk over all modules
            self.deepspeed.train()
        sums: dict[str, Tensor] = {}
        with self._passes.step():
            for number, (batch, seed) in enumerate(zip(batches, seeds, strict=True), start=1):
                own = replace(context, augment_seed=seed.augmentation)
                self._passes.last_loss = number == self.train.accum_steps
                terms = self._add_gradients(batch, seed.dropout, own)
                for name, value in terms.items():
                    part = value.detach().float()
                    sums[name] = sums[name] + part if name in sums else part
        norms, agreed = self._agree(sums["loss"], stop)
        found_inf = agreed[1:].any().float()
        self._mask(norms[0], found_inf)
        self.deepspeed.step()
        groups = tuple(self._passes.owned)
        self._passes.owned = {}  # frees the gradients
        norms = norms / self.scale.value
        means = torch.stack(list(sums.values())) / self.train.accum_steps
        return StepResult(tuple(sums), means, groups, norms, self.scale.update(found_inf), agreed)

    def _add_gradients(self, batch: Batch, seed: int, context: StepContext) -> dict[str, Tensor]:
        """Add the gradient of one loss to the parameters. Returns the terms of the loss."""
        factor = self.scale.factor(self._passes.factor / self.train.accum_steps)
        if self._grad_cache:
            return self._grad_cache.accumulate(batch, seed, factor, context)
        torch.manual_seed(seed)
        return self._passes.loss(batch.to(self.device), context, factor)

    def _agree(self, loss: Tensor, stop: bool) -> tuple[Tensor, Tensor]:
        """What ranks must know of each other, in one small all-reduce.

        Returns the norms of the scaled gradient, of all of it and of each group of parameters, and float64 [1 + ranks]
        of 0 and 1: whether any rank is to stop, and on which ranks a loss or gradient of this step is not finite.
        """
        rank, sharded, groups = self.world.rank, self.train.zero_stage > 0, len(self._passes.owned)
        own = torch.zeros(groups + 1 + self.world.size, dtype=torch.float64, device=self.device)
        if sharded or self.world.is_main:  # without ZeRO every rank has the whole gradient
            own[:groups] = self._squares(list(self._passes.owned.values()))
        if stop:
            own[groups] = 1.0
        own[groups + 1 + rank] = _not_finite(self._passes.local_sum() + loss)
        found = self.world.sum(own)
        squares, stops, bad = found[:groups], found[groups : groups + 1].clamp(max=1), found[groups + 1 :]
        norms = torch.cat((squares.sum(0, keepdim=True), squares)).sqrt().float()
        # Finite gradients whose sum over ranks is not: the fault of all of them.
        bad = bad + (_not_finite(norms[0]) & ~bad.any())
        return norms, torch.cat((stops, bad))

    def _squares(self, owned: list[list[Tensor]]) -> Tensor:
        """Sums of squares of some groups of gradients, float64 [groups], added up in a fixed order."""
        counts = [len(gradients) for gradients in owned]
        if counts != self._counts:
            group = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
            outside = group != torch.arange(len(counts))[:, None]
            self._counts, self._outside = counts, on_device(outside, self.device)
        norms = torch.stack(torch._foreach_norm([gradient for group in owned for gradient in group]))
        # Filled and not multiplied: a group that is not finite leaves the others' numbers alone.
        return norms.double().square().expand(len(counts), -1).masked_fill(self._outside, 0).sum(1)

    def _mask(self, norm: Tensor, found_inf: Tensor) -> None:
        """Tell the optimizer what to divide gradients by, and whether to change anything."""
        scale, limit = self.scale.value, self.train.gradient_clipping
        clip = ((norm / scale + 1e-6) / limit).clamp(min=1.0) if limit else torch.ones_like(norm)
        self.optimizer.grad_scale, self.optimizer.found_inf = scale * clip, found_inf

    def copy_weights(self, copies: HostCopies) -> Callable[[], dict[str, Tensor]]:
        """Copies of the model's fp32 state, for `checkpoint_writer`."""
        return self._weights.take(copies)

    def full_weights(self) -> dict[str, Tensor]:
        """A copy of the model's fp32 state in main memory on the main rank, {} on others."""
        return self.copy_weights(HostCopies())()

    def state(self) -> dict[str, Any]:
        """What a resume needs beside weights and moments, equal on all ranks."""
        return {"updates": updates_made(self.optimizer.state), **self.scale.state()}

    def files(self, copies: HostCopies) -> dict[str, dict[str, Tensor]]:
        """This rank's part of the optimizer's moments, for `checkpoint_writer`."""
        own = self._pieces()
        if self.train.zero_stage == 0:
            own = share(own, self.world.rank, self.world.size)
        return {file_of(self.world.rank): moments(own, self.optimizer.state, copies)}

    def load(self, folder: Path, state: Mapping[str, Any]) -> None:
        """Load the optimizer's moments and the loss scale of a checkpoint whose weights the model has already.

        folder: its files, with verified checksums: DeepSpeed unpickles those of version 0.5 and older. state: its
        state.json. UserError if there are none for this model, or if an old one is of other ranks.
        """
        if (folder / OLD_FOLDER).is_dir():
            state = self._load_old(folder)
        else:
            StoredMoments(folder).read_into(self.optimizer, self._pieces(), state["updates"])
        self.scale.load(state)

    def _pieces(self) -> list[HeldPiece]:
        return pieces(self.model, self.deepspeed.optimizer, self.train.zero_stage, self.world.rank)

    def _load_old(self, folder: Path) -> dict[str, Any]:
        """Load what DeepSpeed wrote, in versions up to 0.5, and return the state in it."""
        # Else DeepSpeed refuses checkpoints from before clipping was made here.
        self.deepspeed.optimizer.compute_grad_norm = True
        path, state = self.deepspeed.load_checkpoint(str(folder), tag=OLD_FOLDER, custom_load_fn=_load_learned)
        if path is None:
            raise UserError(f"no DeepSpeed state for {self.world.size} ranks in {folder}: start a new run folder")
        return dict(state)

    def _quiet_deepspeed(self) -> None:
        deepspeed.utils.logger.setLevel(logging.ERROR)
        # DeepSpeed calls collectives by their older names.
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
        if self.device.type == "cpu":
            # DeepSpeed would compile it at every start (minutes on two cores) for a reduction that gloo does too.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _not_finite(x: Tensor) -> Tensor:
    """In two kernels instead of the five of `~x.isfinite()`."""
    return (x - x) != 0


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

    It sets no precision, for DeepSpeed's modes round parameters, no clipping, for its norm waits for the device, and no
    gradient accumulation: DeepSpeed sees a single accumulated gradient in each step.
    """
    return {
        "train_micro_batch_size_per_gpu": train.global_batch_size // world_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": train.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
