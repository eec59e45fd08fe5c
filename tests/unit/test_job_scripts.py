"""What a job script makes of signals, sick nodes and a busy SLURM, whose programs are replaced here."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = {
    "srun": """while [[ $1 == -* ]]; do shift; done; exec "$@" """,
    "squeue": """[[ -e asked || -z ${BUSY:-} ]] || { touch asked; echo timed out >&2; exit 1; }; echo RUNNING""",
    "scontrol": """case $1 in
        show) printf '%s\\n' $SLURM_JOB_NODELIST ;;
        *) echo "$*" >>calls; [[ $1 != requeue || -z ${REFUSED:-} ]] || { echo disabled >&2; exit 1; } ;;
    esac""",
    "sinfo": """printf '%s\\n' $NODES""",
    "sleep": ":",
    "python": """case $2 in
        atr_scale.node_health) eval "${CHECK:-}"; for node in ${HEALTHY:-}; do echo "$node is healthy"; done ;;
        atr_scale.job_inputs) [[ $3 == stage ]] || { echo 'a run'; exit; }; eval "${COPY:-}"; echo data=there ;;
        atr_scale.train) echo "trains $*" >>calls; eval "${TRAIN:-}" ;;
    esac""",
}
TOLD = "kill -USR1 $(cat script); "  # the script is told to stop


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm")
    for name, text in PROGRAMS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    return tmp_path


def job(folder: Path, **variables: str) -> tuple[int, str, list[str]]:
    """The exit code of a job of two nodes, the last line of its log, and what it has asked SLURM and the ranks."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")} | {
        "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(folder),
        "SLURM_JOB_NODELIST": "n1 n2", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_JOB_PARTITION": "main", "NODES": "n1 n2 n3 n4", "HEALTHY": "n1 n2",
    }  # fmt: skip
    script = "echo $$ >script; exec bash slurm/train.sh config.yaml"
    result = subprocess.run(
        ["bash", "-c", script], cwd=folder, env=environment | variables, capture_output=True, text=True, timeout=60
    )
    calls = folder / "calls"
    lines = (result.stderr + result.stdout).splitlines()
    return result.returncode, lines[-1], calls.read_text().splitlines() if calls.exists() else []


EARLY = "told to stop, and nothing was saved: requeued (1 of at most 100)"


@pytest.mark.parametrize("when", ["CHECK", "COPY"])
def test_a_signal_before_the_ranks_start(folder: Path, when: str) -> None:
    code, last, calls = job(folder, STAGE=str(folder), **{when: TOLD})
    assert code == 1 and EARLY in last and calls == ["requeue 7"], "they would train until the time limit kills them"


def test_a_signal_while_the_ranks_start(folder: Path) -> None:
    """They are ended by it, which is no failure. Without a signal it is one."""
    assert EARLY in job(folder, TRAIN=TOLD + "kill -USR2 $$")[1]
    shutil.rmtree(folder / "a run")
    last = job(folder, TRAIN="kill -USR2 $$")[1]
    assert "training failed with exit code 140: requeued (1 of at most 2)" in last


def test_a_busy_slurm(folder: Path) -> None:
    _, last, calls = job(folder, TRAIN="exit 1", BUSY="yes")
    assert "requeued (1 of at most 2)" in last and calls[-1] == "requeue 7"
    code, last, calls = job(folder, TRAIN="exit 1", REFUSED="yes")
    assert code == 1 and "SLURM does not requeue it, see the error above" in last and calls[-1] == "requeue 7"


def test_sick_nodes_are_left_out_if_enough_others_are_there(folder: Path) -> None:
    update = "update JobId=7 ExcNodeList="
    _, last, calls = job(folder, HEALTHY="n2")
    assert "the health check failed on n1: requeued" in last and calls == ["requeue 7", f"{update}n1"]
    (folder / "calls").unlink()
    _, last, calls = job(folder, HEALTHY="", NODES="n1 n2 n3")
    assert "failed on n1 n2, and too few other nodes are there: requeued" in last and calls == ["requeue 7"]


def test_a_limit_that_is_no_number(folder: Path) -> None:
    code, last, calls = job(folder, MAX_REQUEUES="many")
    assert (code, last, calls) == (
        2,
        "error: MAX_REQUEUES=many: give a number, in the environment or in slurm/site.sh",
        [],
    )


def test_a_run_folder_with_a_space_and_a_job_that_is_done(folder: Path) -> None:
    code, last, calls = job(folder)
    assert code == 0 and last.endswith("done: training in a run") and calls == ["trains -m atr_scale.train config.yaml"]
