"""One worker for all use of the model: requests that come together share a forward pass."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

WAIT_S = 0.008  # for further requests, after the first one of a batch
MOST = 32  # requests in one batch
LIMIT = 256  # requests that wait; more are refused


class Busy(Exception):
    """LIMIT requests wait already."""


class _Job(NamedTuple):
    key: Hashable
    argument: Any
    answer: asyncio.Future[Any]


class Batcher:
    """Collects requests for a few milliseconds and answers those with the same key by one call.

    answer: (key, arguments) -> one result for each argument. It is called from one thread, never twice at once.
    """

    def __init__(self, answer: Callable[[Any, list[Any]], Sequence[Any]], limit: int = LIMIT) -> None:
        self._answer = answer
        self._jobs: asyncio.Queue[_Job] = asyncio.Queue(limit)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")

    async def ask(self, key: Hashable, argument: Any) -> Any:
        """The result for one argument. Raises Busy, or what `answer` raises for this argument alone."""
        job = _Job(key, argument, asyncio.get_running_loop().create_future())
        try:
            self._jobs.put_nowait(job)
        except asyncio.QueueFull:
            raise Busy from None
        return await job.answer

    async def run(self) -> None:
        """Work until cancelled."""
        while True:
            jobs = [await self._jobs.get()]
            await asyncio.sleep(WAIT_S)
            while len(jobs) < MOST and not self._jobs.empty():
                jobs.append(self._jobs.get_nowait())
            groups: dict[Hashable, list[_Job]] = {}
            for job in jobs:
                if not job.answer.cancelled():  # the client has gone
                    groups.setdefault(job.key, []).append(job)
            for key, group in groups.items():
                await self._work(key, group)

    async def _work(self, key: Hashable, group: list[_Job]) -> None:
        loop = asyncio.get_running_loop()
        try:
            results = await loop.run_in_executor(self._thread, self._answer, key, [job.argument for job in group])
        except Exception as error:
            if len(group) > 1:  # one bad argument must not fail the others
                for job in group:
                    await self._work(key, [job])
            elif not group[0].answer.done():
                group[0].answer.set_exception(error)
            return
        for job, result in zip(group, results, strict=True):
            if not job.answer.done():
                job.answer.set_result(result)
