"""Waiting for a store: which errors mean that it is away, how long it is waited for, and what is said meanwhile."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import aiohttp
import pytest
from botocore.exceptions import ClientError, ConnectTimeoutError, EndpointConnectionError, ReadTimeoutError
from s3fs.errors import translate_boto_error

from atr_scale.data.outage import StoreOutage, is_unanswered
from atr_scale.errors import Failure, UserError

AWAY = ConnectionResetError("reset")
PLACE = "s3://b/k"


def answer(status: int, code: str, cause: bool = True) -> Exception:
    """The error as which s3fs raises an answer of the store."""
    response = {"Error": {"Code": code, "Message": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    found: Exception = translate_boto_error(ClientError(response, "GetObject"), set_cause=cause)
    return found


@pytest.mark.parametrize("cause", [True, False])
def test_5xx_and_slow_down_are_no_answers(cause: bool) -> None:
    for status, code in ((503, "SlowDown"), (500, "InternalError"), (503, "503"), (502, "502"), (504, "504")):
        assert is_unanswered(answer(status, code, cause)), code
    assert is_unanswered(answer(429, "TooManyRequests"))
    for status, code in ((404, "NoSuchKey"), (403, "AccessDenied"), (400, "InvalidRequest"), (416, "InvalidRange")):
        assert not is_unanswered(answer(status, code, cause)), code


def test_a_broken_connection_is_no_answer() -> None:
    endpoint = {"endpoint_url": "http://store"}
    for error in (
        ConnectionRefusedError(), TimeoutError(), EndpointConnectionError(**endpoint), ReadTimeoutError(**endpoint),
        ConnectTimeoutError(**endpoint), aiohttp.ClientPayloadError(), aiohttp.ServerDisconnectedError(),
    ):  # fmt: skip
        assert is_unanswered(error), error
    for other in (ValueError("no endpoint"), OSError("odd"), OSError(errno.ENOSPC, "full")):
        assert not is_unanswered(other)


class Clock:
    """Time that passes only in pauses."""

    def __init__(self) -> None:
        self.now, self.pauses = 0.0, list[float]()

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def outage(clock: Clock) -> StoreOutage:
    return StoreOutage(lambda: clock.now, clock.sleep)


def back_at(clock: Clock, seconds: float, error: Exception = AWAY) -> Callable[[], str]:
    """An attempt that succeeds from the time `seconds` on."""

    def attempt() -> str:
        if clock.now < seconds:
            raise error
        return "read"

    return attempt


def none() -> bool:
    return False


def test_a_read_waits_and_goes_on(outage: StoreOutage, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """The wait is declared and said at its start, once a minute and at its end; pauses grow and differ."""
    declared: list[str] = []

    @contextmanager
    def declare(text: str) -> Iterator[None]:
        declared.append(text)
        yield
        declared.append("over")

    with outage.waiting_with(600, declare), caplog.at_level(logging.WARNING):
        assert outage.outlast(back_at(clock, 150), PLACE, AWAY, none) == "read"
    assert declared == [f"outage: {PLACE}: {AWAY!r}", "over"]
    assert [record.getMessage().split(" (")[0].split(" for ")[0] for record in caplog.records] == [
        "the store does not answer", "the store has not answered", "the store has not answered", "no more waiting",
    ]  # fmt: skip
    assert clock.pauses[0] < 2 and 5 < max(clock.pauses) <= 15 and len(set(clock.pauses)) == len(clock.pauses)
    assert outage.retries == len(clock.pauses) - 1


def test_the_budget_ends_the_wait(outage: StoreOutage, clock: Clock) -> None:
    with outage.waiting_with(30, lambda _: nullcontext()), pytest.raises(Failure) as failure:
        outage.outlast(back_at(clock, 1000), PLACE, AWAY, none)
    assert clock.now == 30
    assert "the store could not be reached for 30 s (data.outage_seconds = 30): s3://b/k: ConnectionReset" in str(
        failure.value
    )
    with pytest.raises(Failure, match="for 30 s"):  # another thread, whose attempts have failed meanwhile
        outage.outlast(back_at(clock, 31), PLACE, AWAY, none)
    outage.answered()
    assert outage.outlast(back_at(clock, 40), PLACE, AWAY, none) == "read", "another outage has a budget of its own"


def test_a_bad_object_is_not_an_outage(outage: StoreOutage, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(OSError, match=r"s3://b/k: ConnectionResetError.*while another object can be read"):
        outage.outlast(back_at(clock, 1000), PLACE, AWAY, lambda: True)
    assert clock.now < 10 and not caplog.records


def test_an_object_that_is_bad_in_an_outage(outage: StoreOutage, clock: Clock) -> None:
    """It is skipped as soon as another one can be read, not when the budget is spent."""
    with pytest.raises(OSError, match="while another object can be read"):
        outage.outlast(back_at(clock, 1000), PLACE, AWAY, lambda: clock.now > 20)
    assert 20 < clock.now < 60


@pytest.mark.parametrize("error", [FileNotFoundError(), PermissionError(), UserError("no credentials")])
def test_an_answer_about_the_object_ends_the_wait(outage: StoreOutage, clock: Clock, error: Exception) -> None:
    errors = iter([AWAY, error])

    def attempt() -> None:
        raise next(errors)

    with pytest.raises(type(error)):
        outage.outlast(attempt, PLACE, AWAY, none)


def test_threads_share_one_budget(clock: Clock) -> None:
    """One of them tries at a time. When the budget is spent, all end at once."""
    tries, joined = list[str](), threading.Event()

    def sleep(seconds: float) -> None:
        if not clock.pauses:
            second.start()
            assert joined.wait(20)
        clock.sleep(seconds)

    def attempt(name: str) -> Callable[[], None]:
        def fail() -> None:
            tries.append(name)
            raise AWAY

        return fail

    outage = StoreOutage(lambda: clock.now, sleep)
    join = outage._join

    def join_and_tell(waiter: object) -> None:
        join(waiter)
        if threading.current_thread() is second:
            joined.set()

    outage._join = join_and_tell  # type: ignore[method-assign]
    failures = list[Failure]()

    def wait(name: str) -> None:
        try:
            outage.outlast(attempt(name), PLACE, AWAY, none)
        except Failure as failure:
            failures.append(failure)

    second = threading.Thread(target=wait, args=("second",))
    with outage.waiting_with(20, lambda _: nullcontext()):
        wait("first")
        second.join(20)
    assert len(failures) == 2 and clock.now == 20 and tries == ["first"] * len(clock.pauses)
