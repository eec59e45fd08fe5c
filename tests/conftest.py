"""Shared options and fixtures."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--real-data", default=None, help="folder with real audio, captions and weights")


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
