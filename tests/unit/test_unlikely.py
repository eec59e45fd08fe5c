"""Values that hardly anybody means are said at the start."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from atr_scale.data.shard_reader import open_shards
from atr_scale.distributed.world import World
from atr_scale.training.parts import open_parts
from atr_scale.training.unlikely import unlikely_values
from tests.tiny_run import tiny_config


def test_each_has_its_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = tiny_config(tmp_path, tmp_path / "run")
    shards = open_shards(config.data.train[0].shards)
    assert not list(unlikely_values(config, [shards], 16_000))

    low = replace(shards, manifest={**shards.manifest, "sample_rate": 8000})
    (line,) = unlikely_values(config, [shards, low], 32_000 if shards.manifest["sample_rate"] >= 32_000 else 16_000)
    assert line.startswith("data.train[1] ") and "above 4000 Hz there is silence" in line

    config.train.global_batch_size = 1
    assert [line.partition(":")[0] for line in unlikely_values(config, [shards], 16_000)] == [
        "train.global_batch_size = 1"
    ]
    config.train.global_batch_size = 4096
    open_parts(config, World())
    assert "train.global_batch_size = 4096 is more than the 40 clips of data.train" in caplog.text
