"""The examples of docs/extending.md as a user has them: shards of a new corpus, a run of new parts, its use."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.integration.test_launchers import free_port
from tests.tiny import make_tiny_inputs, read_training, write_tiny_config

pytestmark = pytest.mark.slow
PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
MODULES = {
    "A loss": "my_losses",
    "A scorer": "my_scorer",
    "A pooling scorer": "my_pooling",
    "An audio encoder": "my_audio",
    "A text encoder": "my_text",
    "A corpus": "my_corpus",
    "A figure": "my_figure",
}
RATE = 16_000


def python(folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    search = [str(folder), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(search)
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_example_works_with_the_others(tmp_path: Path) -> None:
    sections = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)
    for title, module in MODULES.items():
        (section,) = (text for text in sections if text.startswith(f"{title}\n"))
        block = re.search(r"```python\n(.*?)```", section, re.DOTALL)
        assert block is not None, title
        (tmp_path / f"{module}.py").write_text(block[1])

    birds = [["robin", 1], ["wren", 2], ["finch", 3], ["owl", 4], ["crow", 5]]
    (tmp_path / "birds.json").write_text(json.dumps(birds))
    for number, (name, _) in enumerate(birds):
        tone = 0.3 * np.sin(2 * np.pi * (300 + 100 * number) * np.arange(RATE) / RATE)
        soundfile.write(tmp_path / f"{name}.wav", tone, RATE)
    build = "shards build birds --root . --out shards --sample-rate 16000 --plugins my_corpus min_votes=2"
    assert "4 clips" in python(tmp_path, "-m", "atr_scale.cli", *build.split())

    config = {
        "plugins": ["my_losses", "my_scorer", "my_pooling", "my_audio", "my_text"],
        "run": {"dir": "run"},
        "data": {"train": [{"shards": "shards"}], "crop_seconds": 1.0, "workers": 0},
        "model": {
            "audio": {"name": "frames", "width": 320},
            "text": {"name": "letters", "pooling": "mean"},
            "scorer": {"name": "distance", "options": {"power": 1}},
        },
        "objective": {"nt_xent": {"weight": 0.5}, "margin": {"weight": 0.5, "margin": 0.3}},
        "train": {"steps": 3, "global_batch_size": 4, "precision": "fp32", "log_every": 1},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    python(tmp_path, "-m", "atr_scale.train", "run.yaml")
    for line in read_training(tmp_path / "run"):
        assert line["loss"] == pytest.approx(0.5 * line["loss/nt_xent"] + 0.5 * line["loss/margin"], rel=1e-5)

    use = """
import atr_scale
model = atr_scale.load("run", plugins=["my_losses", "my_scorer", "my_pooling", "my_audio", "my_text"])
scores = model.similarity(["a wren sings", "an owl sings", "a crow sings"], ["owl.wav", "crow.wav"])
print(scores.shape, (scores <= 0).all())
"""
    assert python(tmp_path, "-c", use).strip() == "(3, 2) True"

    python(tmp_path, "my_figure.py", "run")
    assert (tmp_path / "run" / "temperature.png").stat().st_size > 1000


def launched(script: Path, config: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port()), **variables}
    command = ["bash", str(script), str(config)]
    return subprocess.run(command, cwd=PAGE.parents[1], env=environment, capture_output=True, text=True, timeout=300)


def test_the_launcher_starts_two_ranks_and_passes_on_a_failure(tmp_path: Path) -> None:
    section = PAGE.read_text().partition("\n## A launcher\n")[2]
    block = re.search(r"```bash\n(.*?)```", section, re.DOTALL)
    assert block is not None
    script = tmp_path / "two_ranks.sh"
    script.write_text(block[1])
    config = write_tiny_config(tmp_path / "run.yaml", make_tiny_inputs(tmp_path / "inputs"), tmp_path / "run", steps=2)
    done = launched(script, config)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line["step"] for line in read_training(tmp_path / "run")] == [1, 2]
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["world_size"] == 2
    assert launched(script, tmp_path / "missing.yaml").returncode == 2
