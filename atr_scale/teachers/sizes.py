"""Whether a teacher table fits into memory and on the disk, before anything is embedded or read.

Shape suffixes: C captions, N clips, d width, K best.
"""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from atr_scale.config import RunConfig
from atr_scale.data import storage
from atr_scale.data.shard_reader import ShardSet
from atr_scale.distributed.world import World
from atr_scale.errors import UserError
from atr_scale.memory import as_text, free_memory
from atr_scale.scorers import build_scorer

UNPROJECTED = 1024  # width that is assumed for encoders without a projection
USUAL_K = 128


class TableSize(NamedTuple):
    """Bytes of a table on the disk, and of its values in the memory of every rank while it is made."""

    disk: int
    memory: int


def table_size(config: RunConfig, num_captions: int, num_clips: int, top_k: int | None) -> TableSize:
    """The size of the teacher table that a run with this configuration writes."""
    width = UNPROJECTED if config.model.projection.kind == "none" else config.model.projection.dim
    if build_scorer(config.model.scorer.name, width, **config.model.scorer.options).is_dual_encoder:
        values = (num_captions + num_clips) * width
        return TableSize(2 * values, (4 + 2) * values)  # fp16; fp32, then fp16
    if top_k is not None:
        values = num_captions * min(top_k, num_clips) + num_clips * min(top_k, num_captions)
        return TableSize((4 + 2) * values, 4 * (4 + 4) * values)  # int32 and fp16; both with fp32, joined and sorted
    return TableSize(2 * num_captions * num_clips, (4 + 2) * num_captions * num_clips)


def check_sizes(
    runs: dict[str, RunConfig], shards: Sequence[ShardSet], out: Path, top_k: int | None, copies: int, world: World
) -> None:
    """Raises UserError on every rank if a table does not fit; all ranks call this.

    runs: configurations by name. copies: tables of the cross-fitted one beside those of the runs, which it joins.
    """
    captions, clips = sum(each.count_captions() for each in shards), sum(map(len, shards))
    memory = _memory_of_a_rank(world)
    disk = None if storage.is_remote(str(out)) else shutil.disk_usage(out).free
    on_disk = 0
    for name, config in runs.items():
        size = table_size(config, captions, clips, top_k)
        on_disk += (1 + copies) * size.disk
        small = table_size(config, captions, clips, USUAL_K)
        if small.memory < size.memory:
            needs = f"{as_text(small.memory)} of memory and {as_text(small.disk)} of disk"
            remedy = f"give --top-k {USUAL_K}, which needs {needs}"
        else:
            remedy = "use machines with more memory for each rank, or fewer --shards at once"
        what = f"the teacher table of {name} for {captions} captions and {clips} clips"
        if size.memory > memory:
            raise UserError(
                f"{what} needs {as_text(size.memory)} of memory on each rank, {as_text(memory)} are free: {remedy}"
            )
        if disk is not None and on_disk > disk:
            remedy = remedy if small.disk < size.disk else "give an --out with more space"
            raise UserError(
                f"{what} takes the tables in {out} to {as_text(on_disk)}, {as_text(disk)} of the disk are free: "
                f"{remedy}"
            )


def check_grades_size(path: Path, world: World) -> None:
    """Raises UserError on every rank if the grades of an npz file do not fit into memory; all ranks call this.

    `read_grades` tells what is wrong with a file that is none.
    """
    memory = _memory_of_a_rank(world)
    try:
        with zipfile.ZipFile(path) as file:
            size = max(entry.file_size for entry in file.infolist())
    except (OSError, ValueError, zipfile.BadZipFile):
        return
    if size + size // 4 > memory:  # and a truth value for each while they are checked
        raise UserError(
            f"the grades in {path} take {as_text(size + size // 4)} of memory on each rank while they are read, "
            f"{as_text(memory)} are free: give a CSV file, which names the relevant clips alone"
        )


def _memory_of_a_rank(world: World) -> int:
    """Bytes that every rank can take, if all take as much at once."""
    return min(world.gather_ints(free_memory() // world.ranks_here()))
