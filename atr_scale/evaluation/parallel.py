"""How the processes divide an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from atr_scale.distributed.world import World

T = TypeVar("T")


class Abandoned(Exception):
    """An evaluation has been given up because a process was asked to stop. It is raised in all processes together."""


def _go_on() -> bool:
    return False


@dataclass(frozen=True)
class Parallel:
    """The processes of an evaluation, and the device of this one.

    lockstep: all processes run equally many batches, because parameters that are sharded over ranks need it. stops:
    called before each batch, and says whether the evaluation is to be abandoned, in this process or in all.
    """

    world: World = field(default_factory=World)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    lockstep: bool = False
    stops: Callable[[], bool] = _go_on

    def batches(self, count: int) -> tuple[list[int], list[int]]:
        """(own, surplus) of the batch numbers 0 to count - 1: rank r owns r, r + world size, and so on.

        A batch of `surplus` is run in lockstep, and its result is not used.
        """
        rank, size = self.world.rank, self.world.size
        own = list(range(rank, count, size))
        return own, [rank % count] * (-(-count // size) - len(own)) if self.lockstep else []

    def each(self, items: Sequence[T]) -> Iterator[T]:
        """The items of this process, one for each batch. All processes read to the end.

        Raises Abandoned at the end in all processes if one of them was asked to stop, which ends the items early.
        """
        for item in items:
            stops = self.stops()
            # In lockstep no process may leave a batch to the others.
            if self.world.any(stops) if self.lockstep else stops:
                break
            yield item
        self.check()

    def check(self) -> None:
        """Before what all processes do together. Raises Abandoned in all of them if one was asked to stop."""
        if self.world.any(self.stops()):
            raise Abandoned
