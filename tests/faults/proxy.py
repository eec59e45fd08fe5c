"""An HTTP proxy before an S3 server that injects faults, and the server: rclone, a program that people use."""

from __future__ import annotations

import asyncio
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from atr_scale.data import storage

RCLONE = Path(sys.executable).parent / "rclone"  # not one of the system, which may be older than its S3 server
KEY, SECRET = "test-key", "test-secret"
needs_rclone = pytest.mark.skipif(not RCLONE.exists(), reason="needs rclone: .ci/rclone installs it")
CODES = {403: "AccessDenied", 404: "NoSuchKey", 500: "InternalError", 503: "SlowDown"}


@dataclass(frozen=True)
class Answer:
    """The proxy answers with this status itself."""

    status: int


@dataclass(frozen=True)
class Cut:
    """After `body` bytes of the server's body: the connection is reset, closed, or stays open without further bytes."""

    how: str  # "reset", "close", "stall"
    body: int = 1000


@dataclass(frozen=True)
class Silence:
    """The proxy takes the connection and the head of the request, and then does nothing."""


Fault = Answer | Cut | Silence


class FaultProxy:
    """Passes requests on to a server, one connection a request.

    fault: called with the method and the path of every request, returns the fault to inject, None for none; it can be
    set at any time. requests: (method, path, fault) of all requests so far.
    """

    def __init__(self, server: tuple[str, int], host: str = "127.0.0.1") -> None:
        """host: the address to listen on."""
        self.server, self.host = server, host
        self.fault: Callable[[str, str], Fault | None] = lambda method, path: None
        self.requests: list[tuple[str, str, Fault | None]] = []
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._listener: asyncio.Server | None = None
        self.port = 0
        self.accept()

    def accept(self) -> None:
        """Listen, again on the same port."""
        self._listener = self._run(asyncio.start_server(self._serve, self.host, self.port))
        self.port = self._listener.sockets[0].getsockname()[1]

    def refuse(self) -> None:
        """Connections are refused from now on."""
        assert self._listener is not None
        self._loop.call_soon_threadsafe(self._listener.close)

    def close(self) -> None:
        self.refuse()
        self._loop.call_soon_threadsafe(self._end)

    def _end(self) -> None:
        for task in asyncio.all_tasks(self._loop):  # of answers that stall, or whose clients are gone
            task.cancel()
        self._loop.call_later(0.1, self._loop.stop)

    def _run(self, work: Coroutine[Any, Any, asyncio.Server]) -> asyncio.Server:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):  # the last: of _end
            await self._answer(reader, writer)
        writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        method, path, _ = head.split(b"\r\n", 1)[0].decode().split(" ")
        fault = self.fault(method, path)
        self.requests.append((method, path, fault))
        if isinstance(fault, Silence):
            await asyncio.sleep(3600)
        if isinstance(fault, Answer):
            await reader.readexactly(_length(head))
            code = CODES[fault.status]
            text = f"<Error><Code>{code}</Code><Message>injected</Message></Error>" if method != "HEAD" else ""
            writer.write(f"HTTP/1.1 {fault.status} X\r\nConnection: close\r\n".encode())
            writer.write(f"Content-Type: application/xml\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode())
            await writer.drain()
            return
        body = await reader.readexactly(_length(head))
        source, sink = await asyncio.open_connection(*self.server)
        sink.write(_closing(head) + body)
        answer = await source.readuntil(b"\r\n\r\n")
        writer.write(_closing(answer))
        left = fault.body if isinstance(fault, Cut) else 1 << 62
        while left and (data := await source.read(min(left, 65536))):
            left -= len(data)
            writer.write(data)
            await writer.drain()
        sink.close()
        if isinstance(fault, Cut) and not left:
            if fault.how == "stall":
                await asyncio.sleep(3600)
            await asyncio.sleep(0.05)  # the bytes before the fault arrive
            if fault.how == "reset":
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()


def _length(head: bytes) -> int:
    lines = (line.lower() for line in head.split(b"\r\n"))
    return next((int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length:")), 0)


def _closing(head: bytes) -> bytes:
    """The head of a request or answer after which the connection is closed."""
    lines = [line for line in head.split(b"\r\n") if line and not line.lower().startswith((b"connection:", b"expect:"))]
    return b"\r\n".join([*lines, b"Connection: close", b"", b""])


def for_all(fault: Fault | None) -> Callable[[str, str], Fault | None]:
    return lambda method, path: fault


def first_reads(fault: Fault, count: int, name: str = ".tar") -> Callable[[str, str], Fault | None]:
    """`fault` for the first `count` reads of objects with `name` in their path."""
    left = [count]

    def of(method: str, path: str) -> Fault | None:
        if method == "GET" and name in path and left[0]:
            left[0] -= 1
            return fault
        return None

    return of


@contextmanager
def s3_server(folder: Path) -> Iterator[tuple[str, int]]:
    """rclone's S3 server: every folder in `folder` is a bucket. Yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = probe.getsockname()
    where = ["--addr", f"127.0.0.1:{address[1]}", "--auth-key", f"{KEY},{SECRET}", "--vfs-cache-mode", "off"]
    with subprocess.Popen([RCLONE, "serve", "s3", str(folder), *where], stderr=subprocess.DEVNULL) as process:
        try:
            while not _listens(address):
                assert process.poll() is None, "rclone has ended"
                time.sleep(0.1)
            yield address
        finally:
            process.kill()


def _listens(address: tuple[str, int]) -> bool:
    with suppress(OSError):
        socket.create_connection(address, 1).close()
        return True
    return False


def s3_variables(proxy: FaultProxy) -> dict[str, str]:
    """The environment in which s3:// is the server behind `proxy`."""
    return {
        "AWS_ENDPOINT_URL": f"http://{proxy.host}:{proxy.port}",
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
    }


@contextmanager
def s3_behind_proxy(folder: Path) -> Iterator[FaultProxy]:
    """The server of `folder` and a proxy before it, which is s3:// in this process and in those that it starts."""
    with s3_server(folder) as address, pytest.MonkeyPatch.context() as patch:
        proxy = FaultProxy(address)
        for name, value in s3_variables(proxy).items():
            patch.setenv(name, value)
        storage._filesystem_of.cache_clear()
        yield proxy
        storage._filesystem_of.cache_clear()
        proxy.close()
