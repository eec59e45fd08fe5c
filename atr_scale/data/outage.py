"""Waiting for a store that does not answer.

An object that cannot be read is an error of that object: its samples are skipped and counted. If the store does not
answer at all, skipping would lose every sample. So a read that has used up its attempts looks at what else can be read.
If nothing can, all reads of the process wait, and one of them at a time tries again, with growing, jittered pauses. The
log says so at the start, once a minute and at the end. After `data.outage_seconds` the process ends with a Failure.
"""

from __future__ import annotations

import errno
import logging
import random
import re
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TypeVar

from atr_scale.errors import Failure, OneLineError, one_line

logger = logging.getLogger(__name__)

BUDGET_S = 600.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 10.0  # before jitter
SAY_EVERY_S = 60.0
# An object is bad if so many attempts fail, one after another, while another object can be read.
BAD_OBJECT_TRIALS = 3
AWAY = {errno.EBUSY, errno.EREMOTEIO}  # as which s3fs raises SlowDown and ServiceUnavailable, and InternalError
AWAY_TYPES = ("ClientError", "ConnectionError", "HTTPClientError")  # of aiohttp and botocore: no complete answer

T = TypeVar("T")


def is_unanswered(error: BaseException) -> bool:
    """Whether an error of a request means that the store did not answer it: no connection, no bytes, 5xx, SlowDown.

    Its other answers are about the object or the request: not found, forbidden, a range that does not exist.
    """
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    status = _status(error) or _status(error.__cause__)
    if status is not None:
        return status >= 500 or status == 429
    if isinstance(error, OSError) and error.errno in AWAY:
        return True
    names = {kind.__name__ for kind in type(error).__mro__}
    return not names.isdisjoint(AWAY_TYPES) or re.search(r"\((5\d\d|429)\) when calling", str(error)) is not None


def _status(error: BaseException | None) -> int | None:
    """The HTTP status of botocore's ClientError, None for other errors."""
    response = getattr(error, "response", None)
    found = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
    return found if isinstance(found, int) else None


class BadObject(OSError):
    """An object that is not served while another one is."""


class StoreOutage:
    """The outage that the reads of one process wait for, if there is one.

    The budget, the log lines and the declared wait are those of the process, however many threads wait.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._own_retries, self.retries_of_workers = 0, 0
        self._clock, self._sleep = clock, sleep
        self._budget_s, self._quiet = BUDGET_S, False
        self._declare: Callable[[str], AbstractContextManager[None]] = lambda _: nullcontext()
        self._retried: Callable[[], None] = lambda: None
        self._turn = threading.Lock()  # held by the thread that tries
        self._changing = threading.Lock()
        self._waiters: set[Hashable] = set()
        self._text, self._began, self._said = "", 0.0, 0.0
        self._failure: Failure | None = None  # after the budget, until a request is answered
        self._declared = ExitStack()

    @property
    def retries(self) -> int:
        """Requests that this process and the workers of its loader have repeated."""
        return self._own_retries + self.retries_of_workers

    def count_retry(self) -> None:
        """A request is about to be repeated."""
        self._own_retries += 1
        self._retried()

    def answered(self) -> None:
        """A request was answered: the next outage has a budget of its own."""
        self._failure = None

    @contextmanager
    def waiting_with(
        self,
        budget_s: float,
        declare: Callable[[str], AbstractContextManager[None]],
        *,
        retried: Callable[[], None] = lambda: None,
        quiet: bool = False,
    ) -> Iterator[None]:
        """Inside, waits end after `budget_s` seconds, and each is made inside `declare(text)`.

        retried: called before an attempt is repeated. quiet: waits are not logged.
        """
        before = self._budget_s, self._declare, self._retried, self._quiet
        self._budget_s, self._declare, self._retried, self._quiet = budget_s, declare, retried, quiet
        try:
            yield
        finally:
            self._budget_s, self._declare, self._retried, self._quiet = before

    def outlast(
        self,
        attempt: Callable[[], T],
        location: str,
        error: Exception,
        others: Callable[[], bool],
        trials: int = BAD_OBJECT_TRIALS,
    ) -> T:
        """The result of `attempt`, whose last call has failed with `error`, when the store answers again.

        others: whether another object can be read now. Raises BadObject if that is so and `trials` attempts in a row
        fail, the error of an attempt that is not `is_unanswered`, and Failure after the budget.
        """
        waiter, bad, pauses = object(), 0, 0
        self._join(waiter)
        try:
            while True:
                with self._turn:
                    self._check_budget()
                    if others():
                        bad += 1
                        if bad == trials:
                            raise BadObject(f"{location}: {error!r}, while another object can be read")
                        self.end(waiter)
                    else:
                        bad = 0
                        self.begin(waiter, f"{location}: {one_line(repr(error), 160)}")
                    if bad != 1:  # if the store has just come back, there is nothing to wait for
                        self._pause(pauses)
                        pauses += 1
                    try:
                        result = attempt()
                        self.answered()
                        return result
                    except Exception as again:
                        if isinstance(again, OneLineError):
                            raise
                        if not is_unanswered(again):
                            raise (again if isinstance(again, OSError) else OSError(f"{location}: {again!r}")) from None
                        error = again
                        self.count_retry()
        finally:
            self.end(waiter)

    def begin(self, waiter: Hashable, text: str) -> None:
        """`waiter`, a thread or a loader worker, waits for the store. text: the place and the error."""
        with self._changing:
            if not self._waiters:
                self._text, self._began, self._said = text, self._clock(), self._clock()
                self._say(
                    "the store does not answer (%s): waiting for it, at most %.0f s (data.outage_seconds); if this is "
                    "the first use of this store, check AWS_ENDPOINT_URL",
                    text, self._budget_s,
                )  # fmt: skip
                self._declared.enter_context(self._declare(f"outage: {text}"))
            self._waiters.add(waiter)

    def end(self, waiter: Hashable) -> None:
        """`waiter` waits no longer, for whatever reason. The outage ends with the last one."""
        with self._changing:
            if waiter not in self._waiters:
                return
            self._waiters.discard(waiter)
            if not self._waiters:
                self._declared.close()
                self._say("no more waiting for the store, after %.0f s", self._clock() - self._began)

    def remind(self) -> None:
        """Log once a minute that the process waits."""
        with self._changing:
            now = self._clock()
            if self._waiters and now - self._said >= SAY_EVERY_S:
                self._said = now
                self._say(
                    "the store has not answered for %.0f s of at most %.0f s: %s",
                    now - self._began, self._budget_s, self._text,
                )  # fmt: skip

    def _say(self, text: str, *values: object) -> None:
        if not self._quiet:
            logger.warning(text, *values)

    def _join(self, waiter: Hashable) -> None:
        """Join the outage, if there is one: all of its waiters have the same budget."""
        with self._changing:
            if self._waiters:
                self._waiters.add(waiter)

    def _pause(self, number: int) -> None:
        """Before another attempt."""
        self.remind()
        pause = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0**number) * random.uniform(0.5, 1.5)
        self._sleep(min(pause, self._left()))

    def _left(self) -> float:
        """Seconds of the budget."""
        return self._budget_s - (self._clock() - self._began) if self._waiters else self._budget_s

    def _check_budget(self) -> None:
        """Raises Failure if the budget is spent."""
        if self._failure is None and self._waiters and self._left() <= 0:
            self._failure = Failure(
                f"the store could not be reached for {self._clock() - self._began:.0f} s (data.outage_seconds = "
                f"{self._budget_s:g}): {self._text}; start the same command again when it answers"
            )
        if self._failure is not None:
            raise self._failure


STORE = StoreOutage()  # of this process
