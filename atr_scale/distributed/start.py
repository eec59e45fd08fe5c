"""Rank and world size of this process, whichever launcher started it, and joining the other ranks.

torchrun, accelerate and deepspeed set RANK, WORLD_SIZE and LOCAL_RANK; srun sets SLURM_*; a plain process has neither
and is a world of one. Launchers only start processes, which do the same under all of them.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore  # torch.distributed, but typed
from torch.distributed import distributed_c10d

from atr_scale.distributed.lifeline import end_with_launcher
from atr_scale.distributed.world import World
from atr_scale.errors import OneLineError, UserError, defer_to_first_rank

logger = logging.getLogger(__name__)

# Ranks of a launcher may start minutes after each other, on a cluster whose file system is slow. Without a launcher
# RANK and WORLD_SIZE are often left over from another start.
JOIN_TIMEOUT, JOIN_TIMEOUT_ALONE = timedelta(minutes=5), timedelta(minutes=1)
SIGNS_OF_A_LAUNCHER = ("TORCHELASTIC_RUN_ID", "SLURM_PROCID", "CROSS_RANK")  # torchrun, accelerate; srun; deepspeed
SAY_S = 10.0  # a rank that waits longer for others says for whom
# World sizes by launchers whose processes would each train alone: Open MPI, MPICH and Intel MPI, PMIx, LSF's jsrun.
SIZES_OF_OTHERS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS", "PMIX_SIZE", "JSM_NAMESPACE_SIZE")


@dataclass(frozen=True)
class Place:
    """Rank, world size and local rank of a process, and the address at which rank 0 listens."""

    rank: int
    world_size: int
    local_rank: int
    address: str
    port: int

    @staticmethod
    def find(variables: Mapping[str, str]) -> Place:
        """From environment variables. RANK has priority over SLURM_PROCID: under srun, torchrun sets both.

        Raises UserError for values that are no numbers or do not fit each other, if the address of rank 0 is missing,
        and for processes of a launcher that sets other variables.
        """
        for rank, size, local in (
            ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
            ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
        ):
            # SLURM_* may be set outside of a job step, with one task; only several tasks need MASTER_ADDR.
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
                if not 0 <= place.rank < place.world_size:
                    raise UserError(
                        f"{rank}={place.rank} is not below {size}={place.world_size}: unset both if they are left over "
                        "from another start, or correct the launcher"
                    )
                if place.world_size > 1 and "MASTER_ADDR" not in variables:
                    raise UserError(
                        f"{size}={place.world_size} but MASTER_ADDR is not set: start with torchrun or accelerate "
                        "launch, or export MASTER_ADDR and MASTER_PORT as slurm/ does"
                    )
                return place
        for size in SIZES_OF_OTHERS:
            if variables.get(size, "1") != "1":
                raise UserError(
                    f"{size}={variables[size]}: a launcher has started several processes, but set no RANK and "
                    "WORLD_SIZE for them: use torchrun, accelerate launch, deepspeed or srun, or set these two from "
                    "its variables"
                )
        return Place(0, 1, 0, "127.0.0.1", 29500)


@contextmanager
def distributed(timeout_s: float = 1800.0) -> Iterator[tuple[World, torch.device]]:
    """Joins the other ranks and leaves them on exit. Yields (world, this rank's device).

    timeout_s: for which a rank waits for another one in any group: shards or a checkpoint may keep one busy.
    Raises UserError if they cannot be reached, or if two ranks have the same GPU.
    """
    place = Place.find(os.environ)
    end_with_launcher(os.environ)
    found = dict(os.environ)
    launched = any(name in found for name in SIGNS_OF_A_LAUNCHER)
    patience = JOIN_TIMEOUT if launched else JOIN_TIMEOUT_ALONE
    # DeepSpeed reads these variables itself, which srun and a plain process do not have.
    os.environ.update(
        RANK=str(place.rank),
        WORLD_SIZE=str(place.world_size),
        LOCAL_RANK=str(place.local_rank),
        MASTER_ADDR=place.address,
        MASTER_PORT=str(place.port),
    )
    device = _device(place)
    if place.world_size > 1:
        if place.rank == 0:
            logger.info("joining %d ranks at %s:%d", place.world_size, place.address, place.port)
        if interface := _interface_towards(place.address):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    # A restarted group must not find the addresses of the group before it in the store: it would wait for them.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") + "-" + os.environ.get("SLURM_RESTART_COUNT", "0")
    store = PrefixStore(f"attempt-{attempt}", _store(place, patience))
    if place.world_size > 1:
        _meet(place, store, patience)
        if device.type == "cuda":
            _claim(device, place, store)
    with _timeout_of_groups(timedelta(seconds=timeout_s)):
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=place.rank,
            world_size=place.world_size,
            device_id=device if device.type == "cuda" else None,
        )
        try:
            yield replace(World.current(), store=store), device
        except OneLineError as error:
            defer_to_first_rank(error)
            raise
        finally:
            _leave()
            os.environ.clear()
            os.environ.update(found)


@contextmanager
def _timeout_of_groups(timeout: timedelta) -> Iterator[None]:
    """The timeout of every group that is made meanwhile, also of those that DeepSpeed makes.

    Else it is 10 minutes with NCCL, whatever the default group has, and a rank that waits for its data ends the run.
    """
    names = "default_pg_timeout", "default_pg_nccl_timeout"
    found = {name: getattr(distributed_c10d, name) for name in names}
    for name, value in found.items():
        if value is not None:  # this build has the backend
            setattr(distributed_c10d, name, timeout)
    try:
        yield
    finally:
        for name, value in found.items():
            setattr(distributed_c10d, name, value)


def _leave() -> None:
    """Leave the process group. DeepSpeed, if it has joined, forgets its groups, so that the process may join anew."""
    deepspeed = sys.modules.get("deepspeed")
    if deepspeed is not None and deepspeed.comm.is_initialized():
        deepspeed.comm.destroy_process_group()
    else:
        dist.destroy_process_group()


@contextmanager
def device_as_local_rank(device: torch.device) -> Iterator[None]:
    """DeepSpeed takes LOCAL_RANK for the number of its GPU, which it is not if a rank sees only some of the machine's.

    The variable is the launcher's again afterwards: error files and the first rank of a machine are found by it.
    """
    launchers = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    try:
        yield
    finally:
        os.environ.pop("LOCAL_RANK")
        if launchers is not None:
            os.environ["LOCAL_RANK"] = launchers


def _device(place: Place) -> torch.device:
    """This rank's GPU among those that it sees: all of the machine, or its own (srun --gpus-per-task, --gpu-bind)."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", place.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _claim(device: torch.device, place: Place, store: Store) -> None:
    """Raises UserError if another rank has the same GPU, which NCCL refuses in many lines."""
    host, gpu = socket.gethostname(), torch.cuda.get_device_properties(device).uuid
    owner = store.compare_set(f"rank of {host} {gpu}", "", str(place.rank)).decode()
    if owner != str(place.rank):
        raise UserError(
            f"ranks {owner} and {place.rank} have the same GPU of {host} ({torch.cuda.device_count()} visible): "
            "start no more ranks on a machine than it has GPUs (--nproc-per-node, --ntasks-per-node), and let "
            "CUDA_VISIBLE_DEVICES give each its own"
        )


def _meet(place: Place, store: Store, patience: timedelta) -> None:
    """Announce this rank; rank 0 waits for all of them, because no collective says which one is missing."""
    store.set(f"rank {place.rank} is here", socket.gethostname())
    missing = list(range(1, place.world_size)) if place.rank == 0 else []

    def those_missing() -> str:
        missing[:] = [rank for rank in missing if not store.check([f"rank {rank} is here"])]
        return f"ranks {', '.join(map(str, missing[:8]))}{' ...' if len(missing) > 8 else ''}" if missing else ""

    _wait_for(those_missing, place, patience)


def _wait_for(missing: Callable[[], str], place: Place, patience: timedelta) -> None:
    """Wait until `missing` returns an empty text, and say for whom. Raises UserError if that takes longer."""
    began, said = time.monotonic(), 0.0
    while whom := missing():
        waited = time.monotonic() - began
        if waited > patience.total_seconds():
            raise UserError(
                f"rank {place.rank} of {place.world_size} has waited {waited:.0f} s at {place.address}:{place.port} "
                f"for {whom}: start all ranks and check MASTER_ADDR and MASTER_PORT, or unset RANK and WORLD_SIZE if "
                "they are left over from another start"
            )
        if waited > said + SAY_S:
            said = waited
            logger.warning("rank %d waits for %s, %.0f s of at most %d", place.rank, whom, waited, patience.seconds)
        time.sleep(0.1)


def _interface_towards(address: str) -> str | None:
    """The network interface that leads to the machine `address`, None if that is this machine's loopback.

    Gloo takes the one of this machine's name by default, which /etc/hosts often gives to the loopback.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # sends nothing
            own = probe.getsockname()[0]
    except OSError:
        return None
    interfaces = psutil.net_if_addrs().items()
    found = [name for name, addresses in interfaces if own in (each.address for each in addresses)]
    return None if own.startswith("127.") else next(iter(found), None)


def _listening(place: Place) -> bool:
    try:
        socket.create_connection((place.address, place.port), timeout=5).close()
    except OSError:
        return False
    return True


def _store(place: Place, patience: timedelta) -> Store:
    """The store through which the ranks meet. Rank 0 listens, unless torchrun's agent does already.

    Raises UserError if the store cannot be reached.
    """
    if place.world_size == 1:
        return HashStore()
    agent_listens = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    listens = place.rank == 0 and not agent_listens
    if not listens:  # the store's own wait is silent, and longer than its time limit
        _wait_for(lambda: "" if _listening(place) else "rank 0", place, patience)
    try:
        return TCPStore(
            place.address,
            place.port,
            place.world_size,
            is_master=listens,
            timeout=patience,
            wait_for_workers=False,
        )
    except dist.DistError as error:
        raise UserError(
            f"rank {place.rank} cannot meet the others at {place.address}:{place.port} ({str(error).splitlines()[0]}): "
            "check MASTER_ADDR, and set MASTER_PORT to a free port"
        ) from None
