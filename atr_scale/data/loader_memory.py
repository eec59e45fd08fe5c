"""The memory of a loader: how large the pieces of a batch are, and how many of them are read ahead.

A worker decodes a piece of the local batch into a buffer of shared memory (/dev/shm). The process that trains copies it
to its place in the batch, which is page-locked for a GPU, and the buffer is free again. So shared memory holds a few
pieces, however large the batch is, and the process holds two batches: the one in use and the next one; beside a GPU a
third, which the GPU may still copy when the step after it begins.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from atr_scale.data.options import DataSection
from atr_scale.distributed.world import World
from atr_scale.errors import UserError
from atr_scale.memory import as_text, free_memory

PIECE = 64 << 20  # bytes of a piece at most
PREFETCH = 4  # pieces that a worker reads ahead
COPIED = 1  # buffer of a worker that is being copied into its batch
HELD = 2  # batches in use at once: that of the training step and the next one
SHARE = 0.5  # of the free memory that loaders take by default
SHARED = Path("/dev/shm")
FLOAT = 4  # bytes of a sample; 16-bit samples take half of them


@dataclass(frozen=True)
class LoaderMemory:
    """The memory of one rank's loader.

    rows: of a piece. pieces: of a local batch. prefetch: pieces that a worker reads ahead. each: buffers of a worker.
    buffers: of all workers. buffer_bytes: of one. batches: bytes of the batches that are put together beside the
    buffers, 0 if a batch is used where it was decoded.
    """

    rows: int
    pieces: int
    prefetch: int
    each: int
    buffers: int
    buffer_bytes: int
    batches: int

    @property
    def shared(self) -> int:
        """Bytes in /dev/shm, if all samples are float32; pages of 16-bit samples fill half of them."""
        return self.buffers * self.buffer_bytes

    @property
    def total(self) -> int:
        """Bytes of main memory, those in /dev/shm included."""
        return self.shared + self.batches

    def describe(self) -> str:
        """One line: buffers, and the batches beside them."""
        if not self.buffers:
            return f"loader: no workers, {as_text(self.batches)} for the batches of a rank"
        beside = f", and up to {as_text(self.batches)} for whole batches" if self.batches else ""
        return (
            f"loader buffers: {self.buffers} of {as_text(self.buffer_bytes)} a rank ({self.rows} clips each, "
            f"{self.pieces} to a batch), {as_text(self.shared)} of shared memory{beside}"
        )


def loader_memory(
    samples: int, local_batch: int, workers: int, *, pinned: bool, budget: float | None = None
) -> LoaderMemory:
    """The memory of a loader of crops of `samples` samples.

    pinned: batches are copied to page-locked memory, for a GPU. budget: bytes of shared memory that a rank may take;
    None: as many as it likes. Raises UserError if not even pieces of one clip fit into the budget.
    """
    row, budget = FLOAT * samples, float("inf") if budget is None else budget
    whole = local_batch * row
    if not workers:  # a batch is decoded into the memory of this process
        copies = (HELD + 1) * _page_locked(whole) if pinned else 0
        return LoaderMemory(local_batch, 1, 0, HELD, 0, whole, HELD * whole + copies)
    each = PREFETCH + HELD + 1  # reading ahead adds a third batch to those in use
    if not pinned and whole <= PIECE and each * workers * whole <= budget:
        return LoaderMemory(local_batch, 1, PREFETCH, each, each * workers, whole, 0)
    for prefetch in (PREFETCH, 1):
        each = prefetch + COPIED
        rows = int(min(local_batch, max(1, PIECE // row), budget // (each * workers * row)))
        if rows:
            pieces = -(-local_batch // rows)
            rows = -(-local_batch // pieces)
            batch = _page_locked(whole) if pinned else whole
            return LoaderMemory(rows, pieces, prefetch, each, each * workers, rows * row, (HELD + pinned) * batch)
    raise UserError(
        f"reading ahead needs {as_text(each * workers * row)} of shared memory a rank with data.workers = {workers}, "
        f"and {as_text(budget)} are given or free: enlarge /dev/shm (docker --shm-size) or data.buffer_gb, or lower "
        "data.workers"
    )


def loader_memory_here(
    samples: int, local_batch: int, data: DataSection, world: World, *, pinned: bool
) -> LoaderMemory:
    """`loader_memory` within the memory of the machines of all ranks, which call this and get the same.

    Buffers take data.buffer_gb, or a share of what is free on a machine, divided by its ranks. Raises UserError if that
    is too little, if less than data.buffer_gb is free, or if the batches themselves need more than there is.
    """
    ranks = world.ranks_here()
    shared, free = (min(world.gather_ints(size // ranks)) for size in (_free_shared_memory(), free_memory()))
    budget = SHARE * shared if data.buffer_gb is None else 1e9 * data.buffer_gb
    if data.workers and budget > shared:
        raise UserError(
            f"data.buffer_gb = {data.buffer_gb:g}, but {as_text(shared)} of {SHARED} are free for each rank: lower it, "
            "or enlarge /dev/shm (docker --shm-size)"
        )
    memory = loader_memory(samples, local_batch, data.workers, pinned=pinned, budget=budget)
    if memory.shared + memory.batches / 2 > free:  # half: samples may be 16-bit
        raise UserError(
            f"{memory.describe()}: more than the {as_text(free)} of main memory that are free for each rank; use more "
            "ranks, or lower train.global_batch_size, data.crop_seconds or data.workers"
        )
    return memory


def _free_shared_memory() -> int:
    """Bytes that this machine can still put into shared memory."""
    if not SHARED.is_dir():
        return free_memory()
    found = os.statvfs(SHARED)
    return min(free_memory(), found.f_bavail * found.f_frsize)


def _page_locked(count: int) -> int:
    """Bytes that torch takes for so many bytes of page-locked memory."""
    return 1 << (count - 1).bit_length()
