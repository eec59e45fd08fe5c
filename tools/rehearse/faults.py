"""How each kind of fault is done to a box, and undone."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from typing import TypeVar

import psutil

from atr_scale.errors import Failure
from tests.faults.proxy import Answer, Cut, for_all
from tools.rehearse.box import NODES, Box
from tools.rehearse.schedule import Fault

T = TypeVar("T")
Undo = Callable[[], None]
Hit = Callable[[Fault, Box], tuple[str, Undo | None]]


class NothingToHit(Exception):
    """What the fault is for does not run at the moment."""


def inject(fault: Fault, box: Box) -> tuple[str, Undo | None]:
    """Do it. What was hit, and what undoes it after `fault.lasts_s`. Raises NothingToHit."""
    try:
        return _HOW[fault.kind.name](fault, box)
    except (psutil.Error, ProcessLookupError, Failure, subprocess.SubprocessError) as error:  # it has just changed
        raise NothingToHit from error


def _one(found: Sequence[T], fault: Fault) -> T:
    if not found:
        raise NothingToHit
    return found[int(fault.where * len(found))]


def _signal_rank(number: signal.Signals) -> Hit:
    def hit(fault: Fault, box: Box) -> tuple[str, Undo | None]:
        rank = _one(box.ranks(), fault)
        place = _place(rank)
        rank.send_signal(number)
        return place, None

    return hit


def _place(process: psutil.Process) -> str:
    environ = process.environ()
    return f"rank {environ['SLURM_PROCID']} on {environ['SLURMD_NODENAME']}"


def _kill_worker(fault: Fault, box: Box) -> tuple[str, Undo | None]:
    worker = _one(box.workers(), fault)
    place = f"a worker of {_place(worker)}"
    worker.kill()
    return place, None


def _kill_launcher(fault: Fault, box: Box) -> tuple[str, Undo | None]:
    found = box.launchers()
    _one(found, fault)
    for process in found:
        os.kill(process.pid, signal.SIGKILL)
    return "srun", None


def _requeue(fault: Fault, box: Box) -> tuple[str, Undo | None]:
    _running(box)
    box.cluster.call("scontrol", "requeue", box.number)
    return "the job", None


def _signal_job(fault: Fault, box: Box) -> tuple[str, Undo | None]:
    _running(box)
    _one(box.ranks(), fault)  # before, the script has no ranks to tell
    box.cluster.call("scancel", "--signal=USR1", "--batch", box.number)
    return "the job", None


def _running(box: Box) -> None:
    if box.cluster.job(box.number)["JobState"] != "RUNNING":
        raise NothingToHit


def _lose(fault: Fault, box: Box) -> tuple[str, Undo | None]:
    return _power_off([_node(fault, box)], box)


def _lose_with_spares(fault: Fault, box: Box) -> tuple[str, Undo | None]:
    lost, used = _node(fault, box), set(box.cluster.nodes(box.number))
    spare = [name for name in NODES if name not in used | box.away]
    return _power_off([lost, *spare], box)


def _node(fault: Fault, box: Box) -> str:
    """A node of the job."""
    _running(box)
    return _one([name for name in box.cluster.nodes(box.number) if name not in box.away], fault)


def _power_off(nodes: list[str], box: Box) -> tuple[str, Undo | None]:
    for node in nodes:
        box.cluster.lab("kill", node)
        box.away.add(node)

    def boot() -> None:
        for node in nodes:
            box.cluster.lab("boot", node)
            box.away.discard(node)

    return ", ".join(nodes), boot


def _cut(fault: Fault, box: Box) -> tuple[str, Undo | None]:
    node = _node(fault, box)
    box.cluster.lab("cut", node)
    return node, lambda: box.cluster.lab("heal", node)


def _refuse(fault: Fault, box: Box) -> tuple[str, Undo | None]:
    box.proxy.refuse()
    return "the server", box.proxy.accept


def _answer(found: Answer | Cut) -> Hit:
    def hit(fault: Fault, box: Box) -> tuple[str, Undo | None]:
        box.proxy.fault = for_all(found)

        def undo() -> None:
            box.proxy.fault = for_all(None)

        return "the server", undo

    return hit


def _fill(fault: Fault, box: Box) -> tuple[str, Undo | None]:
    box.fill()
    return "the run's disk", box.empty


_HOW: dict[str, Hit] = {
    "rank killed": _signal_rank(signal.SIGKILL),
    "rank stopped": _signal_rank(signal.SIGSTOP),
    "rank told to stop": _signal_rank(signal.SIGTERM),
    "worker killed": _kill_worker,
    "launcher killed": _kill_launcher,
    "job requeued": _requeue,
    "job signalled": _signal_job,
    "node lost": _lose,
    "nodes lost": _lose_with_spares,
    "network cut": _cut,
    "S3 refuses": _refuse,
    "S3 answers 503": _answer(Answer(503)),
    "S3 stalls": _answer(Cut("stall")),
    "S3 resets": _answer(Cut("reset")),
    "disk full": _fill,
}
