"""Runs parts, each in a process of its own: a crash, a hang or an out-of-memory of one is a row and ends no other."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from tools.gpu_check.rows import Row, ended_by, read_lines, run_case

TOTAL_S = 470.0  # of all parts
ON_A_CPU = 10.0  # times as long: in CI many tests share the processor
PRELOADED = ["tools.gpu_check.measure"]  # with torch behind it: imported once for all parts


@dataclass(frozen=True)
class Setting:
    """What a run is: the device, whether it is small, and the ceilings that were measured first (name -> row)."""

    device: str
    quick: bool = False
    ceilings: dict[str, Row] = field(default_factory=dict)

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"


@dataclass(frozen=True)
class Part:
    """A function `cases(setting, *arguments)` of `module`, which is imported in the part's own process.

    budget: seconds on a GPU after which the process is killed. quick: whether a quick run has it too.
    """

    name: str
    module: str
    budget: float
    arguments: tuple[Any, ...] = ()
    quick: bool = True


def run_parts(parts: Sequence[Part], setting: Setting, lines: Path) -> list[Row]:
    """All rows of all parts; each is appended to the file `lines` as soon as it is found."""
    slower = 1.0 if setting.cuda else ON_A_CPU
    end = time.monotonic() + slower * TOTAL_S
    for part in parts:
        known = read_lines(lines)
        ceilings = {row.name: row for row in known if row.part == "ceilings"}
        left = end - time.monotonic()
        if left <= 0:
            _append(
                lines,
                Row(part.name, "all", skipped=f"the {slower * TOTAL_S:.0f} s of the whole run are over", passed=None),
            )
            continue
        _run(replace(part, budget=min(slower * part.budget, left)), replace(setting, ceilings=ceilings), lines)
    return read_lines(lines)


def _run(part: Part, setting: Setting, lines: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_child, args=(part, setting, lines))
    process.start()
    process.join(part.budget)
    if process.is_alive():
        _kill(process)
        _append(lines, Row(part.name, "time", error=f"killed after its {part.budget:.0f} s", passed=False))
    elif process.exitcode:
        _kill(process)
        code = process.exitcode
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        _append(lines, Row(part.name, "process", error=f"its process ended with {how}", passed=False))


def _kill(process: ForkServerProcess) -> None:
    """End a part and the processes that it has started."""
    assert process.pid is not None
    with suppress(ProcessLookupError):  # it has not come to its first line, or nothing of it is left
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def _child(part: Part, setting: Setting, lines: Path) -> None:
    os.setsid()
    try:
        for case in importlib.import_module(part.module).cases(setting, *part.arguments):
            _append(lines, run_case(part.name, case))
    except Exception as error:
        _append(lines, replace(ended_by(error), part=part.name, name="all"))


def _append(lines: Path, row: Row) -> None:
    print(row.as_text(), flush=True)
    with open(lines, "a", encoding="utf-8") as file:
        file.write(json.dumps(row.as_json()) + "\n")
