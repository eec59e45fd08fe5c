"""One training at a time in a run folder: two would lose each other's checkpoints."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from atr_scale.distributed.world import World
from atr_scale.errors import OneLineError, UserError
from atr_scale.files import full_disk_in_one_line
from atr_scale.locks import hold
from atr_scale.run_files import LOCK
from atr_scale.training.checks import check_run_folder

SEEN_S = 30.0  # for a network file system to show the lock to other machines


@contextlib.contextmanager
def only_training(run: Path, world: World, *, one_folder: bool = True) -> Iterator[None]:
    """Hold the lock of the run folder `run`, which is made if it is missing. All ranks call this.

    one_folder: it must be the same one on all machines. Raises UserError on all ranks if it is not, if it cannot be
    written to or if another training uses it, Failure if its disk is full.
    """
    with contextlib.ExitStack() as held:
        refused: OneLineError | None = None
        if world.is_main:
            try:
                with full_disk_in_one_line(run):
                    check_run_folder(run)
                    held.enter_context(hold(run / LOCK, f"the run folder {run}"))
            except OneLineError as error:
                refused = error
            except OSError as error:
                refused = UserError(f"the run folder {run} is not writable ({error.strerror}): give another run.dir")
        refused = world.gather_objects(refused)[0]
        if refused is not None:
            raise refused
        if one_folder and world.size > 1:
            _check_one_folder(run, world)
        yield


def _check_one_folder(run: Path, world: World) -> None:
    """UserError if a rank does not see the lock: no checkpoint could be saved."""
    lock = world.gather_objects((run / LOCK).read_bytes() if world.is_main else b"")[0]
    deadline = time.monotonic() + SEEN_S
    while not (sees := _holds(run / LOCK, lock)) and time.monotonic() < deadline:
        time.sleep(0.2)
    host = socket.gethostname()
    found = world.gather_objects((sees, host))
    for rank, (its, there) in enumerate(found):
        if not its:
            raise UserError(
                f"the run folder {run} of rank {rank} on {there} is not that of rank 0 on {found[0][1]}: give a folder "
                "that all machines share, or run.dir=s3://bucket/run"
            )


def _holds(path: Path, content: bytes) -> bool:
    try:
        return path.read_bytes() == content
    except OSError:
        return False
