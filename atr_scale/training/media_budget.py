"""The bytes of pictures and sounds in a run's TensorBoard files."""

from __future__ import annotations

import logging
from pathlib import Path

logger = logging.getLogger(__name__)

MEDIA_BYTES = 4_000_000  # of a run


class MediaBudget:
    """Which pictures and sounds are kept: those of the first validations and those of the last one.

    folder: what is in it counts, so that a resumed run has one budget. last_step: None if it is not known.
    """

    def __init__(self, folder: Path, last_step: int | None) -> None:
        self.spent = sum(path.stat().st_size for path in folder.glob("*")) if folder.exists() else 0
        self.last_step = last_step
        self._full = False
        self._step, self._in_step, self._largest = -1, 0, 0

    def is_open(self, step: int) -> bool:
        """Whether it is worth to make a picture or a sound of this step."""
        return not self._full or step == self.last_step

    def take(self, step: int, size: int) -> bool:
        """Whether `size` bytes of this step are kept, which then are spent. As much as a step has had is left for the
        last one."""
        if step != self._step:
            self._step, self._in_step = step, 0
        own = self._in_step + size
        left = 0 if step == self.last_step else max(self._largest, own)
        if not self.is_open(step) or self.spent + size + left > MEDIA_BYTES:
            if not self._full:
                logger.info(
                    "TensorBoard: pictures and sounds have reached their limit of %g MB; from step %d on only those of "
                    "the last step are added",
                    MEDIA_BYTES / 1e6, step,
                )  # fmt: skip
            self._full = True
            return False
        self.spent += size
        self._in_step, self._largest = own, max(self._largest, own)
        return True
