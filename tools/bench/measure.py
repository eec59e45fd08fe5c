"""Time and memory of functions, taken so that noise of the machine cancels in ratios."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import accumulate
from statistics import median

import torch
from torch.autograd.profiler import profile

Function = Callable[[], object]


def seconds(*functions: Function, repeats: int = 5) -> list[float]:
    """Median time of each, after one unmeasured call, in turns, so that a slow minute slows all of them.

    On a CPU the process' CPU time over all of its threads, with a GPU the time until the device is done.
    """
    clock = _device_clock if torch.cuda.is_available() else time.process_time
    taken: list[list[float]] = [[] for _ in functions]
    for function in functions:
        function()
    for _ in range(repeats):
        for function, times in zip(functions, taken, strict=True):
            start = clock()
            function()
            times.append(clock() - start)
    return [median(times) for times in taken]


def peak_mib(function: Function) -> float:
    """Most memory that tensors made during `function` held at once, as torch's allocator counts it, MiB."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(profile_memory=True) as recorded:
        function()
    assert recorded.kineto_results is not None
    changes = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    most: int = max(accumulate((event.nbytes() for event in changes), initial=0))
    return most / 2**20


def _device_clock() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()
