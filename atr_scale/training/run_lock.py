"""One training at a time in a run folder: two would lose each other's checkpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from atr_scale.distributed.world import World
from atr_scale.errors import OneLineError, UserError
from atr_scale.files import full_disk_in_one_line
from atr_scale.locks import hold
from atr_scale.run_files import LOCK
from atr_scale.training.checks import check_run_folder


@contextlib.contextmanager
def only_training(run: Path, world: World) -> Iterator[None]:
    """Hold the lock of the run folder `run`, which is made if it is missing. All ranks call this.

    Raises UserError on all ranks if the folder cannot be written to or another training uses it, Failure if its disk is
    full.
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
        yield
