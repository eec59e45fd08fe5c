"""Moments of real recordings: scenes of a benchmark beside the real data, whose events.json tells their times."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from atr_scale.cli import app
from tests.tiny_run import save_run, tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.real_data]
PAGE = Path(__file__).parents[2] / "docs" / "search.md"


def test_scenes_become_a_file_of_moments_and_are_measured(
    real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = real_data.parent / "real_benchmark" / "make.py"
    if not make.is_file():
        pytest.skip(f"no {make}")
    scenes = tmp_path / "scenes"
    subprocess.run([sys.executable, make, "scenes", scenes, "--train", "0", "--test", "6"], check=True, timeout=120)
    [lines] = re.findall(r"^    import json\n(?:    .*\n|\n)+", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    monkeypatch.chdir(scenes)
    exec(re.sub("^    ", "", lines, flags=re.MULTILINE), {})  # what the page says

    run = save_run(tiny_config(tmp_path, tmp_path / "unused"), tmp_path / "run", seed=0, scorer="tap")
    (run / "checkpoints/step-3/state.json").write_text('{"step": 3}')
    result = CliRunner().invoke(app, ["evaluate", str(run), "--moments", "scenes.jsonl", "--audio", "audio"])
    assert result.exit_code == 0, result.output
    table = json.loads((run / "moments-scenes.json").read_text())
    assert table["counts"] == {"clips": 6, "queries": 18, "left_out": 0}
    for line in (run / "moments-scenes.jsonl").read_text().splitlines():
        found = json.loads(line)
        [(start, stop)] = found["relevant_windows"]
        assert start >= 0 and 2 <= stop - start <= 4 and stop <= 10
        assert all(0 <= first < last <= 10 for first, last, _ in found["pred_relevant_windows"])
