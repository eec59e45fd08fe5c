"""Ends a rank of a run that hangs, so that the launcher starts all of them again.

Each rank publishes what it does in the store through which the ranks have met. A rank without progress for its limit
looks for the cause: a process that has stopped publishing, else the ranks that are behind the others, because the rest
wait for these in a collective. The first rank that finds one puts the verdict into the store; every rank that reads it
writes the Python stacks of its threads to a file and exits with code 1.

Two threads do this, beside whatever blocks the training thread: one talks to the store and may be blocked by a stopped
server, the other judges and never waits for anything.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

from torch._C._distributed_c10d import PrefixStore, Store  # torch.distributed, but typed

from atr_scale.distributed.world import World
from atr_scale.errors import Failure, report

TICKS = 12  # looks at the others within the limit
LONGEST_TICK_S = 5.0
POST_S = 5.0  # for the verdict to reach the store
LAST_S = 20.0  # for stacks and the line: the file system may be what hangs
VERDICT = "verdict"


class Activity(Protocol):
    """What the training thread of a rank does, as a heartbeat knows it."""

    step: int
    batches_read: int  # in this step
    signs: int  # of progress so far

    @property
    def doing(self) -> str:
        """In a few words."""

    @property
    def limit(self) -> float:
        """Seconds after the last sign of progress after which the rank hangs."""

    @property
    def hang_limit(self) -> float:
        """The same without declared waits. A process that does not publish for this long is stopped or gone."""


@dataclass(frozen=True)
class Pulse:
    """What a rank publishes. number: of its pulses. age: seconds since the last sign of progress."""

    rank: int
    host: str
    pid: int
    number: int
    step: int
    batches_read: int
    doing: str
    age: float
    limit: float
    hang_limit: float
    ended: bool = False

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.pid} on {self.host}, last seen at step {self.step}, {self.doing})"


class Awake:
    """Seconds in which this process could run: a suspended job, or a terminal's Ctrl-Z, is no hang when it goes on."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._now, self._last = 0.0, clock()

    def __call__(self, tick: float) -> float:
        """The time, if this is called every `tick` seconds: more than twice that since the last call is not counted."""
        last, self._last = self._last, self._clock()
        self._now += min(self._last - last, 2 * tick)
        return self._now


class Judge:
    """Decides from the pulses of the ranks whether the run hangs. Times are those of one `Awake` clock."""

    def __init__(self, rank: int, activity: Activity, now: float = 0.0) -> None:
        self.rank, self.activity = rank, activity
        self._host, self._pid = socket.gethostname(), os.getpid()
        self._signs, self._progressed = activity.signs, now
        self._answered = now  # when the store has answered for the last time
        self._neighbour: tuple[int, float] = -1, now  # number of the neighbour's last pulse, and when it was seen
        self.newest = self.own(now)

    def own(self, now: float) -> Pulse:
        """This rank's pulse, without its number."""
        activity = self.activity
        limit = activity.limit  # read before the signs: the end of a wait is a sign, and then lowers the limit
        if activity.signs != self._signs:
            self._signs, self._progressed = activity.signs, now
        self.newest = Pulse(
            self.rank, self._host, self._pid, 0, activity.step, activity.batches_read, activity.doing,
            now - self._progressed, limit, activity.hang_limit,
        )  # fmt: skip
        return self.newest

    def hear(self, neighbour: Pulse | None, now: float) -> None:
        """The store has answered, with the neighbour's newest pulse."""
        self._answered = now
        if neighbour and neighbour.number != self._neighbour[0]:
            self._neighbour = neighbour.number, now

    def stalled(self, now: float) -> bool:
        """Whether this rank makes no progress, declared wait or not. Only then anything can be wrong."""
        return self.own(now).age > self.activity.hang_limit

    def silent_store(self, now: float) -> bool:
        return self.stalled(now) and now - self._answered > self.activity.hang_limit

    def silent_neighbour(self, neighbour: Pulse, now: float) -> bool:
        """Whether the neighbour's process is stopped or gone: a declared wait does not hide that."""
        silent = now - self._neighbour[1] > self.activity.hang_limit
        return self.stalled(now) and silent and not neighbour.ended

    def behind(self, others: list[Pulse], now: float) -> list[Pulse]:
        """The ranks that hang: of those that are furthest behind, the ones beyond their limits.

        None hangs if any has made progress lately: when a long wait of one ends, those that have waited for it seem to
        be late, but they go on with it.
        """
        ranks = [self.own(now), *(other for other in others if other.rank != self.rank and not other.ended)]
        if any(each.age <= each.hang_limit for each in ranks):
            return []
        last = min((each.step, each.batches_read) for each in ranks)
        return [each for each in ranks if (each.step, each.batches_read) == last and each.age > each.limit]


def describe_hang(hanging: list[Pulse], others: list[Pulse]) -> str:
    """One clause about the ranks that hang. others: all ranks, [] if there is only one."""
    seconds = f"no progress for {max(each.age for each in hanging):.0f} s"
    if not others:
        return f"{seconds}: {hanging[0].doing} after step {hanging[0].step}"
    if ended := [each for each in others if each.ended]:
        return f"{seconds}: {_named(ended)} ended, and the other ranks wait"
    if len(hanging) == len(others):
        return f"{seconds}, and no rank is behind the others: {_named(hanging)}"
    return f"{seconds}: {_named(hanging)} hangs, and the other ranks wait"


def _named(ranks: list[Pulse]) -> str:
    return ", ".join(map(str, ranks[:3])) + (f" and {len(ranks) - 3} more" if len(ranks) > 3 else "")


@dataclass(frozen=True)
class Heard:
    """What the store has answered. exchange: its number. others: pulses of all ranks, if they were asked for."""

    exchange: int
    neighbour: Pulse | None
    others: list[Pulse]


class Watchdog:
    """Watches this rank and the others while it is entered. All ranks enter it together."""

    def __init__(self, world: World, activity: Activity, stacks: Path, on_hang: Callable[[str, bool], None]) -> None:
        """stacks: the file for the Python stacks of this rank's threads. With several ranks, world.store is needed.

        on_hang: called before the process exits, with the reason and whether it is this rank that reports it.
        """
        self.world, self.activity, self.stacks, self._on_hang = world, activity, stacks, on_hang
        self._awake = Awake()
        self._judge = Judge(world.rank, activity, self._awake(self._tick))
        self._heard = Heard(0, None, [])
        self._wants_all = False  # pulses, not only the neighbour's
        self._found: str | None = None  # this rank's verdict
        self._verdict: tuple[int, str] | None = None  # the one in the store: the rank that has found it, and its words
        self._closing, self._wake, self._answered = threading.Event(), threading.Event(), threading.Event()
        jobs = [self._watch] if world.size == 1 else [self._watch, self._talk]
        self._threads = [threading.Thread(target=job, name="watchdog", daemon=True) for job in jobs]

    def __enter__(self) -> Watchdog:
        if self.world.size > 1:
            self._publish(self._connect())
            self.world.barrier()  # every rank's first pulse is there
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closing.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(timeout=POST_S)

    @property
    def _tick(self) -> float:
        return min(LONGEST_TICK_S, self.activity.hang_limit / TICKS)

    def _watch(self) -> None:
        heard = 0
        while not self._closing.wait(self._tick):
            now = self._awake(self._tick)
            if self._heard.exchange != heard:
                heard = self._heard.exchange
                self._judge.hear(self._heard.neighbour, now)
            self._wants_all = self._judge.stalled(now)
            if self._verdict is None and (found := self._find(now)):
                self._found = found
                self._wake.set()
                self._answered.wait(POST_S if self.world.size > 1 else 0)
            if self._verdict or self._found:
                self._end(*(self._verdict or (self.world.rank, str(self._found))))

    def _find(self, now: float) -> str | None:
        """Why the run hangs, None if it does not."""
        judge, heard = self._judge, self._heard
        seconds = judge.own(now).age
        if self.world.size > 1 and judge.silent_store(now):
            place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            return (
                f"no progress for {seconds:.0f} s, and the store at {place} does not answer: "
                "the process that serves it (rank 0 or the launcher) or its machine is stopped or gone"
            )
        if heard.neighbour and judge.silent_neighbour(heard.neighbour, now):
            return f"no progress for {seconds:.0f} s: {heard.neighbour} is stopped or gone"
        if self._wants_all and (self.world.size == 1 or heard.others):
            hanging = judge.behind(heard.others, now)
            return describe_hang(hanging, heard.others) if hanging else None
        return None

    def _talk(self) -> None:
        store: Store | None = None
        while not self._closing.is_set():
            try:
                store = store or self._connect()
                self._exchange(store)
            except RuntimeError:  # the server is gone; each failure prints C++ stacks, so it is not tried at every tick
                store = None
                self._wake.wait(self.activity.hang_limit / 4)
            self._wake.wait(self._tick)
            self._wake.clear()
        with contextlib.suppress(RuntimeError):
            if store is not None:
                self._publish(store, ended=True)

    def _connect(self) -> Store:
        """A connection of the calling thread's own: another thread's may be blocked."""
        return PrefixStore("watchdog", self.world.store.clone())

    def _exchange(self, store: Store) -> None:
        self._publish(store)
        if self._found is not None and self._verdict is None:
            self._verdict = _words(store.compare_set(VERDICT, "", json.dumps([self.world.rank, self._found])))
        elif store.check([VERDICT]):
            self._verdict = _words(store.get(VERDICT))
        if self._verdict:
            self._answered.set()
        neighbour = (self.world.rank + 1) % self.world.size
        wanted = range(self.world.size) if self._wants_all else [neighbour]
        pulses = [Pulse(**json.loads(each)) for each in store.multi_get([str(rank) for rank in wanted])]
        found = next(each for each in pulses if each.rank == neighbour)
        self._heard = Heard(self._heard.exchange + 1, found, pulses if self._wants_all else [])

    def _publish(self, store: Store, ended: bool = False) -> None:
        own = self._judge.newest
        store.set(str(own.rank), json.dumps(asdict(replace(own, number=self._heard.exchange + 1, ended=ended))))

    def _end(self, finder: int, reason: str) -> None:
        """Write the stacks, report the reason on the rank that has found it, and exit with code 1."""
        last = threading.Timer(LAST_S, os._exit, (1,))  # the file system may be what hangs
        last.daemon = True
        last.start()
        with contextlib.suppress(OSError), self.stacks.open("w", encoding="utf-8") as file:
            file.write(f"{reason}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        first = finder == self.world.rank
        reason = f"{reason}; stacks of every rank's threads are beside {self.stacks}"
        self._on_hang(reason, first)
        if first:
            report(Failure(reason))
        if self.world.size > 1:
            # Until every rank has read the verdict: the end of one breaks the collective in which the others wait, and
            # makes a launcher end them. Rank 0 may serve the store.
            time.sleep(max(2 * self._tick, POST_S))
        os._exit(1)


def _words(posted: bytes) -> tuple[int, str]:
    rank, reason = json.loads(posted)
    return int(rank), str(reason)
