"""Preemption: a signal sets a flag, ranks compare their flags between steps, and all of them save together."""

from __future__ import annotations

import signal
from types import FrameType

from atr_scale.distributed.world import World

# SLURM scripts commonly ask for USR1. USR2 is for NCCL, parts of which use USR1 themselves.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class PreemptionFlag:
    """Whether a signal has asked any rank to stop. Creating it installs the signal handlers."""

    def __init__(self) -> None:
        self.received: str | None = None
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def agreed(self, world: World) -> bool:
        """Whether any rank has received a signal; a collective call."""
        return world.any(self.received is not None)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
