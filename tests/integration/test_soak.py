"""A long run stays as large as it was at its start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import read_training
from tests.tiny_run import tiny_config

pytestmark = pytest.mark.slow
STEPS, SETTLED = 2000, 500
MOST_MIB = 8.0  # a leak of 6 KB a step is more


@pytest.mark.timeout(900)
def test_memory_of_2000_steps(tmp_path: Path) -> None:
    """Peak memory of the training process with a reading worker, in chunks, from the first checkpoint on.

    Without validation, whose pictures are garbage in cycles that Python collects when it sees fit.
    """
    train = {"steps": STEPS, "log_every": 50, "checkpoint_every": SETTLED, "zero_stage": 1, "micro_batch_size": 6}
    config = tiny_config(tmp_path, tmp_path / "run", **train)
    config.data.workers, config.data.validation = 1, None
    path = tmp_path / "soak.yaml"
    path.write_text(config.to_yaml())
    command = [sys.executable, "-m", "atr_scale.train", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    lines = read_training(tmp_path / "run")
    assert lines[-1]["step"] == STEPS
    mib = {int(line["step"]): line["memory_gb"] * 1e9 / 2**20 for line in lines}
    settled = mib[SETTLED + 50]
    print(json.dumps({"settled_mib": round(settled, 1), "end_mib": round(mib[STEPS], 1)}))
    assert mib[STEPS] - settled < MOST_MIB, mib
