"""How the processes divide an evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from atr_scale.distributed.world import World


@dataclass(frozen=True)
class Parallel:
    """The processes of an evaluation, and the device of this one.

    lockstep: all processes run equally many batches, because parameters that are sharded over ranks need it.
    """

    world: World = field(default_factory=World)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    lockstep: bool = False

    def batches(self, count: int) -> tuple[list[int], list[int]]:
        """(own, surplus) of the batch numbers 0 to count - 1: rank r owns r, r + world size, and so on.

        A batch of `surplus` is run in lockstep, and its result is not used.
        """
        rank, size = self.world.rank, self.world.size
        own = list(range(rank, count, size))
        return own, [rank % count] * (-(-count // size) - len(own)) if self.lockstep else []
