"""Files of a run folder that say how training goes: their names, and reading them while they may be damaged.

    RUN/status/rank-R.json   the latest sign of life of rank R; docs/operations.md explains its fields
    RUN/status/stacks-ATTEMPT-rank-R.txt   what the threads of rank R did when the run hung
    RUN/attempts.jsonl       starts and ends of the processes that have trained in the folder
    RUN/metrics.jsonl        losses, speed and counts by step
    RUN/dropped.jsonl        samples that could not be read
    RUN/changed_data.jsonl   inputs that have changed between a checkpoint and its resume
    RUN/run.lock             the process that trains in the folder now
    RUN/preempted            there after a signal has stopped the run and it has saved

They are read while another process writes them, and after it was killed or its disk was full.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

STATUS, ATTEMPTS, METRICS, DROPPED, CHANGED_DATA, LOCK, PREEMPTED = (
    "status", "attempts.jsonl", "metrics.jsonl", "dropped.jsonl", "changed_data.jsonl", "run.lock", "preempted",
)  # fmt: skip

OF_A_RUN = ATTEMPTS, STATUS, METRICS, "checkpoints", "config.resolved.yaml"  # of which every run has some
TAIL = 1 << 16  # bytes at the end of metrics.jsonl that hold its last lines


def rank_file(run: Path, rank: int) -> Path:
    """Where rank `rank` writes its sign of life."""
    return run / STATUS / f"rank-{rank}.json"


def stacks_file(run: Path, attempt: int, rank: int) -> Path:
    """Where rank `rank` writes the Python stacks of its threads if the run hangs."""
    return run / STATUS / f"stacks-{attempt}-rank-{rank}.txt"


def read_json_object(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None if there is none that can be read."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def read_json_lines(path: Path, last_bytes: int | None = None) -> list[dict[str, Any]]:
    """The objects in the lines of a file, without lines that cannot be read; [] if there is no such file.

    last_bytes: read only the end of the file, as for the last line of a long one.
    """
    try:
        with path.open("rb") as file:
            if last_bytes is not None:
                file.seek(max(0, path.stat().st_size - last_bytes))
            content = file.read()
    except OSError:
        return []
    found = []
    for line in content.splitlines():
        try:
            value = json.loads(line)
        except ValueError:  # cut by a kill, a full disk, or the beginning of `last_bytes`
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def append_json_lines(path: Path, values: Iterable[Mapping[str, Any]]) -> None:
    """Add lines to a file, each an object. Lines that several processes add at once do not mix. Raises OSError."""
    lines = "".join(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n" for value in values)
    with path.open("a+b", buffering=0) as file:
        cut = b""
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            cut = b"" if file.read(1) == b"\n" else b"\n"  # the last line was cut, by a full disk
        left = cut + lines.encode("utf-8", "backslashreplace")
        while left:  # a disk that becomes full takes a part without an error, and refuses the next
            left = left[file.write(left) :]


def last_logged_step(run: Path) -> int:
    """The step in the last line of metrics.jsonl that can be read; 0 before there is one."""
    steps = [line["step"] for line in read_json_lines(run / METRICS, TAIL) if isinstance(line.get("step"), int)]
    return steps[-1] if steps else 0
