"""RUN/attempts.jsonl: every start of training in a run folder, and how it ended.

    {"event": "start", "attempt": 2, "time": ..., "world_size": 8, "host": ..., "pid": ..., "version": ..., "job": ...}
    {"event": "training", "attempt": 2, "time": ..., "step": 100, "steps": 6000}
    {"event": "end", "attempt": 2, "time": ..., "rank": 0, "reason": "done", "step": 6000, "rc": 0, "known": true}

Times are seconds since the epoch. The end of an attempt that was killed is written by the next one, which may also
write a second end, with a better reason than a rank knew: the last one counts.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from atr_scale.distributed.lost_rank import lost_rank
from atr_scale.distributed.world import World
from atr_scale.errors import OneLineError, one_line
from atr_scale.rank_signs import cause_of, float_in, int_in, read_signs, text_in
from atr_scale.redaction import redact
from atr_scale.run_files import ATTEMPTS, PREEMPTED, append_json_lines, last_logged_step, read_json_lines
from atr_scale.training.record import Progress
from atr_scale.version import __version__

logger = logging.getLogger(__name__)


class Attempt:
    """One start of training, as seen by one rank.

    The main rank writes its lines. Any rank may write the end: the first one that does so knows the cause, and the
    failures of others follow from it.
    """

    def __init__(self, run: Path, world: World) -> None:
        """All ranks make it together: they agree on its number."""
        self.run, self.world = run, world
        self.number = 1
        if world.is_main:
            before = read_json_lines(run / ATTEMPTS)
            last = max((int_in(line, "attempt") or 0 for line in before), default=0)
            self._complete([line for line in before if line.get("attempt") == last], last)
            self.number = last + 1
        self.number = world.gather_objects(self.number)[0]
        self._progress: Progress | None = None
        self._steps = 0
        if world.is_main:
            self._write(
                "start",
                world_size=world.size,
                host=socket.gethostname(),
                pid=os.getpid(),
                version=__version__,
                job=os.environ.get("SLURM_JOB_ID"),
            )

    def follow(self, progress: Progress, steps: int) -> None:
        """Training begins at the step of `progress`, which will advance towards `steps`."""
        self._progress, self._steps = progress, steps
        if self.world.is_main:
            self._write("training", step=progress.step, steps=steps)

    def end(self, reason: str, rc: int, *, known: bool = True) -> None:
        """Write how the attempt ends, unless a rank has done so.

        reason: "done", "preempted" or a failure. known: it is the cause, and not perhaps a consequence.
        """
        lines = read_json_lines(self.run / ATTEMPTS)
        if any(line.get("event") == "end" and line.get("attempt") == self.number for line in lines):
            return
        step, reason = self._progress.step if self._progress else None, redact(one_line(reason))
        self._write("end", rank=self.world.rank, reason=reason, step=step, rc=rc, known=known)

    def finish(self) -> None:
        """Training has returned: the run is done, or has saved and stopped on a signal."""
        if self.world.is_main:
            progress = self._progress
            trained = progress is not None and progress.step >= self._steps
            done = trained and not (self.run / PREEMPTED).exists()  # it may be told to stop in its last evaluation
            self.end("done" if done else "preempted", 0)

    def _complete(self, lines: Sequence[Mapping[str, Any]], number: int) -> None:
        """Write the end of the attempt before, `number`, if it was killed or did not know why it ended.

        lines: its own. The ranks' files, which tell it, are overwritten from now on.
        """
        signs = read_signs(self.run, number) if lines else []
        end = next((line for line in lines if line.get("event") == "end"), None)
        if end:
            cause = cause_of(end, signs)
            if cause != text_in(end, "reason"):
                self._write(**{**end, "reason": cause, "known": True})
        elif lines:
            reason = next((sign.reason for sign in signs if sign.reason), "killed")
            times = [sign.written for sign in signs] or [t for line in lines if (t := float_in(line, "time"))]
            step = max([last_logged_step(self.run), *(sign.step for sign in signs)])
            ended = max(times, default=time.time())
            self._write("end", attempt=number, time=ended, rank=None, reason=reason, step=step, rc=None)

    def _write(self, event: str, **values: Any) -> None:
        line = {"event": event, "attempt": self.number, "time": round(time.time(), 3), **values}
        try:
            if event == "start":  # a run folder that has vanished since is not made again
                self.run.mkdir(parents=True, exist_ok=True)
            append_json_lines(self.run / ATTEMPTS, [line])
        except OSError as error:  # no reason to end training; a bad folder or a full disk is told by who needs it
            logger.debug("%s: not written (%s)", self.run / ATTEMPTS, error.strerror)


@contextmanager
def attempted(run: Path, world: World) -> Iterator[Attempt]:
    """Record an attempt to train in the folder `run`, and its end by whatever is raised. All ranks call this."""
    attempt = Attempt(run, world)
    try:
        yield attempt
    except OneLineError as error:
        attempt.end(str(error), error.exit_code)
        raise
    except KeyboardInterrupt:
        attempt.end("interrupted from the keyboard", 130)
        raise
    except Exception as error:
        lost = lost_rank(error)
        attempt.end(str(lost) if lost else f"{type(error).__name__}: {error}", 1, known=False)
        if lost:
            raise lost from error
        raise
    attempt.finish()
