"""Two ranks with a network of a given rate between them, on one machine: two network namespaces and a cable.

    with shaped_link(gbit=1.0) as link:
        run_ranks(function, 2, link, ...)      # `function` calls link.join() first

Needs root, Linux and Debian's iproute2. A token bucket at each end limits what it sends.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
CLONE_NEWNET = 0x40000000
BURST_S = 0.002  # of the rate, that the bucket lets through at once: what comes between two ticks of the kernel's clock
QUEUE_S = 0.05  # of the rate, that waits; more is dropped


@dataclass(frozen=True)
class ShapedLink:
    """names: the namespace of each rank. store: a file that does not exist yet, by which the ranks meet."""

    names: tuple[str, str]
    store: str

    def join(self) -> None:
        """Move this rank, and its default process group, to its end of the link. For the two ranks of `run_ranks`."""
        rank, size = dist.get_rank(), dist.get_world_size()
        dist.barrier()  # the other rank may still be about to connect to the group that goes
        dist.destroy_process_group()
        libc = ctypes.CDLL(None, use_errno=True)
        with open(f"/run/netns/{self.names[rank]}", encoding="utf-8") as namespace:
            if libc.setns(namespace.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
        os.environ["GLOO_SOCKET_IFNAME"] = "eth0"
        dist.init_process_group("gloo", store=FileStore(self.store, size), rank=rank, world_size=size)


def why_not() -> str | None:
    """Why this machine can have no shaped link; None if it can."""
    if not hasattr(os, "geteuid") or os.geteuid():
        return "network namespaces need root"
    missing = [program for program in ("ip", "tc") if not shutil.which(program, path=PATH)]
    if missing:
        return f"no {' and '.join(missing)} on this machine (Debian's iproute2)"
    made = _call("ip", "netns", "add", name := f"shaped-{os.getpid()}-try")
    _call("ip", "netns", "delete", name)
    return f"no network namespaces: {made.stderr.strip()}" if made.returncode else None


@contextmanager
def shaped_link(gbit: float) -> Iterator[ShapedLink]:
    """A link of `gbit` Gbit/s each way."""
    first, second = names = f"shaped-{os.getpid()}-0", f"shaped-{os.getpid()}-1"
    rate = gbit * 1e9
    try:
        for name in names:
            _must("ip", "netns", "add", name)
        _must(*f"ip -n {first} link add eth0 type veth peer name eth0 netns {second}".split())
        for number, name in enumerate(names, 1):
            # Addresses for documentation (RFC 5737): nothing else has them.
            _must(*f"ip -n {name} address add 192.0.2.{number}/24 dev eth0".split())
            _must(*f"ip -n {name} link set lo up".split())
            _must(*f"ip -n {name} link set eth0 up".split())
            shape = f"rate {rate:.0f}bit burst {rate / 8 * BURST_S:.0f} limit {rate / 8 * QUEUE_S:.0f}"
            _must(*f"tc -n {name} qdisc add dev eth0 root tbf {shape}".split())
        with tempfile.TemporaryDirectory() as folder:
            yield ShapedLink(names, f"{folder}/store")
    finally:
        for name in names:
            _call("ip", "netns", "delete", name)  # the cable goes with it


def _call(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": PATH})


def _must(*command: str) -> None:
    done = _call(*command)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
