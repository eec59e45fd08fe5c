"""Preemption: a signal sets a flag, which travels with the next optimizer step, and all ranks save together."""

from __future__ import annotations

import signal
from types import FrameType

# SLURM scripts commonly ask for USR1. USR2 is for NCCL, parts of which use USR1 themselves.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class PreemptionFlag:
    """Which signal has asked this rank to stop, if any. Creating it installs the signal handlers."""

    def __init__(self) -> None:
        self.received: str | None = None
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
