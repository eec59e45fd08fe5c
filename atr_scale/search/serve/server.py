"""Starts the search page and ends it: one line each, also for a port in use."""

from __future__ import annotations

import contextlib
import errno
import secrets
import signal
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from atr_scale.errors import UserError
from atr_scale.locks import hold
from atr_scale.search.query import Searcher
from atr_scale.search.serve.guard import is_loopback

try:
    import uvicorn

    from atr_scale.search.serve.app import Library, create_app
    from atr_scale.search.serve.library import IndexLibrary
    from atr_scale.search.serve.marks import Marks
except ImportError as missing:
    raise UserError(f'atr-scale serve needs {missing.name}: pip install "atr-scale[search]"') from None

MIN_TOKEN = 16  # characters
GRACE_S = 5  # for requests that are being answered at the end
STOPS = (signal.SIGINT, signal.SIGTERM)


def serve(
    index: str | Path,
    marks_file: Path | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    run: str | Path | None = None,
    rerank: str | Path | None = None,
    plugins: Sequence[str] = (),
) -> None:
    """Serve the page of an index until SIGINT or SIGTERM.

    marks_file: CSV file of the marks, created by the first one; by default relevance.csv in the index. port: 0 takes a
    free one. token: what every request must bring; made up and printed if None and `host` can be reached from other
    machines. run, rerank, plugins: as of `Searcher`.
    Raises UserError if the port is in use, the token is short, or the file of marks is in use or cannot be written.
    """
    marks_file = marks_file or Path(index) / "relevance.csv"
    if token is None and not is_loopback(host):
        token = secrets.token_urlsafe(24)
    if token is not None and len(token) < MIN_TOKEN:
        raise UserError(f"a token of {len(token)} characters can be guessed: give {MIN_TOKEN} or more, or none")
    with _listen(host, port) as listener:
        library = IndexLibrary(Searcher(index, run, rerank, plugins=plugins))
        _serve(library, listener, host, token, marks_file)


def _serve(library: Library, listener: socket.socket, host: str, token: str | None, marks_file: Path) -> None:
    with _held(marks_file):
        app = create_app(library, Marks(marks_file), token)
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=GRACE_S
        )
        with _noting_signals() as received:
            print(f"{len(library.items)} sounds of {library.name}: {_address(listener, host, token)}", flush=True)
            uvicorn.Server(config).run(sockets=[listener])
        print(f"ended by {signal.Signals(received[0]).name}" if received else "ended")


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OverflowError:
        raise UserError(f"port {port}: give a number from 0 to 65535") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} of {host} is in use: give another --port, or 0 for any free one") from None
        raise UserError(f"cannot listen on port {port} of {host} ({error.strerror}): give another") from None


def _address(listener: socket.socket, host: str, token: str | None) -> str:
    """The address to open. It has the token, which the page turns into a cookie."""
    shown = socket.gethostname() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listener.getsockname()[1]}/" + (f"?token={token}" if token else "")


@contextlib.contextmanager
def _held(marks_file: Path) -> Iterator[None]:
    """The file of marks is this process's alone: another one would overwrite its marks."""
    lock = marks_file.with_name(f"{marks_file.name}.lock")
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(hold(lock, f"the file of marks {marks_file}"))
        except OSError as error:
            raise UserError(
                f"{marks_file} cannot be written ({error.strerror}): name a place for the marks with --relevance"
            ) from None
        yield


@contextlib.contextmanager
def _noting_signals() -> Iterator[list[int]]:
    """The numbers of the signals that ended the block. uvicorn ends at them and then sends them again."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, note) for number in STOPS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
