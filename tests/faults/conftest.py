"""Faults that are injected into real processes. Each test is a row of docs/reliability.md.

    @pytest.mark.fault("a rank is stopped (SIGSTOP)", expected="every rank ends within 60 s; the launcher restarts")
    def test_a_stopped_rank(outcome):
        ...
        outcome(f"rc 1 after {seconds:.0f} s, rank 1 named")

`pytest tests/faults --write-reliability` writes what was seen into the page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.page import write_page
from tests.faults.runs import TinyRuns, tiny_runs


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-reliability", action="store_true", help="write docs/reliability.md from what is seen")


class Seen:
    """What the tests of faults that have passed in this session have seen."""

    def __init__(self) -> None:
        self.reports: dict[str, list[tuple[str, str, float]]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        outcomes = [str(value) for name, value in report.user_properties if name == "outcome"]
        if report.when == "call" and report.passed and outcomes:
            test, _, case = report.nodeid.removesuffix("]").rpartition("/")[2].partition("[")
            self.reports.setdefault(test, []).append((case, "; ".join(outcomes), report.duration))

    def pytest_sessionfinish(self) -> None:
        write_page(self.reports)


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--write-reliability") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Seen())


@pytest.fixture
def outcome(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Records what a test of a fault has seen, in a few words."""
    marker = request.node.get_closest_marker("fault")
    assert marker is not None, "a test in tests/faults has the marker fault(row, expected=...)"
    return lambda seen: record_property("outcome", seen)


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards and a text encoder that no test changes."""
    return tmp_path_factory.mktemp("inputs")


@pytest.fixture
def runs(tmp_path: Path, inputs: Path) -> Iterator[TinyRuns]:
    """Trainings as processes, on inputs that all tests share."""
    with tiny_runs(tmp_path, inputs) as started:
        yield started
