"""tools.gpu_check on a CPU: every row passes or says why it was skipped, and a part that dies is a row."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.commands import ROOT
from tests.gpu_check import CHOSEN
from tools.gpu_check.__main__ import PARTS
from tools.gpu_check.page import write_report
from tools.gpu_check.rows import Case, Row, read_lines
from tools.gpu_check.runner import Part, Setting, run_parts

pytestmark = pytest.mark.slow

KEYS = (
    "part", "name", "ms", "tflops", "gb_per_s", "share", "launches", "syncs", "peak_mib", "reference", "error", "pass",
    "skipped",
)  # fmt: skip
CEILINGS = (
    "copy", "gemm bf16", "gemm tf32", "gemm fp32", "gemm fp64", "host to device pinned", "host to device pageable",
    "launch", "nccl start",
)  # fmt: skip


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole quick run."""
    folder = tmp_path_factory.mktemp("gpu_check")
    command = [sys.executable, "-m", "tools.gpu_check", "--device", "cpu", "--quick", "--out", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


def test_every_row_passes_or_says_why_not(out: Path) -> None:
    report = json.loads((out / "gpu_check.json").read_text())
    assert report["device"] == "cpu" and report["torch"]
    rows: list[dict[str, Any]] = report["rows"]
    assert all(set(KEYS) <= set(row) for row in rows)
    assert [row["name"] for row in rows if row["part"] == "ceilings"] == list(CEILINGS)
    assert {row["part"] for row in rows} == {part.name for part in PARTS if part.quick}
    failed = [row for row in rows if not row["pass"] and not row["skipped"]]
    assert not failed, failed
    for part in {row["part"] for row in rows}:
        assert any(row["pass"] for row in rows if row["part"] == part), f"{part} has only skipped rows"


def test_the_page_shows_every_row(out: Path) -> None:
    page = (out / "gpu_check.md").read_text()
    for row in read_lines(out / "gpu_check.jsonl"):
        assert f"| {row.name.replace('|', '/')} |" in page, row
    assert "(gpu_check.png)" in page and (out / "gpu_check.png").stat().st_size > 1000


def test_what_only_a_gpu_takes_runs_on_cuda_tensors_without_values(tmp_path: Path) -> None:
    """A row may have a wrong value, but none dies: no tensor of the host meets one of the device."""
    file = tmp_path / "rows.json"
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu_check", str(file)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(file.read_text())
    if "skipped" in found:
        pytest.skip(found["skipped"])
    died = [row for row in found["rows"] if isinstance(row["error"], str)]
    assert not died and not found["mixed"], (died, found["mixed"])
    reached = {row["part"] for row in found["rows"] if not row["skipped"]}
    assert reached == set(CHOSEN)
    speed = [row for row in found["rows"] if row["part"].endswith("_speed") and not row["skipped"]]
    assert all(row["ms"] and row["launches"] and row["syncs"] == 0 for row in speed)


def cases(setting: Setting, fault: str) -> Iterator[Case]:
    """A part with one good row and one fault."""
    yield "good", lambda: Row(ms=1.0)
    if fault == "raises":
        yield "bad", lambda: Row(ms=1 / 0)
        yield "later", lambda: Row(ms=2.0)
        raise ValueError("between two cases")
    if fault == "crashes":
        os.kill(os.getpid(), signal.SIGSEGV)
    if fault == "hangs":
        subprocess.Popen(["sleep", "60"])
        time.sleep(60)
    if fault == "lacks":
        import no_such_package  # noqa: F401
    yield "end", lambda: Row(ms=3.0)


FAULTS: dict[str, tuple[str, str, str]] = {  # fault -> name of its row, its state, what it says
    "raises": ("all", "failed", "ValueError: between two cases"),
    "crashes": ("process", "failed", "SIGSEGV"),
    "hangs": ("time", "failed", "killed after its 5 s"),
    "lacks": ("all", "skipped", "needs the package no_such_package"),
}


def test_a_part_that_dies_is_a_row_and_ends_no_other(tmp_path: Path) -> None:
    lines = tmp_path / "lines"
    parts = [Part(fault, __name__, 0.5 if fault == "hangs" else 60, (fault,)) for fault in FAULTS]
    rows = run_parts([*parts, Part("last", __name__, 60, ("none",))], Setting("cpu", True), lines)
    for fault, (name, state, says) in FAULTS.items():
        own = [row for row in rows if row.part == fault]
        assert own[0] == Row(fault, "good", ms=1.0), "rows before the fault stay"
        last = own[-1]
        assert (last.name, last.passed) == (name, False if state == "failed" else None), last
        assert says in str(last.error if state == "failed" else last.skipped)
    raised = {row.name: row for row in rows if row.part == "raises"}
    assert str(raised["bad"].error).startswith("ZeroDivisionError") and raised["later"].passed
    assert [row.name for row in rows if row.part == "last"] == ["good", "end"]
    write_report(lines, tmp_path, quick=True)
    assert "- crashes: process: its process ended with SIGSEGV" in (tmp_path / "gpu_check.md").read_text()


def test_no_part_starts_after_the_time_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.gpu_check.runner.TOTAL_S", 0.0)
    (row,) = run_parts([Part("late", __name__, 60, ("none",))], Setting("cpu", True), tmp_path / "lines")
    assert row.passed is None and "whole run" in str(row.skipped)
