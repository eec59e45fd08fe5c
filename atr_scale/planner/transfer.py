"""The transfers of one optimizer step, and the phases of the GPU's work beside which they run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Phase = Literal["text forward", "audio forward", "text backward", "audio backward"]


@dataclass(frozen=True)
class Transfer:
    """Collectives of one kind.

    nbytes: bytes that one rank gives to an all-gather, gets from a reduce-scatter, or has reduced. behind: the phase
    beside which they run; "buckets": each call as soon as the last backward pass has filled its bucket; None: the GPU
    waits for them.
    """

    kind: str
    collective: str
    nbytes: int
    calls: int = 1
    behind: Phase | Literal["buckets"] | None = None

    def sent(self, world_size: int) -> float:
        """Bytes that a rank sends (and receives) in a ring, the least that any algorithm needs; of reductions to one
        rank after another the mean over ranks."""
        if self.collective in ("all_reduce", "reduce"):
            times = 2 if self.collective == "all_reduce" else 1
            return times * (world_size - 1) / world_size * self.nbytes
        return (world_size - 1) * float(self.nbytes)
