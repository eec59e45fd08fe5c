"""Ranks and the communication between them. One process without a process group is a world of one.

The recipe for a loss over the global batch: every rank gathers all texts, keeps its own audio, and computes the same
global mean loss L. The backward pass of a rank yields its part of the gradient, and the sum over ranks is the whole.
Data-parallel training averages gradients over ranks, hence `(world.size * L).backward()`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from atr_scale.compat import all_gather_single, reduce_scatter_single


class _Gather(torch.autograd.Function):
    """Rows of every rank, in rank order. The backward pass sums the gradients of all ranks for this rank's rows."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, size: int, group: Any) -> Tensor:
        ctx.group, ctx.rows = group, local.shape[0]
        out = local.new_empty((size * local.shape[0], *local.shape[1:]))
        all_gather_single(out, local.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        out = grad.new_empty((ctx.rows, *grad.shape[1:]))
        reduce_scatter_single(out, grad.contiguous(), group=ctx.group)
        return out, None, None


@dataclass(frozen=True)
class World:
    """This process in a group: its rank and the world size."""

    rank: int = 0
    size: int = 1
    group: Any = None

    @staticmethod
    def current() -> World:
        """The default process group, or a world of one if there is none."""
        if not (dist.is_available() and dist.is_initialized()):
            return World()
        return World(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, local: Tensor) -> Tensor:
        """Rows [size * b, ...] of all ranks, in rank order; differentiable. local: [b, ...], with the same b on all."""
        return local if self.size == 1 else _Gather.apply(local, self.size, self.group)

    def gather_ints(self, value: int) -> list[int]:
        """`value` of every rank, in rank order."""
        if self.size == 1:
            return [value]
        out = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.size)]
        dist.all_gather(out, torch.tensor([value], device=self.device), group=self.group)
        return [int(x) for x in out]

    def gather_objects(self, value: Any) -> list[Any]:
        """Any picklable `value` of every rank, in rank order; for small values outside the optimizer step."""
        if self.size == 1:
            return [value]
        out: list[Any] = [None] * self.size
        dist.all_gather_object(out, value, group=self.group)
        return out

    def sum(self, value: Tensor) -> Tensor:
        """Sum over ranks; not differentiable."""
        return self._reduce(value, dist.ReduceOp.SUM)

    def max(self, value: Tensor) -> Tensor:
        """Maximum over ranks; not differentiable."""
        return self._reduce(value, dist.ReduceOp.MAX)

    def max_int(self, value: int) -> int:
        return int(self.max(torch.tensor([value], device=self.device))) if self.size > 1 else value

    def any(self, flag: bool) -> bool:
        """Whether `flag` holds on any rank."""
        return bool(self.max_int(int(flag)))

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(group=self.group)

    @property
    def device(self) -> torch.device:
        """The device that this group's backend takes tensors from."""
        nccl = self.size > 1 and dist.get_backend(self.group) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")

    def _reduce(self, value: Tensor, op: Any) -> Tensor:
        if self.size == 1:
            return value
        value = value.detach().clone()
        dist.all_reduce(value, op=op, group=self.group)
        return value
