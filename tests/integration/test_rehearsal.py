"""Eight faults on a cluster in a box, against an undisturbed run, as `python -m tools.rehearse` does it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.rehearse.__main__ import PLACES, rehearse
from tools.rehearse.box import no_box

pytestmark = pytest.mark.slow
# Of those that start the job anew, the quickest.
KINDS = (
    "rank killed",
    "job signalled",
    "network cut",
    "S3 refuses",
    "S3 answers 503",
    "S3 stalls",
    "S3 resets",
    "disk full",
)


def test_eight_faults(tmp_path: Path) -> None:
    if reason := no_box():
        pytest.skip(reason)
    page = tmp_path / "report.md"
    checks = rehearse(1, len(KINDS), [page], PLACES[0], KINDS)
    assert all(check.holds for check in checks), checks
    rows = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    assert sum("| yes |" in row for row in rows) == len(checks)
    assert all(sum(row.startswith(f"| {number} | ") for row in rows) == 1 for number in range(1, len(KINDS) + 1))
    assert (tmp_path / "figures" / "rehearsal.png").stat().st_size > 10_000
