"""Which ranks share a folder: those of one node, or all if the folder is on a file system of all nodes."""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass
from pathlib import Path

from atr_scale.distributed.world import World
from atr_scale.locks import running_kernel

TOKEN = ".node"


@dataclass(frozen=True)
class SharedBy:
    """The ranks that share this rank's folder, and the first rank of each folder. Both sorted."""

    ranks: tuple[int, ...]
    leaders: tuple[int, ...]

    @property
    def leader(self) -> int:
        return self.ranks[0]

    @staticmethod
    def all_ranks(world: World) -> SharedBy:
        """One folder."""
        return SharedBy(tuple(range(world.size)), (0,))

    @staticmethod
    def find(folder: Path, world: World) -> SharedBy:
        """By a file of the main rank, and by kernel and number of the folder. All ranks call this; the folder is there.

        Machines may have the same host name, and containers of one machine the same path for different folders.
        """
        token = world.gather_objects(uuid.uuid4().hex)[0]
        if world.is_main:
            (folder / TOKEN).write_text(token, encoding="utf-8")
        world.barrier()
        try:
            mains = (folder / TOKEN).read_text(encoding="utf-8") == token
        except OSError:
            mains = False
        found = os.stat(folder)
        own = "main" if mains else f"{running_kernel()} {found.st_dev} {found.st_ino}"
        places = world.gather_objects(own)
        leaders = sorted({place: rank for rank, place in reversed(list(enumerate(places)))}.values())
        return SharedBy(tuple(rank for rank, place in enumerate(places) if place == own), tuple(leaders))
