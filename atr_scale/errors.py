"""The error types that end a command with one line, and how it ends with one on one rank or on many."""

from __future__ import annotations

import json
import os
import signal
import sys
import textwrap
import time
from pathlib import Path
from types import FrameType
from typing import NoReturn

from atr_scale.redaction import redact

GRACE_S = 30.0  # on a loaded machine ranks start, load and exit up to about this long after each other


class OneLineError(Exception):
    """An error whose message says everything: the command line prints it alone and exits with `exit_code`."""

    exit_code = 1
    # Set by `defer_to_first_rank`: its first call, in seconds since the epoch, and whether the launcher has sent TERM.
    seen_at: float | None = None
    launcher_stops = False


class UserError(OneLineError, ValueError):
    """A mistake that the user can correct: one line with the cause, the place and the remedy. Exit code 2.

    A job script does not start the command again: it would fail again.
    """

    exit_code = 2


class Failure(OneLineError, RuntimeError):
    """A failure of the surroundings, such as a store that cannot be reached: nobody's programming error. Exit code 1.

    One line with the cause, the place and what to do. A later attempt may succeed. Any other exception is an error of
    this project and ends with a traceback.
    """


def one_line(error: Exception | str, width: int = 300) -> str:
    """The message of `error`, or a text, in one line, without its last full stop; if too long, cut between words."""
    return textwrap.shorten(str(error).rstrip(". \n"), width, placeholder=" ...")


def exit_with_line(error: OneLineError) -> NoReturn:
    """Exit with the error's code and report it in one line. One of several ranks with the same error reports it."""
    defer_to_first_rank(error)
    report(error)
    sys.exit(error.exit_code)


def report(error: OneLineError) -> None:
    """Report the error in one line, unless the launcher has stopped this rank or the first rank reports the same.

    Below torchrun and accelerate the launcher prints a report after all output of the ranks. The line is then handed to
    the launcher, which prints it at the end of the report, instead of being printed here and lost above the report.
    """
    line = redact(f"error: {error}")
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file is None:
        if not error.launcher_stops:
            print(line, file=sys.stderr)
    elif _message_in(_of_first_rank(Path(file))) != line:
        try:
            _write(Path(file), line, error.seen_at or time.time())
        except OSError:  # the launcher that named the file is gone
            print(line, file=sys.stderr)
            return
        if os.environ.get("TORCHELASTIC_RESTART_COUNT") != os.environ.get("TORCHELASTIC_MAX_RESTARTS"):
            print(line, file=sys.stderr)  # the launcher starts the ranks again and reports only the last attempt


def defer_to_first_rank(error: OneLineError) -> None:
    """Wait, unless this is the first rank, until the launcher stops this process, at most GRACE_S.

    A launcher stops the other ranks as soon as the first rank has exited with the same error. Call this before the
    process group is closed: ranks that wait in a collective for this one may fail then, and hide the cause.
    """
    # torchrun and accelerate report each machine's ranks on that machine; srun and the like know one job.
    names = ("LOCAL_RANK",) if "TORCHELASTIC_ERROR_FILE" in os.environ else ("RANK", "SLURM_PROCID")
    rank = next((os.environ[name] for name in names if name in os.environ), "0")
    if error.seen_at is not None:
        return
    error.seen_at = time.time()
    if rank == "0":
        return

    def stop(number: int, frame: FrameType | None) -> None:
        error.launcher_stops = True

    signal.signal(signal.SIGTERM, stop)
    deadline = time.monotonic() + GRACE_S
    try:
        while not error.launcher_stops and time.monotonic() < deadline:
            time.sleep(0.05)
    except KeyboardInterrupt:
        pass  # no more waiting: the error is reported
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the exit code stays, whatever a launcher sends meanwhile


def _of_first_rank(file: Path) -> Path:
    """The error file of this machine's first rank, by torchrun's layout ATTEMPT/LOCAL_RANK/error.json."""
    return file.parents[1] / "0" / file.name


def _message_in(file: Path) -> str | None:
    try:
        message = json.loads(file.read_text(encoding="utf-8"))["message"]["message"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return str(message)


def _write(file: Path, line: str, seen_at: float) -> None:
    """An error file as torch.distributed.elastic's ErrorHandler writes it, with the line in place of a traceback."""
    # Times are whole seconds, and the report ends with the earliest: be earlier than failures that this one causes.
    extra = {"py_callstack": line, "timestamp": str(int(seen_at) - 1)}
    file.write_text(json.dumps({"message": {"message": line, "extraInfo": extra}}), encoding="utf-8")
