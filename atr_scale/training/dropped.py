"""The names of dropped samples: in RUN/dropped.jsonl, and a few of them in the log."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

from atr_scale.batch import DroppedSample, count_reasons
from atr_scale.errors import one_line
from atr_scale.run_files import DROPPED, append_json_lines, read_json_lines
from atr_scale.training.monitor import cut_lines

logger = logging.getLogger(__name__)

MOST_NAMED = 10_000  # lines of the file: a corpus that is broken as a whole must not fill the disk
PAUSE = 60.0  # seconds between log lines


class DroppedSamples:
    """Names the dropped samples of all ranks. Only the main rank makes one.

    A line of the file: {"step": 12, "sample": "corpus/shard/key", "reason": "silent_audio", "detail": "..."}.
    """

    def __init__(self, run: Path, resume_step: int) -> None:
        """Lines of steps after resume_step are removed: those steps come again."""
        self.path = run / DROPPED
        cut_lines(self.path, resume_step or None)
        self._named = len(read_json_lines(self.path))
        self._told: float | None = None
        self._untold: list[DroppedSample] = []

    def add(self, samples: Sequence[tuple[int, DroppedSample]]) -> None:
        """Samples that were dropped since the last call, each with the optimizer step that wanted it."""
        if not samples:
            return
        named = samples[: MOST_NAMED - self._named]
        self._named += len(named)
        lines = [
            {"step": step, "sample": sample.place, "reason": sample.reason, "detail": one_line(sample.detail)}
            for step, sample in named
        ]
        try:
            append_json_lines(self.path, lines)
        except OSError as error:  # a full disk is no reason to end training: the counts are kept
            logger.debug("%s: not written (%s)", self.path, error.strerror)
        self._untold += [sample for _, sample in samples]
        if self._told is None or time.monotonic() - self._told >= PAUSE:
            self._tell()

    def _tell(self) -> None:
        first, counts = self._untold[0], dict(count_reasons(self._untold))
        logger.warning(
            "dropped %d unreadable samples (%s), for example %s (%s: %s); their names are in %s",
            len(self._untold), ", ".join(f"{count} {reason}" for reason, count in counts.items()),
            first.place, first.reason, one_line(first.detail), self.path,
        )  # fmt: skip
        self._untold, self._told = [], time.monotonic()
