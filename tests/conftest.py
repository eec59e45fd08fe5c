"""Shared options and fixtures."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

# A shell that starts the tests in the background has them ignore Ctrl-C, which all their processes would inherit.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--real-data", default=None, help="folder with real audio, captions and weights")


# Files whose tests measure the memory of a process, or start services with fixed resources (a SLURM cluster, a
# browser): one worker runs them one after another.
ALONE = ("test_soak", "test_slurm", "test_rehearsal", "test_tensorboard_page")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """The tests of a file run in one worker and share its fixtures."""
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):  # type: ignore[misc]  # pytest-xdist has no types
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return "alone" if Path(file).stem in ALONE else file

    return Files(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--real-data"):
        return
    skip = pytest.mark.skip(reason="needs --real-data=DIR")
    for item in items:
        if "real_data" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def real_data(request: pytest.FixtureRequest) -> Path:
    """The folder given with --real-data."""
    return Path(request.config.getoption("--real-data")).resolve()


@pytest.fixture(scope="session")
def golden() -> Path:
    """Reference outputs of the original encoders."""
    return Path(__file__).parent / "golden"
