"""A job in a box from its submission to its end: faults by a schedule, and a record of all that was seen."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from atr_scale.errors import Failure, UserError
from atr_scale.run_files import read_json_lines
from atr_scale.status import read_status
from tools.cluster import OVER
from tools.rehearse.box import Box
from tools.rehearse.faults import NothingToHit, Undo, inject
from tools.rehearse.schedule import LAST, Fault

POLL_S = 0.5
DECLARED = "starting", "waiting", "evaluating", "saving"


@dataclass
class Hit:
    """A fault that was done. Times are seconds since the epoch.

    step: the highest that the run had begun then.
    """

    fault: Fault
    place: str
    began: float
    step: int
    ended: float | None = None
    undo: Undo | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Sight:
    """What was seen at a time: the steps begun so far in all, the state of the job and of its run, and its starts."""

    time: float
    begun: int
    job: str
    run: str
    starts: int


@dataclass
class Record:
    """All that was seen of a job. begun: (time, step, ranks) of every step that rank 0 has begun."""

    hits: list[Hit] = field(default_factory=list)
    sights: list[Sight] = field(default_factory=list)
    begun: list[tuple[float, int, int]] = field(default_factory=list)
    state: str = "PENDING"


class Watch:
    """Follows the job of a box and hits it."""

    def __init__(
        self, box: Box, run: Callable[[], Path], audit: Path, steps: int, faults: Sequence[Fault], name: str
    ) -> None:
        """run: finds the folder in which the first rank writes its signs of life."""
        self.box, self.run, self.audit, self.steps, self.name = box, run, audit, steps, name
        self.left, self.record, self.over_s = list(faults), Record(), 1800.0 + 120.0 * len(faults)

    def until_over(self) -> Record:
        """Raises Failure if the job does not end."""
        began = time.monotonic()
        with self._progress() as bar:
            while self.record.state not in OVER:
                if time.monotonic() - began > self.over_s:
                    raise Failure(f"{self.name} does not end: {self.box.cluster.job(self.box.number)}")
                time.sleep(POLL_S)
                self._look()
                self._undo()
                self._inject()
                done = max((step for _, step, _ in self.record.begun), default=0)
                bar.update(done - bar.n)
                bar.set_postfix_str(f"{len(self.record.hits)} faults, {self._state()}", refresh=False)
        for hit in self.record.hits:
            self._end(hit)
        return self.record

    def _progress(self) -> Any:
        seconds = 1.0 if sys.stderr.isatty() else 30.0  # in a log every line stays
        return tqdm(total=self.steps, desc=self.name, unit="step", mininterval=seconds, miniters=0, smoothing=0)

    def _look(self) -> None:
        record = self.record
        try:
            job = self.box.cluster.job(self.box.number)
            self.box.fit(job)
        except (Failure, subprocess.TimeoutExpired):  # SLURM is busy
            return
        record.begun = [(line["time"], line["step"], line["ranks"]) for line in read_json_lines(self.first_rank)]
        record.state = job["JobState"]
        starts = int(job["Restarts"]) + 1
        record.sights.append(Sight(time.time(), len(record.begun), record.state, self._state(), starts))

    @property
    def first_rank(self) -> Path:
        return Path(f"{self.audit}.0")

    def _state(self) -> str:
        try:
            return read_status(self.run()).state
        except (UserError, OSError, ValueError):
            return "not begun"

    def _undo(self) -> None:
        for hit in self.record.hits:
            if hit.ended is None and time.time() > hit.began + hit.fault.lasts_s:
                self._end(hit)

    def _end(self, hit: Hit) -> None:
        if hit.ended is None:
            if hit.undo:
                hit.undo()
            hit.ended = time.time()

    def _inject(self) -> None:
        """The next fault, if it is due and there is something to hit."""
        if not self.left or self.record.state in OVER:
            return
        fault, hits = self.left[0], self.record.hits
        step = max((step for _, step, _ in self.record.begun), default=0)
        soon = fault.after_s is not None and step < self.steps - LAST
        due = time.time() > hits[-1].began + (fault.after_s or 0.0) if soon else step >= fault.step
        same = [hit for hit in hits if hit.ended is None and hit.fault.kind.group == fault.kind.group != ""]
        if not due or same:
            return
        began = time.time()
        try:
            place, undo = inject(fault, self.box)
        except NothingToHit:
            return
        self.left.pop(0)
        hits.append(Hit(fault, place, began, step, undo=undo))
        tqdm.write(f"{fault.number:3} at step {step}: {fault.kind.what} ({place})")


def declared(sight: Sight) -> bool:
    """Whether the run has told that it makes no steps now, or SLURM that the job waits."""
    return sight.job != "RUNNING" or sight.run in DECLARED


def stalls(record: Record) -> Iterator[tuple[float, float]]:
    """(begin, seconds) of each time without a new step that was not declared."""
    began: float | None = None
    for before, sight in zip(record.sights, record.sights[1:], strict=False):
        still = sight.begun == before.begun and not declared(sight) and sight.starts == before.starts
        if still and began is None:
            began = before.time
        if not still and began is not None:
            yield began, before.time - began
            began = None
