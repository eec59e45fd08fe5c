"""Shared options and fixtures."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--real-data", default=None, help="folder with real audio, captions and weights")


# Files whose tests measure the memory of a process, or start services with fixed resources (a SLURM cluster, a
# browser): they share one group, so no two of them run side by side.
ALONE = ("test_soak", "test_slurm", "test_tensorboard_page")


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in its own hook
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        name = "alone" if item.path.stem in ALONE else str(item.path.relative_to(config.rootpath))
        item.add_marker(pytest.mark.xdist_group(name))  # a file's tests run in one worker and share its fixtures
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
