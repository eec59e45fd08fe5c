"""The rows that every benchmark prints: this project against an alternative, and the machine."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

HEAD = ("| | ours | other | other is | unit | ratio | target | met |", "|-|-|-|-|-|-|-|-|")


@dataclass(frozen=True)
class Row:
    """ours and other in `unit`; the ratio ours / other is to stay below `target` (or above it: at_least)."""

    name: str
    ours: float
    other: float
    other_name: str
    unit: str
    target: float | None = None
    at_least: bool = False

    @property
    def ratio(self) -> float:
        return self.ours / self.other if self.other else float("nan")

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        return self.ratio >= self.target if self.at_least else self.ratio <= self.target

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio, "met": self.met}

    @staticmethod
    def from_json(found: dict[str, Any]) -> Row:
        return Row(**{field.name: found[field.name] for field in fields(Row)})

    def as_markdown(self) -> str:
        relation = ">=" if self.at_least else "<="
        target = "" if self.target is None else f"{relation} {self.target:.3g}"
        met = {None: "", True: "yes", False: "no"}[self.met]
        cells = (self.name, f"{self.ours:.4g}", f"{self.other:.4g}", self.other_name, self.unit, f"{self.ratio:.3f}")
        return " | ".join(("", *cells, target, met, "")).strip()


def run(description: str, rows: Callable[[], Iterable[Row]], arguments: Sequence[str] | None = None) -> None:
    """A benchmark's command: prints every row as soon as it is measured, with --json writes them to a file."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args(arguments)
    print(machine(), "", *HEAD, sep="\n")
    found = []
    for row in rows():
        print(row.as_markdown(), flush=True)
        found.append(row.as_json())
    if given.json:
        given.json.write_text(json.dumps({"machine": machine(), "rows": found}, indent=1) + "\n", encoding="utf-8")


def machine() -> str:
    """Processor or GPU, threads and versions, in one line."""
    if torch.cuda.is_available():
        place = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo")
        names = [line.split(":", 1)[1].strip() for line in _lines(info) if line.startswith("model name")]
        place = f"{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} cores"
    return f"{place}; {torch.get_num_threads()} threads; Python {platform.python_version()}, torch {version('torch')}"


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []
