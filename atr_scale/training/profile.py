"""Traces of some optimizer steps: what this rank's CPU and GPU did, and for how long."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from atr_scale.config_train import ProfileSection

logger = logging.getLogger(__name__)

FOLDER = "profile"  # in the run folder
ROWS = 40  # operations in the table
WIDTH = 60  # characters of their names


class StepProfile:
    """Records the steps of `section` and writes them to the run folder, one trace and one table for each rank.

    A start of the run that begins behind the first of these steps records nothing. None: nothing is recorded.
    """

    def __init__(
        self, section: ProfileSection | None, run_dir: Path, rank: int, device: torch.device, steps: int
    ) -> None:
        """steps: of the whole run."""
        if section is not None and section.start > steps and rank == 0:
            logger.warning(
                "train.profile.start = %d is behind the last step, %d: no trace is written", section.start, steps
            )
        self.section, self.folder, self.rank, self.device = section, run_dir / FOLDER, rank, device
        self._recording: profile | None = None
        self._first = self._steps = 0

    def begin(self, step: int) -> None:
        """Called before optimizer step `step`, which counts from 1."""
        if self.section is not None and step == self.section.start:
            activities = [ProfilerActivity.CPU]
            if self.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._recording, self._first, self._steps = profile(activities=activities), step, 0
            self._recording.__enter__()

    @contextlib.contextmanager
    def named(self, name: str) -> Iterator[None]:
        """A part of a step that has this name in the trace; free if nothing is recorded."""
        with contextlib.nullcontext() if self._recording is None else record_function(name):
            yield

    def ends(self) -> bool:
        """Called after each optimizer step: whether it was the last one to be recorded, so that `write` is due."""
        if self._recording is None or self.section is None:
            return False
        self._steps += 1
        return self._steps == self.section.steps

    def write(self) -> None:
        """End the recording, if there is one, and write what it has."""
        if self._recording is None:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        recording, self._recording = self._recording, None
        recording.__exit__(None, None, None)
        self.folder.mkdir(parents=True, exist_ok=True)
        trace = self.folder / f"step-{self._first}-rank-{self.rank}.json.gz"
        recording.export_chrome_trace(str(trace))
        key = "self_cuda_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        table = recording.key_averages().table(sort_by=key, row_limit=ROWS, max_name_column_width=WIDTH)
        trace.with_name(f"step-{self._first}-rank-{self.rank}.txt").write_text(table, encoding="utf-8")
        if self.rank == 0:
            logger.info(
                "trace of %d steps: %s, %.1f MB; open it in https://ui.perfetto.dev, the table beside it as text",
                self._steps, trace, trace.stat().st_size / 1e6,
            )  # fmt: skip
