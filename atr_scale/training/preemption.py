"""Preemption: a signal asks to stop, and all ranks save together and leave.

During training it travels with the next optimizer step. Evaluations look at it in every batch. Before training there is
nothing to save, so the process leaves at once.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from atr_scale.distributed.lifeline import STOP_SIGNALS
from atr_scale.distributed.world import World
from atr_scale.run_files import PREEMPTED
from atr_scale.training.attempts import Attempt

logger = logging.getLogger(__name__)

TOLD = "told to stop"  # key of the store
LEAVE_S = 5.0  # for a process that leaves before training, as what it opens may have threads that go on


class PreemptionFlag:
    """Which signal has asked this rank to stop, if any. Signals are received while it is entered, in the main thread.

    Further signals change nothing: what is being saved is saved.
    """

    def __init__(self, world: World | None = None, before_training: Callable[[str], None] = lambda name: None) -> None:
        """before_training: called with the signal's name if it comes before `begin`; then the process exits with 0."""
        self.received: str | None = None
        self._world, self._before_training = world or World(), before_training
        self._begun, self._published = False, False
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> PreemptionFlag:
        if threading.current_thread() is threading.main_thread():  # no other thread, of a notebook say, gets signals
            self._handlers = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def begin(self) -> None:
        """From now on there is something to save."""
        self._begun = True

    def is_up(self) -> bool:
        """Whether this rank was asked to stop, or another one that has called this. No rank waits for another here."""
        store = self._world.store if self._world.size > 1 else None
        if self.received is not None:
            if store is not None and not self._published:
                store.set(TOLD, self.received)
                self._published = True
            return True
        return store is not None and bool(store.check([TOLD]))

    def agree(self) -> bool:
        """Whether any rank was asked to stop. All ranks call this together and get the same answer."""
        return self._world.any(self.is_up())

    def _receive(self, number: int, frame: FrameType | None) -> None:
        first, self.received = self.received is None, signal.Signals(number).name
        if self._begun or not first:
            return
        last = threading.Timer(LEAVE_S, os._exit, (0,))
        last.daemon = True
        last.start()
        logger.warning("told to stop before training: there is nothing to save, and the same command starts again")
        self._before_training(self.received)
        raise SystemExit(0)


def leave_marker(run: Path, told: str | None) -> None:
    """Write RUN/preempted. told: the signal that this rank has received, if any. All ranks call this.

    The first rank of each machine writes it, for machines may have run folders of their own.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        (run / PREEMPTED).write_text(f"{told or 'another rank was told'}\n", encoding="utf-8")


def preemptible(run: Path, world: World, attempt: Attempt) -> PreemptionFlag:
    """The flag of a training in the folder `run`; a signal before it begins is noted there, like a later one."""

    def note(name: str) -> None:
        with suppress(OSError):
            (run / PREEMPTED).write_text(f"{name}\n", encoding="utf-8")
        attempt.end("preempted", 0)

    return PreemptionFlag(world, note)
