"""Signs of life of one rank: what it does, when it last made progress, and how long it may take until the next time.

The training thread tells a `Heartbeat` about its steps and declares its waits. While a heartbeat is entered, a thread
of its own writes RUN/status/rank-R.json for `atr-scale status`, also while the training thread is blocked.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any

from atr_scale.config import RunConfig
from atr_scale.distributed.watchdog import Watchdog
from atr_scale.distributed.world import World
from atr_scale.errors import one_line
from atr_scale.redaction import redact
from atr_scale.run_files import rank_file, stacks_file
from atr_scale.training.attempts import Attempt

logger = logging.getLogger(__name__)

WRITE_S, RANKS_PER_S = 3.0, 100  # between two writes of a file; more with many ranks, to spare the file system
LEAST_HANG_S, HANG_STEPS = 60.0, 10
LEAST_COMPILED_S = 600.0  # a batch of a new shape is compiled in the middle of a run
WAIT_S, SPARE_S = 3600.0, 300.0
STEPS_KEPT = 50  # durations of which the median is taken
OF_PHASES = "starting", "evaluating", "saving"  # waits that are a state of their own; others are "waiting"


class Heartbeat:
    """What one rank does, told by its training thread and read by others.

    `beat` after every step, and without a step at any other progress, for example after each batch of an evaluation.
    `wait` around what may take longer than a step. A rank is starting until it has made two steps, the first of which
    may be slow.
    """

    def __init__(
        self,
        run_dir: Path | None = None,
        world: World | None = None,
        attempt: int = 0,
        *,
        hang_s: float | None = None,
        least_hang_s: float = LEAST_HANG_S,
        wait_s: float = WAIT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """run_dir: where the file is written, None: nowhere. attempt: number of this start of the run.

        hang_s: seconds after which a rank without progress hangs, by default HANG_STEPS median steps, and at least
        least_hang_s. wait_s: the same in a declared wait.
        """
        self.run_dir, self.world, self.attempt = run_dir, world or World(), attempt
        self._hang_s, self._least_hang_s, self._wait_s, self._clock = hang_s, least_hang_s, wait_s, clock
        self.step, self.batches_read = 0, 0  # optimizer steps of the run; batches since the last one
        self.signs = 0  # of progress
        self._waits, self._waits_began = ["starting"], clock()
        self._changing = threading.Lock()
        self._reading = False
        self._durations: deque[float] = deque(maxlen=STEPS_KEPT)
        self._last_step: float | None = None  # its end, by the clock, moved by the waits since
        self._started = self._progressed = time.time()
        self._fields: dict[str, Any] = {
            "steps": None, "samples_seen": 0, "dropped": {}, "skipped_steps": 0, "fp16_overflows": 0, "retries": 0,
            "failed_saves": 0,
        }  # fmt: skip
        self._reason: str | None = None
        self._ended, self._written = threading.Event(), False
        self._writer = threading.Thread(target=self._write_regularly, name="heartbeat", daemon=True)

    def beat(self, step: int | None = None) -> None:
        """There was progress. step: optimizer steps of the run that are done, if one has just ended."""
        self.signs += 1
        self._progressed = time.time()
        if step is None:
            return
        now = self._clock()
        if self._last_step is not None:
            self._durations.append(now - self._last_step)
            with self._changing:
                self._waits = [wait for wait in self._waits if wait != "starting"]
        self._last_step, self.step, self.batches_read = now, step, 0

    def tell(self, **fields: Any) -> None:
        """Set fields of the file: steps, samples_seen, dropped, counts of faults."""
        self._fields.update(fields)

    @contextlib.contextmanager
    def wait(self, what: str) -> Iterator[None]:
        """A declared wait: it may take longer than a step, up to a limit of its own since the last `beat`.

        what: "evaluating", "saving", or any other reason in a few words. Waits of several threads may overlap.
        """
        with self._changing:
            if self._waits in ([], ["starting"]):
                self._waits_began = self._clock()
            self._waits = [*self._waits, what]
        self.beat()
        try:
            yield
        finally:
            self.beat()  # before the limit is lower again
            with self._changing:
                left = self._waits.copy()
                left.remove(what)
                self._waits = left
                if left in ([], ["starting"]) and self._last_step is not None:  # the wait is no part of the next step
                    self._last_step += self._clock() - max(self._waits_began, self._last_step)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Taking the next batch. It needs no other rank, so a rank that is blocked in it is behind those beyond it."""
        self._reading = True
        try:
            yield
        finally:
            self._reading = False
        self.batches_read += 1
        self.beat()

    @property
    def doing(self) -> str:
        """The innermost declared wait, or what part of a step this rank is in."""
        waits = self._waits
        return waits[-1] if waits else "reading a batch" if self._reading else "training"

    @property
    def limit(self) -> float:
        """Seconds since the last sign of progress after which this rank hangs."""
        return max(self.hang_limit, self._wait_s) if self._waits else self.hang_limit

    @property
    def hang_limit(self) -> float:
        """The same without declared waits. Before the median is known, imports may keep other threads from running."""
        if self._hang_s is None or not self._durations:
            return max(self._least_hang_s, HANG_STEPS * self._median)
        return self._hang_s

    @property
    def _median(self) -> float:
        return median(self._durations.copy() or [0.0])

    def __enter__(self) -> Heartbeat:
        if self.run_dir is not None:
            with contextlib.suppress(OSError):
                rank_file(self.run_dir, self.world.rank).parent.mkdir(parents=True, exist_ok=True)
            self._writer.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        left = error is None or isinstance(error, SystemExit)  # the latter is a signal before training
        self.end(None if left else one_line(str(error) or type(error).__name__))

    def end(self, reason: str | None) -> None:
        """The last sign of life of this rank. reason: why it ended early, None at its normal end."""
        self._reason = reason and redact(reason)
        self._ended.set()
        if self._writer.is_alive():
            self._writer.join(timeout=10)  # a hanging file system does not stop the end

    def _write_regularly(self) -> None:
        period = max(WRITE_S, self.world.size / RANKS_PER_S)
        while not self._ended.wait(period if self._write() else 10 * period):
            pass
        self._write()

    def _write(self) -> bool:
        assert self.run_dir is not None
        path = rank_file(self.run_dir, self.world.rank)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(json.dumps(self.fields()), encoding="utf-8")
            os.replace(temporary, path)
        except OSError as error:  # a full disk or a vanished folder does not end training
            if self._written:
                logger.warning("%s cannot be written any more (%s)", path, error.strerror)
            self._written = False
        else:
            self._written = True
        return self._written

    def fields(self) -> dict[str, Any]:
        """The content of the file. Times are seconds since the epoch: beat is the last progress, written is now."""
        waits, ended = self._waits, self._ended.is_set()
        state = "training" if not waits else waits[-1] if waits[-1] in OF_PHASES else "waiting"
        return {
            "rank": self.world.rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "attempt": self.attempt,
            "state": "ended" if ended else state,
            "wait": waits[-1] if waits and not ended else None,
            "step": self.step,
            **self._fields,
            "step_seconds": self._median or None,
            "started": self._started,
            "beat": self._progressed,
            "limit": self.limit,
            "written": time.time(),
            "reason": self._reason,
        }


def longest_wait(config: RunConfig) -> float:
    """Limit of declared waits in seconds: longer than the store's, whose end has a message of its own."""
    return max(WAIT_S, config.data.outage_seconds + SPARE_S)


def longest_silence(config: RunConfig) -> float:
    """Seconds for which a rank may wait for another one: the watchdog, which says more, ends the run before."""
    return max(longest_wait(config), config.train.hang_seconds or 0) + SPARE_S


@contextlib.contextmanager
def watched_rank(
    config: RunConfig, world: World, attempt: Attempt, last_words: Callable[[], None] = lambda: None
) -> Iterator[Heartbeat]:
    """The heartbeat of this rank, with a watchdog that ends it if the run hangs. All ranks enter this together.

    last_words: called before it ends, when the reason is written.
    """
    run = config.run.folder
    compiled = config.model.audio.compile or config.model.text.compile
    heartbeat = Heartbeat(
        run,
        world,
        attempt.number,
        hang_s=config.train.hang_seconds,
        least_hang_s=LEAST_COMPILED_S if compiled else LEAST_HANG_S,
        wait_s=longest_wait(config),
    )

    def on_hang(reason: str, reports: bool) -> None:
        heartbeat.end(reason)
        if reports:
            attempt.end(reason, 1)
        last_words()

    with heartbeat, Watchdog(world, heartbeat, stacks_file(run, attempt.number, world.rank), on_hang):
        yield heartbeat
