"""What the tests on several ranks share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_run import tiny_config


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpus and text encoder of `tiny_config`, built once; read only."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_config(folder, folder / "run")
    return folder


@pytest.fixture(scope="session")
def example() -> str:
    """The folder of the plug-in with a loss."""
    return str(Path(__file__).parents[2] / "examples" / "sigmoid_loss")
