"""How far an embedding is, over all ranks."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

from tqdm import tqdm

from atr_scale.distributed.world import World
from atr_scale.search.parts import Plan

logger = logging.getLogger(__name__)

SAY_S = 30.0  # between two lines about the progress in a log


class EmbeddingProgress:
    """How far all ranks are: a bar in a terminal, else a line of the log now and then. The main rank tells it."""

    def __init__(self, plan: Plan, todo: list[int], world: World) -> None:
        sizes = {number: sum(plan.source.entries[i].size for i in plan.parts[number]) for number in todo}
        counts = {number: len(plan.parts[number]) for number in todo}
        self._before = {n: (sum_clips, sum_bytes) for n, sum_clips, sum_bytes in _running(todo, counts, sizes)}
        self._total = sum(sizes.values())
        self._all, self._began = len(plan.source.entries), time.monotonic()
        self._clips, self._bytes, self._said = 0.0, 0.0, self._began
        self._kept = self._all - sum(counts.values())
        quiet = None if world.is_main else True
        self._bar = tqdm(
            desc="embedding", total=self._total, unit="B", unit_scale=True, unit_divisor=1024, disable=quiet, delay=2.0
        )
        self._tells = world.is_main and self._bar.disable

    def begin(self, number: int) -> None:
        """Part `number` is begun: those before it are taken."""
        self._clips, self._bytes = self._before[number]
        self._show()

    def add(self, clips: float, size: float) -> None:
        """So many clips, or a fraction of one, and bytes of them are done."""
        self._clips, self._bytes = self._clips + clips, self._bytes + size
        self._show()

    def close(self) -> None:
        self._bar.close()

    def _show(self) -> None:
        spent = time.monotonic() - self._began
        rate = self._clips / max(spent, 1e-9)
        self._bar.set_postfix_str(f"{self._kept + self._clips:.0f} of {self._all} clips", refresh=False)
        self._bar.update(self._bytes - self._bar.n)
        if self._tells and time.monotonic() - self._said > SAY_S and self._bytes:
            self._said = time.monotonic()
            left = tqdm.format_interval(spent * (self._total - self._bytes) / self._bytes)
            done = self._kept + self._clips
            logger.info("%.0f of %d clips, %.1f clips/s, ETA %s", done, self._all, rate, left)


def _running(todo: list[int], counts: dict[int, int], sizes: dict[int, int]) -> Iterator[tuple[int, int, int]]:
    """(part, clips before it, bytes before it)."""
    clips = size = 0
    for number in todo:
        yield number, clips, size
        clips, size = clips + counts[number], size + sizes[number]
