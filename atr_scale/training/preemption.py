"""Preemption: a signal sets a flag, the flag meets at a step boundary, all ranks save together."""

from __future__ import annotations

import signal
from types import FrameType

from atr_scale.distributed.world import World

# USR1 is what SLURM scripts commonly ask for; USR2 because NCCL uses USR1 itself in places.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class PreemptionFlag:
    """Whether any rank was told to stop. Install before training; `agreed` is a collective call."""

    def __init__(self) -> None:
        self.received: str | None = None
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def agreed(self, world: World) -> bool:
        return world.any(self.received is not None)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
