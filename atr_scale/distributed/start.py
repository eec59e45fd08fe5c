"""Where this process stands among the ranks, whichever launcher started it.

torchrun, accelerate and deepspeed set RANK and friends; srun sets SLURM_*; a plain process has neither and is a world
of one. Launchers only spawn processes: what the processes do is the same under all of them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from atr_scale.distributed.world import World
from atr_scale.errors import UserError, defer_to_first_rank

logger = logging.getLogger(__name__)

TIMEOUT = timedelta(minutes=30)  # reading shards and saving checkpoints may hold one rank up
JOIN_TIMEOUT = timedelta(minutes=5)


@dataclass(frozen=True)
class Place:
    """A process' numbers among the ranks, and where rank 0 listens."""

    rank: int
    world_size: int
    local_rank: int
    address: str
    port: int

    @staticmethod
    def find(variables: Mapping[str, str]) -> Place:
        """RANK wins over SLURM_PROCID, for torchrun under srun sets both."""
        for rank, size, local in (
            ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
            ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
        ):
            # A shell on a login node may carry SLURM_* without being a step: only several tasks make ranks.
            if rank in variables and size in variables:
                try:
                    port = int(variables.get("MASTER_PORT", "29500"))
                    place = Place(
                        int(variables[rank]),
                        int(variables[size]),
                        int(variables.get(local, "0")),
                        variables.get("MASTER_ADDR", "127.0.0.1"),
                        port,
                    )
                except ValueError as error:
                    raise UserError(f"{rank}, {size}, {local} or MASTER_PORT is no number: {error}") from None
                if place.world_size > 1 and "MASTER_ADDR" not in variables:
                    raise UserError(
                        f"{size}={place.world_size} but MASTER_ADDR is not set: start with torchrun or accelerate "
                        "launch, or export MASTER_ADDR and MASTER_PORT as slurm/ does"
                    )
                return place
        return Place(0, 1, 0, "127.0.0.1", 29500)


@contextmanager
def distributed() -> Iterator[tuple[World, torch.device]]:
    """Join the other ranks; leaves on exit. Yields (world, this rank's device)."""
    place = Place.find(os.environ)
    found = dict(os.environ)
    # DeepSpeed reads these itself, also where srun or nothing has set them.
    os.environ.update(
        RANK=str(place.rank),
        WORLD_SIZE=str(place.world_size),
        LOCAL_RANK=str(place.local_rank),
        MASTER_ADDR=place.address,
        MASTER_PORT=str(place.port),
    )
    if torch.cuda.is_available():
        device = torch.device("cuda", place.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if place.world_size > 1 and place.rank == 0:
        logger.info("joining %d ranks at %s:%d", place.world_size, place.address, place.port)
    # The attempt's number keeps a restarted group away from the addresses of the one before it, which a plain env://
    # start would find and wait for.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") + "-" + os.environ.get("SLURM_RESTART_COUNT", "0")
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore(f"attempt-{attempt}", _store(place)),
        rank=place.rank,
        world_size=place.world_size,
        timeout=TIMEOUT,
        device_id=device if device.type == "cuda" else None,
    )
    try:
        yield World.current(), device
    except UserError as error:
        defer_to_first_rank(error)
        raise
    finally:
        dist.destroy_process_group()
        os.environ.clear()
        os.environ.update(found)


def _store(place: Place) -> dist.Store:
    """Where the ranks meet: rank 0 listens, unless torchrun's agent does already. UserError where that fails."""
    if place.world_size == 1:
        return dist.HashStore()
    agent_listens = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        return dist.TCPStore(
            place.address,
            place.port,
            place.world_size,
            is_master=place.rank == 0 and not agent_listens,
            timeout=JOIN_TIMEOUT,
            wait_for_workers=False,
        )
    except dist.DistError as error:
        raise UserError(
            f"rank {place.rank} cannot meet the others at {place.address}:{place.port} ({str(error).splitlines()[0]}): "
            "check MASTER_ADDR, and set MASTER_PORT to a free port"
        ) from None
