"""`atr-scale doctor` as people call it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def doctor(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "atr_scale.cli", "doctor", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_the_table_and_the_same_facts_as_json(tmp_path: Path) -> None:
    facts_file = tmp_path / "facts.json"
    quick = ("--seconds", 1, "--batch-size", 2, "--repeats", 1)
    done = doctor("--encoder", "tiny_htsat", *quick, "--json", facts_file)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    facts = json.loads(facts_file.read_text())
    lines = {line[:20].strip(): line[21:] for line in done.stdout.splitlines()}
    assert lines["encoder"] == facts["encoder"] == "tiny_htsat"
    assert lines["dim"] == str(facts["dim"])
    assert lines["sample rate"] == "32000 Hz" and facts["native_seconds"] == 10
    assert lines["tokens"] == "3.2 per second of audio, 32 per 10 s"
    measured = facts["measured"]
    assert measured["seconds"] == 1 and measured["batch_size"] == 2 and measured["forward"] > measured["training"] > 0
    assert f"{measured['forward']:.3g} clips/s" in lines["forward"]


def test_mistakes_are_one_line_and_exit_code_2(tmp_path: Path) -> None:
    for arguments, reason in (
        ((), "nothing to examine"),
        (("--checkpoint", tmp_path / "nowhere.pt"), "no checkpoint at"),
        (("--encoder", "mn04", "--checkpoint", tmp_path), "is a folder without"),
    ):
        done = doctor(*arguments)
        assert done.returncode == 2 and done.stdout == "", done.stderr
        assert reason in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.real_data
def test_original_weights_hear_a_clock(real_data: Path) -> None:
    done = doctor(
        "--checkpoint", next((real_data / "weights" / "efficientat_mn04_as").glob("*.pt")),
        "--audio", real_data / "esc50" / "audio" / "1-57163-A-38.flac",
        "--labels", real_data / "metadata" / "audioset" / "class_labels_indices.csv",
        "--seconds", 1, "--batch-size", 1, "--repeats", 1,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    tags = done.stdout.split("1-57163-A-38.flac\n")[1].splitlines()
    assert tags[0].endswith(" Tick-tock") and len(tags) == 5
