"""Which faults there are, and a schedule of them that follows from a seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

SOON = 0.5  # share of the faults that come while the one before may not be over
SOON_S = 15.0
FIRST, LAST = 4, 12  # steps after the start and before the end in which there is no fault


@dataclass(frozen=True)
class Kind:
    """A kind of fault. least, most: how many seconds it lasts; both zero if it happens at once.

    group: of kinds that cannot last at the same time.
    """

    name: str
    what: str
    least: float = 0.0
    most: float = 0.0
    group: str = ""


KINDS = {
    kind.name: kind
    for kind in (
        Kind("rank killed", "kill -9 of a rank"),
        Kind("rank stopped", "SIGSTOP of a rank"),
        Kind("rank told to stop", "SIGTERM to a rank"),
        Kind("worker killed", "kill -9 of a loader worker"),
        Kind("launcher killed", "kill -9 of srun"),
        Kind("job requeued", "scontrol requeue"),
        Kind("job signalled", "scancel --signal=USR1 --batch"),
        Kind("node lost", "power loss of a node with a rank, which comes back", 60, 90),
        Kind("nodes lost", "power loss of a node with a rank and of the spare ones, for a while", 50, 80),
        Kind("network cut", "the cable of a node with a rank is pulled and put back", 2, 8),
        Kind("S3 refuses", "the S3 server refuses connections", 3, 12, "S3"),
        Kind("S3 answers 503", "the S3 server answers 503 SlowDown to all requests", 3, 12, "S3"),
        Kind("S3 stalls", "answers of the S3 server stop in the middle", 2, 6, "S3"),
        Kind("S3 resets", "answers of the S3 server are cut off", 2, 6, "S3"),
        Kind("disk full", "no space is left on the disk of the run", 4, 15, "disk"),
    )
}


@dataclass(frozen=True)
class Fault:
    """One fault of a schedule.

    step: the run reaches this step before it happens. after_s: seconds after the one before instead; None: none.
    lasts_s: how long. where: in [0, 1), which of the ranks, workers or nodes is hit.
    """

    number: int
    kind: Kind
    step: int
    after_s: float | None
    lasts_s: float
    where: float


def schedule(seed: int, count: int, steps: int, kinds: Sequence[str] = tuple(KINDS)) -> list[Fault]:
    """`count` faults in a run of `steps` steps: every kind comes once before one comes again."""
    draw = random.Random(seed)
    names: list[str] = []
    while len(names) < count:
        names += draw.sample(sorted(kinds), len(kinds))
    places = sorted(draw.randint(FIRST, max(FIRST, steps - LAST)) for _ in range(count))
    faults = []
    for number, (name, step) in enumerate(zip(names, places, strict=False), 1):
        kind = KINDS[name]
        soon = draw.random() < SOON and number > 1
        after = round(draw.uniform(0, SOON_S), 1) if soon else None
        lasts = round(draw.uniform(kind.least, kind.most), 1)
        faults.append(Fault(number, kind, step, after, lasts, draw.random()))
    return faults
