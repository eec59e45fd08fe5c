"""Run a function on several gloo ranks of this machine."""

from __future__ import annotations

import os
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from queue import Empty
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch._C._distributed_c10d import FileStore

TIMEOUT_S = 900
GRACE_S = 20  # for the results of the others after a rank has failed: they may wait for it in a collective


def run_ranks(
    function: Callable[..., Any], size: int, *args: Any, preload: Sequence[str] = ("atr_scale.training.loop",)
) -> list[Any]:
    """function(*args) on `size` ranks; the results in rank order. `function` must be importable.

    preload: modules that are imported once for all ranks; by default with torch and DeepSpeed behind them.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    queue: Any = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_rank, args=(function, rank, size, f"{folder}/store", queue, dict(os.environ), args))
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        try:
            found = _collect(queue, processes)
        finally:
            for process in processes:
                process.join(timeout=10)
                process.kill()
    for rank, (_, error) in sorted(found.items()):
        assert error is None, f"rank {rank} failed:\n{error}"
    return [found[rank][0] for rank in range(size)]


def _collect(queue: Any, processes: list[Any]) -> dict[int, Any]:
    """The results of all ranks, after a failure those that come soon. Raises TimeoutError if a rank hangs or ends
    without a result."""
    found: dict[int, Any] = {}
    end = time.monotonic() + TIMEOUT_S
    while len(found) < len(processes):
        died = [n for n, p in enumerate(processes) if p.exitcode is not None and n not in found]
        try:
            rank, result = queue.get(timeout=1)
            found[rank] = result
            if result[1] is not None:
                end = min(end, time.monotonic() + GRACE_S)
        except Empty:
            if any(error is not None for _, error in found.values()) and time.monotonic() > end:
                break
            if died or time.monotonic() > end:
                raise TimeoutError(f"ranks {died or 'unknown'} gave no result") from None
    return found


def _rank(
    function: Callable[..., Any],
    rank: int,
    size: int,
    store: str,
    queue: Any,
    environment: dict[str, str],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    os.environ.clear()  # the fork server has the environment of its start
    os.environ.update(environment)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))  # DeepSpeed looks for them
    try:
        dist.init_process_group("gloo", store=FileStore(store, size), rank=rank, world_size=size)
        result = function(*args)
        dist.barrier()
        queue.put((rank, (result, None)))
    except BaseException:
        queue.put((rank, (None, traceback.format_exc())))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
