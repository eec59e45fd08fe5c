"""Ranks and the communication between them. One process without a process group is a world of one.

The recipe for a loss over the global batch: every rank gathers all texts, keeps its own audio, and computes the same
global mean loss L. The backward pass of a rank yields its part of the gradient, and the sum over ranks is the whole.
Training sums gradients over ranks; if a library averages them instead (DeepSpeed at ZeRO 3), L is multiplied by
world.size.

Tensors travel over the group of the device (NCCL on GPUs). Numbers and objects of the host travel over a gloo group
beside it, so that no rank waits for its GPU and nothing is copied to one.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from atr_scale.compat import all_gather_single, reduce_scatter_single
from atr_scale.errors import OneLineError

T = TypeVar("T")

_host_groups: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # the gloo group beside each NCCL group


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


class _Transfer:
    """An asynchronous collective: its result, and what must live until it has been waited for."""

    def __init__(self) -> None:
        self.work: Any = None
        self.tensors: tuple[Tensor, ...] = ()

    def run(self, collective: Any, out: Tensor, given: Tensor, group: Any) -> None:
        self.tensors = out, given
        self.work = collective(out, given, group=group, async_op=True)

    def wait(self) -> Tensor:
        """The result. On CUDA this orders streams, and the host goes on."""
        self.work.wait()
        (out, _), self.tensors = self.tensors, ()
        return out


class _StartGather(torch.autograd.Function):
    """The first half of `_Gather`: starts the gather, and in the backward pass waits for the sum of the gradients."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, size: int, group: Any, there: _Transfer, back: _Transfer) -> Tensor:
        ctx.back = back
        out = local.new_empty((size * local.shape[0], *local.shape[1:]))
        there.run(all_gather_single, out, local.contiguous(), group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        return ctx.back.wait(), None, None, None, None


class _FinishGather(torch.autograd.Function):
    """The second half: waits for the gather, and in the backward pass starts to sum the gradients."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, size: int, group: Any, there: _Transfer, back: _Transfer) -> Tensor:
        ctx.size, ctx.group, ctx.back = size, group, back
        there.wait()
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (grad,) = grads
        own = grad.new_empty((grad.shape[0] // ctx.size, *grad.shape[1:]))
        ctx.back.run(reduce_scatter_single, own, grad.contiguous(), ctx.group)
        return grad, None, None, None, None  # not read by the first half, which takes the sum


@dataclass(frozen=True)
class World:
    """This process in a group: its rank and the world size.

    group: of the tensors. host: of numbers and objects; `group` itself if that takes tensors of the host.
    store: through which the ranks have met, None if that is not known; other threads take a clone of it.
    """

    rank: int = 0
    size: int = 1
    group: Any = None
    host: Any = None
    store: Any = None

    @staticmethod
    def current() -> World:
        """The default process group, or a world of one if there is none. All ranks make the first call together."""
        if not (dist.is_available() and dist.is_initialized()):
            return World()
        group = dist.group.WORLD
        return World(dist.get_rank(), dist.get_world_size(), group, _host_group(group))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, local: Tensor) -> Tensor:
        """Rows [size * b, ...] of all ranks, in rank order; differentiable. local: [b, ...], with the same b on all."""
        return local if self.size == 1 else _Gather.apply(local, self.size, self.group)

    def start_gather(self, local: Tensor) -> Callable[[], Tensor]:
        """`gather` in two halves: it runs beside what is computed until the function is called, which is to be once.

        In the backward pass gradients are summed beside what comes between the two places, in reverse.
        """
        if self.size == 1:
            return lambda: local
        halves = self.size, self.group, _Transfer(), _Transfer()
        out = _StartGather.apply(local, *halves)
        return lambda: _FinishGather.apply(out, *halves)

    def gather_ints(self, value: int) -> list[int]:
        """`value` of every rank, in rank order."""
        if self.size == 1:
            return [value]
        out = torch.zeros(self.size, dtype=torch.int64)
        dist.all_gather(list(out.split(1)), torch.tensor([value]), group=self.host)
        return out.tolist()

    def gather_host(self, local: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows [size * b, ...] of all ranks of an array [b, ...] of the host, in rank order; the same b on all."""
        if self.size == 1:
            return local
        out = torch.empty(self.size * local.shape[0], *local.shape[1:], dtype=torch.int64)
        all_gather_single(out, torch.from_numpy(local).contiguous(), group=self.host)
        found: NDArray[np.int64] = out.numpy()
        return found

    def gather_objects(self, value: Any) -> list[Any]:
        """Any picklable `value` of every rank, in rank order; for small values outside the optimizer step.

        A rank holds the pickled values of all ranks at once: for large ones there is `gather_each`.
        """
        if self.size == 1:
            return [value]
        out: list[Any] = [None] * self.size
        dist.all_gather_object(out, value, group=self.host)
        out[self.rank] = value  # not a copy of it
        return out

    def gather_each(self, values: Sequence[T]) -> Iterator[T]:
        """The values of all ranks: the first of every rank, in rank order, then the second of every rank, and so on.

        One value of each rank is in transit at a time, so a rank needs three times the size of the largest ones beside
        what the caller keeps. All ranks read to the end. values: any number on each rank.
        """
        for number in range(self.max_int(len(values))):
            for found in self.gather_objects(list(values[number : number + 1])):
                yield from found

    def from_main(self, make: Callable[[], T]) -> T:
        """What `make` returns on the main rank, on all ranks, which all raise the OneLineError that it raises there."""
        found: T | OneLineError | None = None
        if self.is_main:
            try:
                found = make()
            except OneLineError as error:
                found = error
        found = self.gather_objects(found)[0]
        if isinstance(found, OneLineError):
            raise found
        return cast(T, found)

    def ranks_here(self) -> int:
        """Number of ranks on this machine. All ranks call this."""
        own = socket.gethostname()
        return self.gather_objects(own).count(own)

    def sum(self, value: Tensor) -> Tensor:
        """Sum over ranks; not differentiable."""
        return self._reduce(value, dist.ReduceOp.SUM)

    def max(self, value: Tensor) -> Tensor:
        """Maximum over ranks; not differentiable."""
        return self._reduce(value, dist.ReduceOp.MAX)

    def max_int(self, value: int) -> int:
        """Maximum over ranks."""
        return max(self.gather_ints(value))

    def any(self, holds: bool) -> bool:
        """Whether it holds on any rank. All ranks call this."""
        return self.max_int(int(holds)) > 0

    def barrier(self) -> None:
        """Wait for all ranks, but not for the work of their GPUs."""
        if self.size > 1:
            dist.barrier(group=self.host)

    def raise_together(self, fault: OneLineError | None) -> None:
        """All ranks raise the fault of the first rank that has one; quick without a fault. All ranks call this."""
        if self.any(fault is not None):
            for found in self.gather_objects(fault):
                if found is not None:
                    raise found

    def new_host_group(self) -> Any:
        """Another gloo group of these ranks, for a thread of each; None in a world of one. All ranks call this."""
        return dist.new_group(backend="gloo") if self.size > 1 else None

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


def _host_group(group: Any) -> Any:
    """The group over which the ranks of `group` exchange tensors of the host: a new gloo group beside one of NCCL."""
    if dist.get_backend(group) != "nccl":
        return group
    if group not in _host_groups:
        _host_groups[group] = dist.new_group(backend="gloo")
    return _host_groups[group]
