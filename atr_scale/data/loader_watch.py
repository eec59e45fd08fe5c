"""What the worker processes of a loader do, in memory that they share with their rank, and what it makes of that.

A worker that is gone, or that has stopped to read, is a Failure with one line that names it and the shard. One that
waits for a store is a declared wait of its rank.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil
import torch
from torch.utils.data import DataLoader

from atr_scale.data.loader_memory import SHARED
from atr_scale.data.outage import STORE
from atr_scale.data.shared_buffers import Parcel
from atr_scale.errors import Failure, OneLineError
from atr_scale.memory import as_text

POLL_S = 1.0
# Of the limit of a rank without progress, so that the loader's line, which says more, comes first.
SILENCE_SHARE = 0.75
SILENCE_S = 45.0
START_FACTOR = 4  # a worker that has not yet begun to read imports first
COLUMNS = PID, ACTIONS, SOURCE, SHARD, RETRIES = range(5)
TEXT_BYTES = 240


class WorkerBoard:
    """A row for each worker of a loader, which writes it; its rank reads it.

    pid; actions: a count that grows with every sample and every repeated request; source, shard: numbers of the corpus
    and of the shard of the sample begun last; retries: repeated requests; text: why it waits for a store, if it does.
    """

    def __init__(self, workers: int) -> None:
        self._numbers = torch.zeros(workers, len(COLUMNS), dtype=torch.int64).share_memory_()
        self._texts = torch.zeros(workers, TEXT_BYTES, dtype=torch.uint8).share_memory_()
        self.workers = workers

    def row(self, worker: int) -> WorkerRow:
        return WorkerRow(self._numbers[worker], self._texts[worker])


class WorkerRow:
    """The row of one worker."""

    def __init__(self, numbers: torch.Tensor, text: torch.Tensor) -> None:
        self._numbers, self._text = numbers.numpy(), text.numpy()

    @contextmanager
    def working(self, budget_s: float) -> Iterator[None]:
        """In the worker: its waits for a store, of at most `budget_s` seconds, are written to the row."""
        self._numbers[PID] = os.getpid()
        with STORE.waiting_with(budget_s, self._waiting, retried=self._retried, quiet=True):
            yield

    def begin(self, source: int, shard: int) -> None:
        """In the worker: it begins with a sample of that shard."""
        self._numbers[SOURCE], self._numbers[SHARD] = source, shard
        self._numbers[ACTIONS] += 1

    def _retried(self) -> None:
        self._numbers[RETRIES] += 1
        self._numbers[ACTIONS] += 1

    @contextmanager
    def _waiting(self, text: str) -> Iterator[None]:
        data = text.encode()[: TEXT_BYTES - 1]
        self._text[: len(data) + 1] = [*data, 0]
        try:
            yield
        finally:
            self._text[0] = 0

    @property
    def pid(self) -> int:
        """0 if the worker has not begun."""
        return int(self._numbers[PID])

    @property
    def actions(self) -> int:
        return int(self._numbers[ACTIONS])

    @property
    def retries(self) -> int:
        return int(self._numbers[RETRIES])

    @property
    def place(self) -> tuple[int, int] | None:
        """Numbers of the corpus and the shard of the sample begun last."""
        return (int(self._numbers[SOURCE]), int(self._numbers[SHARD])) if self.actions else None

    @property
    def wait(self) -> str:
        """Why the worker waits for a store, empty if it does not."""
        return bytes(self._text).split(b"\0")[0].decode(errors="replace")


def watched_parcels(
    loader: DataLoader[Parcel | OneLineError],
    board: WorkerBoard,
    shard_path: Callable[[int, int], str],
    silence_s: float,
) -> Iterator[Parcel]:
    """The parcels of a loader, whose workers write to `board` and send them in turn.

    shard_path: the path of a shard by the numbers of its corpus and of the shard. Raises the OneLineError that a worker
    sends, and Failure if a worker is gone, or has done nothing for `silence_s` seconds although its parcel is awaited.
    """
    reader: Any = iter(loader)
    rows = [board.row(worker) for worker in range(board.workers)]
    guard = _StoppedWorkers(rows, silence_s)
    guard.start()
    try:
        for number in itertools.count():
            row = rows[number % board.workers]
            actions, silent = row.actions, 0.0
            while True:
                try:
                    with guard.reading():
                        parcel = next(reader, None)
                    break
                except (RuntimeError, EOFError, ConnectionError) as error:
                    text = str(error)
                    if not guard.ended and not text.startswith(("DataLoader worker (pid", "DataLoader timed out")):
                        raise
                # Raised here, a Failure does not refer to the loader's error, whose traceback would keep the loader.
                _tell(rows)
                if guard.ended:
                    raise _silence(rows, guard.ended, "is stopped (SIGSTOP)", silence_s, shard_path)
                if not text.startswith("DataLoader timed out"):
                    raise _gone(rows, reader._workers, shard_path)
                # Polls are counted, not seconds: time in which this process itself was stopped is not the worker's.
                silent = 0.0 if row.wait or row.actions != actions else silent + POLL_S
                actions = row.actions
                if silent >= silence_s * (1 if row.pid else START_FACTOR):
                    raise _silent(rows, row, silent, shard_path)
            _tell(rows)
            if parcel is None:
                return
            if isinstance(parcel, OneLineError):
                raise parcel
            yield parcel
    finally:
        guard.done.set()
        for row in rows:
            STORE.end(row)
        del reader  # an error's traceback would keep it, and with it the other workers


class _StoppedWorkers(threading.Thread):
    """Ends a worker that was stopped while it hands over memory. The loader waits for that without a time limit."""

    def __init__(self, rows: list[WorkerRow], silence_s: float) -> None:
        super().__init__(daemon=True)
        self.done = threading.Event()
        self._rows, self._polls, self._calls, self._inside = rows, silence_s / POLL_S, 0, False
        self.ended: WorkerRow | None = None

    @contextmanager
    def reading(self) -> Iterator[None]:
        """A call of the loader, which returns within POLL_S if it is not blocked."""
        self._calls, self._inside = self._calls + 1, True
        try:
            yield
        finally:
            self._inside = False

    def run(self) -> None:
        calls, polls = 0, 0
        while not self.done.wait(POLL_S):
            polls = polls + 1 if self._inside and self._calls == calls else 0
            calls = self._calls
            stopped = [row for row in self._rows if row.pid and _is_stopped(row.pid)] if polls >= self._polls else []
            if stopped:
                self.ended = stopped[0]
                _kill(stopped[0])
                return


def _tell(rows: list[WorkerRow]) -> None:
    """Tell what the workers wait for, and what they have repeated, as waits and retries of this process."""
    for row in rows:
        if row.wait:
            STORE.begin(row, row.wait.removeprefix("outage: "))
        else:
            STORE.end(row)
    STORE.remind()
    STORE.retries_of_workers = sum(row.retries for row in rows)


def _gone(rows: list[WorkerRow], processes: list[Any], shard_path: Callable[[int, int], str]) -> Failure:
    """What to say of the workers that have ended."""
    dead = [n for n, process in enumerate(processes) if not process.is_alive()]
    code = next((processes[n].exitcode for n in dead if processes[n].exitcode), None)
    if code == -signal.SIGBUS:
        free = as_text(shutil.disk_usage(SHARED).free)
        how = f"found no room in {SHARED} ({free} are free)"
        remedy = "enlarge /dev/shm (docker --shm-size), or lower data.workers or data.buffer_gb"
    elif code == -signal.SIGKILL:
        how = "was killed (SIGKILL)"
        remedy = "if that was the system for lack of memory (see dmesg), lower data.workers"
    else:
        how, remedy = f"ended with exit code {code}", "see its message above"
    names = ", ".join(_name(rows, rows[n], shard_path) for n in dead)
    return Failure(f"{names} {how}: {remedy}; start the same command again to go on from the last checkpoint")


def _silent(
    rows: list[WorkerRow], awaited: WorkerRow, seconds: float, shard_path: Callable[[int, int], str]
) -> Failure:
    """End the worker that does nothing, and say so. A stopped one may hold the queue that the awaited one needs."""
    stopped = [row for row in rows if row.pid and _is_stopped(row.pid)]
    row = next(iter(stopped), awaited)
    if row.pid:
        _kill(row)
    return _silence(rows, row, "is stopped (SIGSTOP)" if stopped else "hangs", seconds, shard_path)


def _silence(
    rows: list[WorkerRow], row: WorkerRow, state: str, seconds: float, shard_path: Callable[[int, int], str]
) -> Failure:
    return Failure(
        f"{_name(rows, row, shard_path)} {state}, nothing was read for {seconds:.0f} s: look at that storage and that "
        "machine; start the same command again to go on from the last checkpoint"
    )


def _kill(row: WorkerRow) -> None:
    with suppress(ProcessLookupError):
        os.kill(row.pid, signal.SIGKILL)


def _is_stopped(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    return False


def _name(rows: list[WorkerRow], row: WorkerRow, shard_path: Callable[[int, int], str]) -> str:
    place = f"reading {shard_path(*row.place)}" if row.place else "before its first sample"
    return f"loader worker {rows.index(row)} (pid {row.pid}), {place},"
