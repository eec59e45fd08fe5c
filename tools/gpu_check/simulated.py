"""Several ranks on one device: processes whose tensors lie there and whose collectives go through the host.

NCCL refuses two ranks on one GPU. With copies to the host around each collective, all code of a rank runs as it does on
a cluster, on CUDA tensors, and only the network is another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from atr_scale.distributed.world import World
from tools.ranks import run_ranks


class HostWorld(World):
    """The ranks of a gloo group whose tensors may lie on a GPU."""

    def gather(self, local: Tensor) -> Tensor:
        return super().gather(local.cpu()).to(local.device)

    def start_gather(self, local: Tensor) -> Callable[[], Tensor]:
        wait = super().start_gather(local.cpu())
        return lambda: wait().to(local.device)

    def sum(self, value: Tensor) -> Tensor:
        return super().sum(value.cpu()).to(value.device)

    def max(self, value: Tensor) -> Tensor:
        return super().max(value.cpu()).to(value.device)


class SilentWorld(World):
    """One of several ranks, whose network does nothing: for the time of its own part of a loss."""

    def gather(self, local: Tensor) -> Tensor:
        return torch.cat([local] * self.size)

    def start_gather(self, local: Tensor) -> Callable[[], Tensor]:
        found = self.gather(local)
        return lambda: found

    def gather_host(self, local: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.concatenate([local] * self.size)

    def gather_ints(self, value: int) -> list[int]:
        return [value] * self.size

    def sum(self, value: Tensor) -> Tensor:
        return value.clone()

    def max(self, value: Tensor) -> Tensor:
        return value.clone()


def on_ranks(function: Callable[..., Any], size: int, *arguments: Any) -> list[Any]:
    """function(*arguments) on `size` ranks, for which World.current() is a HostWorld; the results in rank order."""
    # Without DeepSpeed, which asks for devices when it is imported: a fork of such a process could not use CUDA.
    return run_ranks(_with_host_world, size, function, *arguments, preload=["atr_scale.losses"])


def _with_host_world(function: Callable[..., Any], *arguments: Any) -> Any:
    if torch.cuda.is_available():
        torch.cuda.set_device(0)
    world = HostWorld(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)
    with patch.object(World, "current", staticmethod(lambda: world)):
        return function(*arguments)
