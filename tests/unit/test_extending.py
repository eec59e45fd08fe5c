"""What docs/extending.md shows, where a whole run on one CPU (tests/integration/test_extending.py) does not look."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from atr_scale.config import load_config
from atr_scale.encoders import AUDIO_ENCODERS, build_audio_encoder
from atr_scale.losses import LOSS_TERMS, build_objective

ROOT = Path(__file__).parents[2]


def section(title: str) -> str:
    parts = re.split(r"^## ", (ROOT / "docs" / "extending.md").read_text(), flags=re.MULTILINE)
    (found,) = (part for part in parts if part.startswith(f"{title}\n"))
    return found


def example(title: str) -> str:
    block = re.search(r"```python\n(.*?)```", section(title), re.DOTALL)
    assert block is not None, title
    return block[1]


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The page's loss and audio encoder as modules, which are gone again after the test."""
    tables: list[dict[str, Any]] = [LOSS_TERMS, AUDIO_ENCODERS]
    before = [dict(table) for table in tables]
    (tmp_path / "my_losses.py").write_text(example("A loss"))
    (tmp_path / "my_audio.py").write_text(example("An audio encoder"))
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)
    for name in ("my_losses", "my_audio"):
        sys.modules.pop(name, None)


def test_the_command_trains_with_the_new_loss_alone() -> None:
    shown = re.search(r"^ {4}PYTHONPATH=.*\\\n.*$", section("A loss"), re.MULTILINE)
    assert shown is not None
    words = shlex.split(shown[0].replace("\\\n", " "))
    assert words[1:3] == ["atr-scale", "train"]
    config = load_config(ROOT / words[3], words[4:])
    assert list(build_objective(config.objective.terms).terms) == ["margin"]
    assert config.train.steps == 10 and config.run.dir == "runs/margin"


def test_the_audio_encoder_stays_on_the_device_of_its_input() -> None:
    __import__("my_audio")
    encoder = build_audio_encoder("frames", width=320).to("meta")
    encoded = encoder.encode(torch.zeros(2, 1600, device="meta"))
    assert {tensor.device.type for tensor in encoded} == {"meta"}
