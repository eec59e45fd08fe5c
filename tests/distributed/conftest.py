"""What the tests on several ranks share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from atr_scale import score_block
from atr_scale.losses.tiled import tiles
from atr_scale.scorers import tiles as scorer_tiles
from tests.tiny_run import tiny_config

SIZES = ((score_block, "STRIPE_COLUMNS"), (tiles, "TILE_ROWS"), (scorer_tiles, "CPU_TEXTS_PER_TILE"))


@pytest.fixture(scope="module", autouse=True)
def own_sizes() -> Iterator[None]:
    """Puts back the sizes that a rank sets for itself, if this process is that rank."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name in SIZES:
            patch.setattr(module, name, getattr(module, name))
        yield


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
