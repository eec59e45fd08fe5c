"""Lock files: one process at a time works in a folder.

A lock is created in one atomic step, without flock, which network file systems may not have. Its holder touches it
regularly. The lock of a dead process is taken over: at once if it ran on this machine, else after it has not been
touched for STALE_S. No two clocks are compared: who waits for a lock of another machine watches it. A clock that is set
changes nothing.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Hashable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from atr_scale.errors import UserError

logger = logging.getLogger(__name__)

TOUCH_S = 10.0
ALIVE_S = 3 * TOUCH_S  # a holder on another machine that is alive is recognized within this time
STALE_S = 300.0  # without a touch; longer than network file systems usually stall
GRACE_S = 15.0  # for a holder on this machine to end: a rank needs some seconds to see that its launcher was killed


@dataclass(frozen=True)
class Holder:
    """A process that holds a lock.

    machine: identity of its running kernel and process namespace, in which `pid` is unique together with `started`,
    the start of the process in clock ticks since that of the kernel. job: of SLURM, with the number of its restarts.
    since: local time, for people. folder: the lock's folder by its number on the file system, 0 if it is not known.
    """

    host: str
    machine: str
    pid: int
    started: int | None
    job: str | None
    since: str
    token: str
    folder: int = 0

    @staticmethod
    def me() -> Holder:
        """This process, as the holder of a new lock."""
        job = os.environ.get("SLURM_JOB_ID")
        return Holder(
            socket.gethostname(),
            _machine(),
            os.getpid(),
            _start_of(os.getpid()),
            f"{job}, restart {os.environ.get('SLURM_RESTART_COUNT', '0')}" if job else None,
            time.strftime("%Y-%m-%d %H:%M:%S"),
            uuid.uuid4().hex,
        )

    @staticmethod
    def of(lock: Path) -> Holder | None:
        """The holder of a lock, None if there is no lock or it cannot be read."""
        try:
            return Holder.parse(lock.read_bytes())
        except OSError:
            return None

    @staticmethod
    def parse(content: bytes) -> Holder | None:
        """The holder that a lock's content names, None if it cannot be read."""
        try:
            return Holder(**json.loads(content))
        except (ValueError, TypeError):
            return None

    def __str__(self) -> str:
        job = f" (SLURM job {self.job})" if self.job else ""
        return f"process {self.pid} on {self.host}{job} since {self.since}"

    def is_here(self) -> bool:
        """Whether it runs, or ran, where this process can see whether it lives."""
        return self.machine == _machine()

    def lives(self) -> bool:
        """Whether it runs; it must be here."""
        return self.started is not None and _start_of(self.pid) == self.started


@contextlib.contextmanager
def hold(lock: Path, what: str) -> Iterator[None]:
    """Hold the lock file `lock` for as long as the block runs.

    what: the thing that is locked, for messages: "the run folder runs/a". Waits at most GRACE_S for the end of a
    process on this machine, and STALE_S for a lock that seems to be left over on another machine. Raises UserError if
    another process holds the lock and lives, OSError if the lock cannot be written.
    """
    me = Holder.me()
    while not _create(lock, me):
        if _is_copied(lock):
            logger.warning("%s has the lock of the folder that it was copied from: going on", what)
        else:
            wait_until_dead(what, str(lock), lambda: _touched(lock), lambda: Holder.of(lock))
        _put_aside(lock)
    released = threading.Event()
    touching = threading.Thread(target=_touch, args=(lock, me, what, released), name="lock", daemon=True)
    touching.start()
    try:
        yield
    finally:
        released.set()
        touching.join()
        found = Holder.of(lock)
        if found and found.token == me.token:
            with contextlib.suppress(OSError):  # the folder is gone, or read-only since
                lock.unlink()


def _create(lock: Path, me: Holder) -> bool:
    """Create the lock with all its content in one step. False if it exists."""
    temporary = lock.with_name(f".{lock.name}.{me.token}.tmp")
    content = json.dumps(asdict(replace(me, folder=lock.parent.stat().st_ino)))
    temporary.write_text(content, encoding="utf-8")
    try:
        os.link(temporary, lock)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        try:
            with lock.open("x", encoding="utf-8") as file:
                file.write(content)
        except FileExistsError:
            return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _is_copied(lock: Path) -> bool:
    holder = Holder.of(lock)
    return holder is not None and holder.folder not in (0, lock.parent.stat().st_ino)


def wait_until_dead(
    what: str, lock: str, touched: Callable[[], Hashable | None], holder_of: Callable[[], Holder | None]
) -> None:
    """Return when a lock is gone or its holder is dead. Raises UserError if the holder lives.

    what, lock: names of the thing and of its lock. touched: something that the holder changes regularly, None if there
    is no lock.
    """
    began, first = time.monotonic(), touched()
    said = False
    while first is not None:
        holder = holder_of()
        waited = time.monotonic() - began
        if holder and holder.is_here():
            if not holder.lives():
                logger.warning("%s was in use by %s, which is dead: going on", what, holder)
                return
            if waited > GRACE_S:
                raise in_use(what, holder)
            if not said:
                said = True
                logger.warning("%s is in use by %s: waiting %.0f s for its end", what, holder, GRACE_S)
        elif touched() not in (first, None):
            raise in_use(what, holder)
        elif waited > STALE_S or (holder and _restarted(holder)):
            logger.warning("%s was in use by %s, which shows no sign of life: going on", what, holder or "a process")
            return
        elif not said:
            said = True
            logger.warning(
                "%s is in use by %s: looking for a sign of life of it, which takes %.0f s, and at most %.0f s until "
                "the lock %s is void", what, holder or "a process", ALIVE_S, STALE_S, lock,
            )  # fmt: skip
        time.sleep(min(1.0, TOUCH_S / 4))
        if touched() is None:
            return


def in_use(what: str, holder: Holder | None) -> UserError:
    """That another process holds a lock and lives."""
    return UserError(
        f"{what} is in use by {holder or 'another process'}: wait for its end, stop it, or use another folder"
    )


def _restarted(holder: Holder) -> bool:
    """Whether this process is of a later start of the SLURM job that held the lock."""
    mine = Holder.me().job
    return bool(mine and holder.job and mine != holder.job and mine.split(",")[0] == holder.job.split(",")[0])


def _touched(lock: Path) -> int | None:
    try:
        return lock.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _put_aside(lock: Path) -> None:
    """Remove the lock of a dead process, but not one that another process has created since."""
    dead = Holder.of(lock)
    aside = lock.with_name(f".{lock.name}.{uuid.uuid4().hex}.tmp")
    with contextlib.suppress(FileNotFoundError):
        os.rename(lock, aside)
        if Holder.of(aside) != dead:
            with contextlib.suppress(FileExistsError):
                os.link(aside, lock)
        aside.unlink()


def _touch(lock: Path, me: Holder, what: str, released: threading.Event) -> None:
    """Touch the lock until it is released. Ends the process if another one has taken the lock."""
    while not released.wait(TOUCH_S):
        now = Holder.of(lock)
        if now is not None and now.token != me.token and not released.is_set():
            logger.critical("%s was taken over by %s, as this process gave no sign of life: it ends here", what, now)
            os._exit(1)
        with contextlib.suppress(OSError):  # a folder that vanished is told by whoever writes to it
            os.utime(lock)


def _start_of(process: int) -> int | None:
    """When a process has started, in clock ticks since the kernel has; None if it has ended. Source: proc_pid_stat(5).

    A time of day would move if the clock is set.
    """
    try:
        text = Path(f"/proc/{process}/stat").read_bytes()
    except OSError:
        return None
    state, *fields = text.rpartition(b")")[2].split()  # the name before may hold spaces
    return None if state in (b"Z", b"X") else int(fields[18])


def _machine() -> str:
    """The running kernel and the namespace of process numbers."""
    try:
        return f"{running_kernel()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def running_kernel() -> str:
    """Identity of the kernel since its start; the host name if it has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()
