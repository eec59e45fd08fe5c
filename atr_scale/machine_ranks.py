"""Starts the ranks of one machine once, for launch/cloud.sh, which starts them again after a failure.

python -m atr_scale.machine_ranks MACHINES FIRST:PORT PROCESSES CONFIG [key.sub=value ...]

Every machine runs this at about the same time. The machines meet at FIRST:PORT by torch's elastic agent, and each
starts PROCESSES ranks. MACHINES is their number, or LEAST:MOST. If a rank ends with an error, the ranks of all machines
end. Exit codes: 0, 1 and 2 are the ranks' own, 2 if any rank of this machine had it; NOT_MET if the machines have not
met, the process at FIRST:PORT has gone, or a signal has come before training; TOO_FEW if fewer than LEAST came.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from types import FrameType
from typing import Any

import psutil
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousTimeoutError
from torch.distributed.elastic.rendezvous.utils import _matches_machine_hostname
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

NOT_MET, TOO_FEW = 75, 69  # EX_TEMPFAIL and EX_UNAVAILABLE of sysexits.h
REACH_S = 60.0  # for the first machine to listen
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # handed on to the ranks, which save
# With these short timeouts a lost machine is noticed within seconds, not minutes.
MEETING: dict[str, Any] = {
    "join_timeout": 600, "last_call_timeout": 2, "keep_alive_interval": 2, "keep_alive_max_attempt": 5,
    "read_timeout": 60,
}  # fmt: skip
GATHER_S = 30  # for which the LEAST machines wait for more of them
_handed_on: set[int] = set()


def start_ranks(machines: str, place: str, processes: int, arguments: list[str]) -> int:
    """Run the ranks until they end and return the exit code. Prints one line if they fail."""
    for number in SIGNALS:
        signal.signal(number, _hand_on)
    own, meeting_place = own_address(place)
    if not _listens(meeting_place):
        return NOT_MET
    least, _, most = machines.partition(":")
    meeting = {**MEETING, **({"last_call_timeout": GATHER_S} if most else {})}
    config = LaunchConfig(
        min_nodes=int(least), max_nodes=int(most or least), nproc_per_node=processes, run_id="atr-scale",
        rdzv_backend="c10d", rdzv_endpoint=meeting_place, rdzv_configs=meeting, max_restarts=0,
        signals_to_handle="", local_addr=own,
    )  # fmt: skip
    # The agents' own store is that of the first meeting: a machine that comes later would wait for its address in vain.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    launch = elastic_launch(config, sys.executable)
    try:
        launch("-u", "-m", "atr_scale.train", *arguments)
    except ChildFailedError as error:
        return _tell(error.failures)
    except RendezvousTimeoutError:
        print(f"error: fewer than {least} machines came to {place} in {MEETING['join_timeout']} s", file=sys.stderr)
        return TOO_FEW
    except RendezvousError:  # not there yet, or of machines that are just ending
        return NOT_MET
    return 0


def _listens(place: str) -> bool:
    """Whether the first machine answers, or is this one. torch would tell of each attempt in a C++ stack."""
    host, _, port = place.rpartition(":")
    deadline = time.monotonic() + REACH_S
    while not _matches_machine_hostname(host):
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            return True
        except socket.gaierror as error:
            if error.errno == socket.EAI_NONAME:
                print(f"error: no machine is called {host}: give an address that all machines reach", file=sys.stderr)
                sys.exit(2)
        except OSError:
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(1)
    return True


def own_address(place: str) -> tuple[str | None, str]:
    """This machine's address in the network of FIRST:PORT, None if it is not known, and where it meets the others.

    Otherwise torch goes by the name of the machine, which others may not know, and which /etc/hosts often gives to the
    loopback: then nobody listens at FIRST:PORT.
    """
    host, _, port = place.rpartition(":")
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, int(port)))  # sends nothing
            own, there = probe.getsockname()[0], probe.getpeername()[0]
    except OSError:
        return None, place
    if own.startswith("127."):
        return None, place
    return own, f"localhost:{port}" if own == there else place


def _hand_on(number: int, frame: FrameType | None) -> None:
    """Send the signal to the ranks. The agent would leave at once, and those of other machines would wait for it."""
    ranks = psutil.Process().children()
    if not ranks:  # not met yet
        sys.exit(NOT_MET)
    _handed_on.add(number)
    for rank in ranks:
        with suppress(psutil.NoSuchProcess):
            rank.send_signal(number)


def _tell(failures: Mapping[int, ProcessFailure]) -> int:
    """Print the line of the rank that has failed first, or that has found the user's mistake. Returns the exit code."""
    mistakes = {rank: failure for rank, failure in failures.items() if failure.exitcode == 2}
    rank, first = min((mistakes or failures).items(), key=lambda item: item[1].timestamp)
    if -first.exitcode in _handed_on:  # it was told before it could listen
        return NOT_MET
    # A rank that ends with one line hands it to its launcher, see `atr_scale.errors.report`.
    line = first.message["message"] if isinstance(first.message, dict) else ""
    if line.startswith("error: "):
        print(line, file=sys.stderr)
    elif first.exitcode < 0:
        print(f"error: rank {rank} was ended by {first.signal_name()}", file=sys.stderr)
    else:
        print(f"error: rank {rank} failed with exit code {first.exitcode}, see its traceback above", file=sys.stderr)
    return 2 if mistakes else 1


def _main() -> None:
    # The agent warns of what is told here in one line.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    machines, place, processes, *arguments = sys.argv[1:]
    sys.exit(start_ranks(machines, place, int(processes), arguments))


if __name__ == "__main__":
    _main()
