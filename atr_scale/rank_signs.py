"""What the files RUN/status/rank-R.json say about the ranks of a run, and whether their processes live."""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from atr_scale.errors import one_line
from atr_scale.run_files import STATUS, read_json_object

QUIET_S = 60.0  # a rank writes every 3 s; many ranks, or a slow file system, take longer
SILENT_S = 300.0  # of a rank on another machine, whose clock may differ: then it is believed to be gone
FRESH_S = 5.0
REUSED_S = 5.0  # a process that began so much later than the rank did has got its process id


@dataclass(frozen=True)
class RankSign:
    """The last sign of life of a rank. Seconds are those until now; None is unknown.

    quiet_s: since it was written. idle_s: since the last progress. limit_s: for `idle_s`, after which the rank hangs.
    alive: the process runs, as far as can be told from here.
    """

    rank: int
    host: str
    pid: int | None
    attempt: int | None
    state: str
    wait: str | None
    step: int
    steps: int | None
    samples_seen: int | None
    step_seconds: float | None
    written: float
    quiet_s: float
    idle_s: float
    limit_s: float
    alive: bool
    dropped: dict[str, int]
    skipped_steps: int | None
    fp16_overflows: int | None
    retries: int
    failed_saves: int
    reason: str | None

    @property
    def hangs(self) -> bool:
        """Its process runs, but makes no progress or writes nothing any more."""
        return self.alive and self.state != "ended" and (self.idle_s > self.limit_s or self.quiet_s > QUIET_S)


def read_signs(run: Path, attempt: int | None = None) -> list[RankSign]:
    """The signs of all ranks, sorted by rank; of one attempt only, if it is given. Damaged files are left out."""
    found = []
    for path in (run / STATUS).glob("rank-*.json"):
        values = read_json_object(path)
        sign = values and _sign(values, path)
        if sign and (attempt is None or sign.attempt == attempt):
            found.append(sign)
    return sorted(found, key=lambda sign: sign.rank)


def _sign(values: Mapping[str, Any], path: Path) -> RankSign | None:
    rank, written = int_in(values, "rank"), float_in(values, "written")
    if rank is None or written is None:
        return None
    # The clocks of two machines differ: the file server's may be nearer to ours, and ages are not negative.
    now = time.time()
    try:
        quiet = max(0.0, min(now - written, now - path.stat().st_mtime))
    except OSError:
        quiet = max(0.0, now - written)
    host, pid = text_in(values, "host") or "unknown", int_in(values, "pid")
    return RankSign(
        rank=rank,
        host=host,
        pid=pid,
        attempt=int_in(values, "attempt"),
        state=text_in(values, "state") or "unknown",
        wait=text_in(values, "wait"),
        step=int_in(values, "step") or 0,
        steps=int_in(values, "steps"),
        samples_seen=int_in(values, "samples_seen"),
        step_seconds=float_in(values, "step_seconds"),
        written=written,
        quiet_s=quiet,
        idle_s=quiet + max(0.0, written - (float_in(values, "beat") or written)),
        limit_s=float_in(values, "limit") or math.inf,
        alive=process_lives(host, pid, float_in(values, "started") or written, quiet),
        dropped=counts_in(values.get("dropped")),
        skipped_steps=int_in(values, "skipped_steps"),
        fp16_overflows=int_in(values, "fp16_overflows"),
        retries=int_in(values, "retries") or 0,
        failed_saves=int_in(values, "failed_saves") or 0,
        reason=text_in(values, "reason"),
    )


def process_lives(host: str, pid: int | None, started: float, quiet: float) -> bool:
    """Whether a process that began before `started` (epoch seconds) still runs; quiet: seconds since its last sign."""
    if host != socket.gethostname() or pid is None:
        return quiet < SILENT_S
    try:
        process = psutil.Process(pid)
        if process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= started + REUSED_S:
            return True
    except (psutil.Error, ValueError, OverflowError):  # no such process, or no such process id
        pass
    return quiet < FRESH_S  # of a container on this machine, whose processes are not seen from here


def name_ranks(ranks: Sequence[RankSign]) -> str:
    """The subject of a sentence: "rank 1 on gpu01", "ranks 1 on gpu01, 2 on gpu01"."""
    names = ", ".join(f"{rank.rank} on {rank.host}" for rank in ranks[:4]) + (", ..." if len(ranks) > 4 else "")
    return f"rank {names}" if len(ranks) == 1 else f"ranks {names}"


def cause_of(end: Mapping[str, Any], ranks: Sequence[RankSign]) -> str | None:
    """The reason in the end line of an attempt; None if there is none.

    ranks: that have ended. If the writer of the line did not know the cause, those that have left no word are named
    first, because a rank whose peer is killed knows only of a connection that was closed.
    """
    reason = text_in(end, "reason")
    silent = sorted((rank for rank in ranks if rank.state != "ended"), key=lambda rank: rank.written)
    if not silent or end.get("known") is not False:
        return reason
    return f"{name_ranks(silent)} left no word: killed, out of memory, or the machine went down; then {reason}"


def int_in(values: Mapping[str, Any], key: str) -> int | None:
    """An integer of a file that may be damaged; None if it is none."""
    value = values.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 53 else None


def float_in(values: Mapping[str, Any], key: str) -> float | None:
    """A finite number of a file that may be damaged; None if it is none."""
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e18:
        return None
    return float(value)


def text_in(values: Mapping[str, Any], key: str) -> str | None:
    """A text of a file that may be damaged, in one line; None if it is none or empty."""
    value = values.get(key)
    return one_line(_printable(value)) or None if isinstance(value, str) else None


def counts_in(value: object) -> dict[str, int]:
    """Counts by name; those that are damaged are left out."""
    if not isinstance(value, dict):
        return {}
    return {
        _printable(str(key)): int(found) for key in value if (found := float_in(value, key)) is not None and found > 0
    }


def _printable(value: str) -> str:
    """The text without lone surrogates, which no terminal takes."""
    return value.encode("utf-8", "replace").decode()
