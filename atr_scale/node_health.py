"""Whether a node can train, for slurm/prologue.sh, which runs this once on every node before a job.

python -m atr_scale.node_health FOLDER    prints "NODE is healthy", or ends with one line that says what is wrong

A disk or GPU that does not answer blocks this process: the job script ends it and takes the node for a bad one.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import torch

from atr_scale.errors import Failure, exit_with_line, one_line
from atr_scale.memory import as_text

SIZE = 1024  # of the matrices that are multiplied
LEAST_SHARED = 64 * 2**20  # bytes of /dev/shm: less holds no batch of loader workers
SHARED = Path("/dev/shm")


def check_node(folder: Path) -> None:
    """Multiply matrices on every GPU, or on the CPU, and write to `folder` and read it back.

    Raises Failure with the cause if something does not work, or if torch sees other GPUs than SLURM has given.
    """
    given, seen = os.environ.get("SLURM_GPUS_ON_NODE"), torch.cuda.device_count()
    if given is not None and given.isdigit() and int(given) != seen:
        raise Failure(f"SLURM has given {given} GPUs, and torch sees {seen}")
    for device in [f"cuda:{number}" for number in range(seen)] or ["cpu"]:
        try:
            ones = torch.ones(SIZE, SIZE, device=device)
            correct = bool((ones @ ones == SIZE).all())
        except RuntimeError as error:
            raise Failure(f"{device} does not compute ({one_line(error)})") from None
        if not correct:
            raise Failure(f"{device} computes a wrong product")
    shared = os.statvfs(SHARED)
    if (free := shared.f_bavail * shared.f_frsize) < LEAST_SHARED:
        raise Failure(f"{SHARED} has {as_text(free)} free")
    probe = folder / f".health-{_name()}"
    try:
        probe.write_text(_name(), encoding="utf-8")
        if probe.read_text(encoding="utf-8") != _name():
            raise Failure(f"{folder} does not return what was written to it")
        probe.unlink()
    except OSError as error:
        raise Failure(f"{folder} cannot be written to ({error.strerror})") from None


def _name() -> str:
    return os.environ.get("SLURMD_NODENAME", socket.gethostname())


def _main() -> None:
    try:
        check_node(Path(sys.argv[1]))
    except Failure as error:
        exit_with_line(Failure(f"{_name()}: {error}"))
    print(f"{_name()} is healthy", flush=True)


if __name__ == "__main__":
    _main()
