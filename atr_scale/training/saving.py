"""Saving behind training, on a disk that may fail: training goes on without the checkpoint, and the next save tries
again.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from atr_scale import checkpoint, run_checkpoints
from atr_scale.checkpoint_writer import DiskFull, HostCopies, Trained, Writing
from atr_scale.config import RunConfig
from atr_scale.distributed.world import World
from atr_scale.errors import Failure
from atr_scale.memory import as_text
from atr_scale.remote.mirror import Mirror
from atr_scale.training.heartbeat import Heartbeat
from atr_scale.training.monitor import Monitor

logger = logging.getLogger(__name__)

MARGIN = 1.02  # of the last checkpoint's size
MARGIN_BYTES = 1 << 20
BYTES_OF_A_PARAMETER = 4  # of its weight, in fp32
BYTES_OF_A_LEARNED_PARAMETER = 8  # of its two moments


class Saver:
    """Saves the checkpoints of a run. Every rank has one, and all call it together.

    last: the newest sound checkpoint, None before the first one. failed: saves in a row since then that have failed.
    heartbeat: is told of them.
    """

    def __init__(
        self,
        config: RunConfig,
        world: World,
        monitor: Monitor,
        last: Path | None,
        heartbeat: Heartbeat | None = None,
        mirror: Mirror | None = None,
    ) -> None:
        """mirror: uploads what is saved, if the run is on S3."""
        self.config, self.world, self.monitor, self.last = config, world, monitor, last
        self.heartbeat, self._mirror = heartbeat or Heartbeat(), mirror
        self.run, self.keep = config.run.folder, config.train.keep_checkpoints
        self.failed = 0
        self._config_yaml = config.to_yaml()  # takes as long as the copy of a small model
        self._copies = HostCopies()
        self._writing: Writing | None = None
        self._unsaved: tuple[int, nn.Module] = 0, nn.Identity()  # step and model of the save that is being made
        self._fault: str | None = None  # of this save, when it is known
        self._recorded = 0  # `failed` of the last line of metrics

    def start(self, trained: Trained, state: dict[str, Any], ends: Callable[[], bool]) -> None:
        """Copy the state of all ranks; threads write it while training goes on. The save before is finished first.

        ends: whether the run ends after this save; all ranks call it together. Raises Failure if the run ends and
        there is no space for it.
        """
        self.finish(lambda: False)  # this one is still to be tried
        self._unsaved, self._fault = (state["step"], trained.model), None
        try:
            self._writing = checkpoint.start_saving(
                self.run, trained, self.world, self._config_yaml, state, self._copies,
                shared=self._mirror.shared if self._mirror else None,
                before=self._make_space, afterwards=self._saved, failed=self._note,
            )  # fmt: skip
        except Failure as fault:
            self._not_saved(fault, ends())

    def finish(self, ends: Callable[[], bool]) -> bool:
        """Wait for the save that is being written, and say whether the last one that was started is there.

        ends: whether the run ends after this save; all ranks call it together. Raises Failure if the run ends and
        cannot be saved.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return not self.failed
        try:
            self.last = writing.result()
        except Failure as fault:
            self._not_saved(fault, ends())
            return False
        self.failed = 0
        self.heartbeat.tell(failed_saves=0)
        self.record()
        return True

    def record(self) -> None:
        """Write to the metrics that the save has failed, if that is new. No rank waits for another."""
        if self.failed != self._recorded:
            self._recorded = self.failed
            self.monitor.saving(self._unsaved[0], self.failed)

    def _saved(self, files: run_checkpoints.Files) -> None:
        step = self._unsaved[0]
        # Else a slow store would never have a whole checkpoint.
        uploading = self._mirror.uploading if self._mirror else None
        run_checkpoints.prune(self.run, self.keep, checkpoint.folder_of(self.run, step), uploading)
        if self._mirror:
            self._mirror.written(step, files)

    def _bytes(self) -> int:
        """Of a checkpoint: like the last one, which holds the files of all ranks; before that by the parameters."""
        if self.last is not None:
            files = [path.stat().st_size for path in self.last.rglob("*") if path.is_file()]
            return int(MARGIN * sum(files)) + MARGIN_BYTES
        total = 0
        for parameter in self._unsaved[1].parameters():
            count = getattr(parameter, "ds_numel", parameter.numel())  # ZeRO 3 leaves an empty tensor here
            total += count * (BYTES_OF_A_PARAMETER + parameter.requires_grad * BYTES_OF_A_LEARNED_PARAMETER)
        return total + MARGIN_BYTES

    def _make_space(self) -> None:
        """Remove a checkpoint that the next one would replace, if that is needed. DiskFull if it does not suffice."""
        needed = self._bytes()
        if shutil.disk_usage(self.run).free < needed:
            run_checkpoints.prune(self.run, max(1, self.keep - 1), self.last)
        if shutil.disk_usage(self.run).free < needed:
            raise DiskFull.of(self.run)

    def _note(self, fault: Failure) -> None:
        """Say that this save has failed. Called by any thread, by that of the main rank as soon as it is known."""
        if self._fault is not None:
            return
        step = self._unsaved[0]
        reason = str(fault).removeprefix(f"cannot save to {self.run}: ")
        if isinstance(fault, DiskFull):
            reason = f"{fault}, a checkpoint needs {as_text(self._bytes())}"
        since = f"nothing is saved since {self.last.name if self.last else 'the start'}"
        self._fault = f"step {step} of {self.run} cannot be saved: {reason}; {since}"
        self.failed += 1
        self.heartbeat.tell(failed_saves=self.failed)
        if self.world.is_main:
            logger.error("%s; training goes on, and the next save tries again", self._fault)

    def _not_saved(self, fault: Failure, ends: bool) -> None:
        self._note(fault)
        self.record()
        if ends:
            remedy = "make space" if isinstance(fault, DiskFull) else "mend that"
            raise Failure(f"{self._fault}: {remedy}, and start the same command again")
