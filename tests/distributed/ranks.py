"""Run a function on several gloo ranks of this machine."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT_S = 300


def run_ranks(function: Callable[..., Any], size: int, *args: Any) -> list[Any]:
    """function(*args) on `size` ranks; the results in rank order. `function` must be importable."""
    context = mp.get_context("spawn")
    queue: Any = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_rank, args=(function, rank, size, f"{folder}/store", queue, args))
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        try:
            found = dict(queue.get(timeout=TIMEOUT_S) for _ in processes)
        finally:
            for process in processes:
                process.join(timeout=10)
                process.kill()
    for rank, (_, error) in sorted(found.items()):
        assert error is None, f"rank {rank} failed:\n{error}"
    return [found[rank][0] for rank in range(size)]


def _rank(function: Callable[..., Any], rank: int, size: int, store: str, queue: Any, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))  # DeepSpeed looks for them
    try:
        dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size)
        result = function(*args)
        dist.barrier()
        queue.put((rank, (result, None)))
    except BaseException:
        queue.put((rank, (None, traceback.format_exc())))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
