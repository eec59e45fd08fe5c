"""Shards that version 0.1.0 wrote: read, checked, and recognised as a finished build."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from atr_scale.cli import app
from atr_scale.data import shard_builder
from atr_scale.data.decode import decode
from atr_scale.data.shard_builder import build_shards
from atr_scale.data.shard_check import check_shards
from atr_scale.data.shard_reader import open_shards
from tests.tiny import RATE, make_tiny_inputs

FIXTURE = Path(__file__).parents[1] / "fixtures" / "run_0_1"
CLIPS = 10


def test_they_pass_the_check() -> None:
    result = CliRunner().invoke(app, ["shards", "check", "--deep", str(FIXTURE / "shards")])
    assert result.exit_code == 0 and "no problems found" in result.output


def test_clips_and_captions_are_what_they_were() -> None:
    shards = open_shards(str(FIXTURE / "shards"))
    samples = [shards.read(i) for i in range(len(shards))]
    with np.load(FIXTURE / "expected.npz") as expected:
        assert [sample.clip_id for sample in samples] == expected["clip_ids"].tolist()
        assert [caption for sample in samples for caption in sample.captions] == expected["captions"].tolist()
    assert (shards.corpus, shards.split, len(shards.names)) == ("corpus", "", 2)


def test_they_are_the_finished_build_of_the_same_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new = make_tiny_inputs(tmp_path, CLIPS).shards
    ours, theirs = open_shards(str(new)), open_shards(str(FIXTURE / "shards"))
    assert ours.keys == theirs.keys
    for i in range(CLIPS):
        one, other = (decode(s.audio, s.extension, RATE) for s in (ours.read(i), theirs.read(i)))
        # Three steps of 16 bits: machines differ in the last digit of sin.
        np.testing.assert_allclose(one, other, atol=1e-4)
    shutil.copytree(FIXTURE / "shards", tmp_path / "old")
    monkeypatch.setattr(shard_builder, "write_shard", lambda task: pytest.fail("built again"))
    again = build_shards("folder", tmp_path / "corpus", tmp_path / "old", shard_size=5, sample_rate=RATE, workers=1)
    assert again == json.loads((FIXTURE / "shards" / "manifest.json").read_text())
    assert check_shards(str(tmp_path / "old")) == []
