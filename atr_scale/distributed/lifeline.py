"""Processes end with the one they work for, also if it is killed: ranks with their launcher, readers with their rank.

Nobody else ends them: a killed process cannot, and a launcher that was killed has no successor that knows its ranks.
They do not end before it either: SLURM sends the signals that ask a rank to stop to all processes of a job, but a rank
needs its readers for the step after which it saves.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

# A rank saves and leaves. SLURM scripts commonly ask for USR1; USR2 is for NCCL, parts of which use USR1 themselves.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
LOOK_S = 2.0
# Set by torchrun and accelerate, by accelerate for a single process, and by deepspeed. Below srun SLURM ends all ranks.
OF_LAUNCHERS = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION", "CROSS_RANK")


def end_with_launcher(variables: Mapping[str, str]) -> None:
    """End this process within a few seconds of the launcher that started it; does nothing without a launcher.

    variables: the environment, which tells whether there is one. A process that a shell has started goes on without it.
    """
    if any(name in variables for name in OF_LAUNCHERS):
        threading.Thread(target=_end_without_parent, args=(os.getppid(),), name="lifeline", daemon=True).start()


def _end_without_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_S)
    try:
        print("error: the launcher of this rank is gone: it ends too", file=sys.stderr, flush=True)
    finally:  # the launcher may have read this stream
        os._exit(1)


def end_with(process: int) -> None:
    """End this process as soon as another one on this machine has ended.

    process: its number. The parent of a loader's worker is a server of processes, which does not end with the rank.
    """
    threading.Thread(target=_end_without, args=(process,), name="lifeline", daemon=True).start()


def _end_without(process: int) -> None:
    try:
        handle = os.pidfd_open(process)
    except ProcessLookupError:
        os._exit(1)
    except OSError:  # a kernel or a sandbox without handles of processes
        while _exists(process):
            time.sleep(LOOK_S)
        os._exit(1)
    select.select([handle], [], [])
    os._exit(1)


@contextmanager
def deaf_children() -> Iterator[None]:
    """Processes that this thread starts meanwhile, and those that they start, get none of STOP_SIGNALS."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def obey(process: int) -> None:
    """End this process, a child of `deaf_children`, if another one on this machine sends it TERM."""
    threading.Thread(target=_obey, args=(process,), name="obey", daemon=True).start()


def _obey(process: int) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != process:
        pass
    os._exit(0)


def _exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
