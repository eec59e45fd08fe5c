"""Real recordings with LAION audio-dataset sidecars, packed unchanged, can be trained on."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from atr_scale.batch import caption_id
from atr_scale.cli import app
from atr_scale.data.shard_reader import open_shards
from tests.tiny_run import tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.real_data]
CLIPS = 60


def test_sidecars_train_as_they_are(real_data: Path, tmp_path: Path) -> None:
    """Every sample has its own sidecar's text and tag, and a run on them learns something."""
    audio = real_data / "esc50_fold1_hq" / "audio"
    shards = tmp_path / "esc50" / "train"
    shards.mkdir(parents=True)
    sidecars = sorted(audio.glob("*.json"))[:CLIPS]
    for number in range(3):
        with tarfile.open(shards / f"{number}.tar", "w") as tar:
            for sidecar in sidecars[number::3]:
                for path in (sidecar, sidecar.with_suffix(".ogg")):
                    tar.add(path, arcname=path.name)
    opened = open_shards(str(shards))
    assert len(opened) == CLIPS
    for index in range(0, CLIPS, 7):
        sample = opened.read(index)
        wanted = json.loads((audio / f"{sample.key}.json").read_text())
        assert (sample.captions, sample.label) == (wanted["text"], wanted["tag"][0])
        assert sample.audio == (audio / f"{sample.key}.ogg").read_bytes()
    assert len({caption_id(opened.read(index).captions[0]) for index in range(CLIPS)}) > 5

    config = tiny_config(tmp_path / "tiny", tmp_path / "run", steps=8)
    config.data.train[0].shards = config.data.validation = str(shards)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    app(["train", str(tmp_path / "config.yaml")], standalone_mode=False)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert len(losses) == 8 and losses[-1] < losses[0]
    assert "zero_shot/accuracy" in lines[-1]  # the tags are labels
    assert not any(key.startswith("dropped/") for line in lines for key in line)
