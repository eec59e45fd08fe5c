"""The rows of a report: one for each case that was checked or measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

Case = tuple[str, Callable[[], "Row"]]  # the name of a row, and the function that finds it

OWN = ("atr_scale", "tools", "tests")  # packages that are always here


class Skip(Exception):
    """A case cannot run here; the message says why."""


@dataclass(frozen=True)
class Row:
    """One case. What was not measured is None.

    ms: median time, by CUDA events on fresh data; process CPU time on a CPU. tflops: TFLOP/s. share: of the ceiling of
    the same kind of product, or of copies, in the same run. launches: operations put on the device. syncs: waits for
    the device. peak_mib: most memory beside the inputs. reference: name -> ms of what is compared with. error: largest
    relative error against the reference, to be at most `bound`; of a case that died, what it died of. passed: None
    for a skipped case. skipped: why.
    """

    part: str = ""
    name: str = ""
    ms: float | None = None
    tflops: float | None = None
    gb_per_s: float | None = None
    share: float | None = None
    launches: int | None = None
    syncs: int | None = None
    peak_mib: float | None = None
    reference: dict[str, float] = field(default_factory=dict)
    error: float | str | None = None
    bound: float | None = None
    passed: bool | None = True
    skipped: str | None = None
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        found = asdict(self)
        found["pass"] = found.pop("passed")
        return found

    @staticmethod
    def from_json(found: dict[str, Any]) -> Row:
        known = {f.name for f in fields(Row)}
        return Row(passed=found["pass"], **{name: value for name, value in found.items() if name in known})

    def as_text(self) -> str:
        """One line for the terminal."""
        if self.skipped is not None:
            return f"skipped  {self.part}: {self.name} ({self.skipped})"
        measured = [
            f"{value:.4g} {unit}"
            for value, unit in (
                (self.ms, "ms"),
                (self.tflops, "TFLOP/s"),
                (self.gb_per_s, "GB/s"),
                (self.peak_mib, "MiB"),
                (self.syncs, "syncs"),
            )
            if value is not None
        ]
        if self.error is not None:
            measured.append(f"error {self.error if isinstance(self.error, str) else format(self.error, '.2g')}")
        return f"{'passed ' if self.passed else 'FAILED '}  {self.part}: {self.name}: {', '.join(measured)}"


def compared(error: float, bound: float, **measured: Any) -> Row:
    """A row that passes if `error` is at most `bound`; no number fails."""
    return Row(error=error, bound=bound, passed=error <= bound, **measured)


def run_case(part: str, case: Case) -> Row:
    """The row of a case, whatever happens in it."""
    name, function = case
    try:
        row = function()
    except Exception as error:
        row = ended_by(error)
    return replace(row, part=part, name=name)


def ended_by(error: Exception) -> Row:
    """A row that says why a case was skipped, or what it died of: first line of the message, and innermost place."""
    if isinstance(error, Skip):
        return Row(skipped=str(error), passed=None)
    if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] not in OWN:
        return Row(skipped=f"needs the package {error.name}", passed=None)
    place, trace = "", error.__traceback__
    while trace is not None:
        place, trace = f" at {Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}", trace.tb_next
    lines = str(error).strip().splitlines() or [""]
    return Row(error=f"{type(error).__name__}: {lines[0]}{place}"[:400], passed=False)


def read_lines(path: Path) -> list[Row]:
    """The rows of a file with one JSON object in each line."""
    return (
        [Row.from_json(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
        if path.exists()
        else []
    )
