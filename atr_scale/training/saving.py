"""Saving on a disk that may be full: training goes on without the checkpoint, and the next save tries again."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from atr_scale import checkpoint, run_checkpoints
from atr_scale.checkpoint_writer import DiskFull, Trained, Writing
from atr_scale.config import RunConfig
from atr_scale.distributed.world import World
from atr_scale.errors import Failure
from atr_scale.files import disk_of
from atr_scale.memory import as_text
from atr_scale.training.monitor import Monitor

logger = logging.getLogger(__name__)

MARGIN = 1.02  # of the last checkpoint's size
MARGIN_BYTES = 1 << 20
BYTES_OF_A_PARAMETER = 4  # of its weight, in fp32
BYTES_OF_A_LEARNED_PARAMETER = 8  # of its two moments


class Saver:
    """Saves the checkpoints of a run. Every rank has one, and all call it together.

    last: the newest sound checkpoint, None before the first one. failed: saves since then that had no space.
    """

    def __init__(self, config: RunConfig, world: World, monitor: Monitor, last: Path | None) -> None:
        self.config, self.world, self.monitor, self.last = config, world, monitor, last
        self.run, self.keep = Path(config.run.dir), config.train.keep_checkpoints
        self.failed = 0
        self._writing: Writing | None = None
        self._unsaved = 0, 0  # step and bytes of the save that is being made

    def start(self, trained: Trained, state: dict[str, Any], ends: Callable[[], bool]) -> None:
        """Copy the state of all ranks; threads write it while training goes on. The save before is finished first.

        ends: whether the run ends after this save; all ranks call it together. Raises Failure if the run ends and
        there is no space for it.
        """
        self.finish(lambda: False)  # this one is still to be tried
        needed = self.world.from_main(lambda: self._bytes(trained.model))
        self._unsaved = state["step"], needed
        try:
            self.world.from_main(lambda: self._make_space(needed))
            self._writing = checkpoint.start_saving(
                self.run, trained, self.world, self.config.to_yaml(), state, self._prune
            )
        except DiskFull:
            self._not_saved(ends())

    def finish(self, ends: Callable[[], bool]) -> bool:
        """Wait for the save that is being written, and say whether there was space for the last one that was started.

        ends: whether the run ends after this save; all ranks call it together. Raises Failure if the run ends and
        cannot be saved.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return not self.failed
        try:
            self.last = writing.result()
        except DiskFull:
            self._not_saved(ends())
            return False
        if self.failed:
            self.failed = 0
            self.monitor.saving(self._unsaved[0], 0)
        return True

    def _prune(self) -> None:
        newest = checkpoint.folder_of(self.run, self._unsaved[0])
        run_checkpoints.prune(self.run, self.keep, newest)

    def _bytes(self, model: nn.Module) -> int:
        """Of a checkpoint: like the last one, which holds the files of all ranks; before that by the parameters."""
        if self.last is not None:
            files = [path.stat().st_size for path in self.last.rglob("*") if path.is_file()]
            return int(MARGIN * sum(files)) + MARGIN_BYTES
        total = 0
        for parameter in model.parameters():
            count = getattr(parameter, "ds_numel", parameter.numel())  # ZeRO 3 leaves an empty tensor here
            total += count * (BYTES_OF_A_PARAMETER + parameter.requires_grad * BYTES_OF_A_LEARNED_PARAMETER)
        return total + MARGIN_BYTES

    def _make_space(self, needed: int) -> None:
        """Remove a checkpoint that the next one would replace, if that is needed. DiskFull if it does not suffice."""
        if shutil.disk_usage(self.run).free < needed:
            run_checkpoints.prune(self.run, max(1, self.keep - 1), self.last)
        if shutil.disk_usage(self.run).free < needed:
            raise DiskFull("no space")

    def _not_saved(self, ends: bool) -> None:
        self.failed += 1
        step, needed = self._unsaved
        self.monitor.saving(step, self.failed)
        since = f"nothing is saved since {self.last.name if self.last else 'the start'}"
        fault = (
            f"step {step} of {self.run} cannot be saved: the disk {disk_of(self.run)} is full: a checkpoint needs "
            f"{as_text(needed)}, {as_text(shutil.disk_usage(self.run).free)} are free; {since}"
        )
        if ends:
            raise Failure(f"{fault}: make space, and start the same command again")
        if self.world.is_main:
            logger.error("%s; training goes on, and the next save tries again", fault)
