"""docs/reliability.md: a table for each file of tests/faults, a row for each of its tests of a fault.

Outcome and seconds of a row are from the last time its test was run with --write-reliability.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "reliability.md"
HEAD = """# What happens when something fails

Every row is a test that injects the fault into real processes and sees the outcome. The tests have written this page:
`pytest tests/faults --write-reliability` runs them and writes what they have seen; rows of tests that were not run
stay. Seconds are those of the test on two CPU cores, with the start of its processes. What to do after a fault is in
[operations.md](operations.md); many random faults in one run: [rehearsal.md](rehearsal.md).
"""
COLUMNS = ("fault", "expected", "outcome", "seconds", "test")
CELLS = re.compile(r"(?<!\\) ?\| ?")
LINK = re.compile(r"\[(\w+)\]\(\.\./tests/faults/(\w+\.py)\)")


@dataclass(frozen=True)
class Marked:
    """A test with the marker fault: its file and name, and what the marker says."""

    file: str
    test: str
    fault: str
    expected: str


@dataclass(frozen=True)
class Seen:
    """What a test has seen, and how many seconds it took."""

    outcome: str
    seconds: float


def marked_tests() -> list[Marked]:
    """All tests of faults, by file and then in the order in which they are written. Reads their sources."""
    found = []
    for path in sorted(HERE.glob("test_*.py")):
        for function in _tree(path).body:
            if isinstance(function, ast.FunctionDef):
                for fault, expected in _marks(function):
                    found.append(Marked(path.name, function.name, fault, expected))
    return found


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _marks(function: ast.FunctionDef) -> Iterable[tuple[str, str]]:
    """(row, expected) of the markers on a test."""
    for call in function.decorator_list:
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.mark.fault":
            yield ast.literal_eval(call.args[0]), ast.literal_eval(call.keywords[0].value)


def read_page(text: str) -> dict[Marked, Seen]:
    """The rows of a page."""
    found = {}
    for line in text.splitlines():
        if line.startswith("| ") and (link := LINK.search(line)):
            fault, expected, outcome, seconds = (cell.replace("\\|", "|") for cell in CELLS.split(line)[1:5])
            found[Marked(link[2], link[1], fault, expected)] = Seen(outcome, float(seconds))
    return found


def page(seen: Mapping[Marked, Seen]) -> str:
    """The page of the tests that there are and that have been run."""
    parts, file = [HEAD], None
    for row in marked_tests():
        if row not in seen:
            continue
        if row.file != file:
            file = row.file
            title = (ast.get_docstring(_tree(HERE / file)) or file).splitlines()[0].rstrip(".")
            parts.append(f"\n## {title}\n\n| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n")
        cells = [_cell(text) for text in (row.fault, row.expected, seen[row].outcome, f"{seen[row].seconds:.0f}")]
        parts.append(f"| {' | '.join(cells)} | [{row.test}](../tests/faults/{file}) |\n")
    return "".join(parts)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def write_page(reports: Mapping[str, list[tuple[str, str, float]]]) -> None:
    """Write what was seen into the page. reports: by "FILE::TEST", (case, outcome, seconds) of each of its cases."""
    rows = read_page(PAGE.read_text(encoding="utf-8")) if PAGE.exists() else {}
    for row in marked_tests():
        if cases := reports.get(f"{row.file}::{row.test}"):
            same = len({outcome for _, outcome, _ in cases}) == 1
            texts = [cases[0][1]] if same else [f"{case}: {outcome}" for case, outcome, _ in cases]
            rows[row] = Seen("; ".join(texts), sum(seconds for *_, seconds in cases))
    PAGE.write_text(page(rows), encoding="utf-8")
