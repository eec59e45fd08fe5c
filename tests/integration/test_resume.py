"""Runs that end in the middle: killed, told to stop, damaged; resumed, they equal an uninterrupted run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_run import tiny_config

pytestmark = pytest.mark.slow
STEPS = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs of the runs; the text encoder has dropout, whose draws a resume must repeat."""
    folder = tmp_path_factory.mktemp("resume")
    tiny_config(folder, folder)
    path = folder / "train" / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_dropout_prob": 0.2}))
    return folder


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> list[dict[str, Any]]:
    """The training lines of a run on two ranks that nothing disturbed."""
    run = folder / "uninterrupted"
    process = start(folder, run)
    _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said[-3000:]
    assert (
        "10 optimizer steps, 3 of them warm-up, then cosine to step 8, then flat for 2; an epoch of clips is 3.3 steps"
        in said
    )
    assert (
        "visits: 120, on average 3.0 to each of 40 clips and 3.0 to each of 40 captions; an epoch of clips is 40 visits"
        in said
    )
    return lines(run)


def start(folder: Path, run: Path, ranks: int = 2, **train: Any) -> subprocess.Popen[str]:
    schedule = {"warmup_steps": None, "warmup_epochs": 0.9, "decay_steps": 8}  # 3 steps, then down to step 8, then flat
    config = tiny_config(folder, run, **{"steps": STEPS, "checkpoint_every": 3, "zero_stage": 2, **schedule, **train})
    path = folder / f"{run.name}.yaml"
    path.write_text(config.to_yaml())
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.Popen(
        [*launcher, "-m", "atr_scale.train", str(path)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def output(process: subprocess.Popen[str]) -> str:
    return process.stderr.read()[-3000:] if process.stderr else ""


def lines(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    """Until `step` is logged."""
    end = time.monotonic() + 180
    while not any(line["step"] >= step for line in lines(run)):
        assert process.poll() is None and time.monotonic() < end, output(process)
        time.sleep(0.02)


def assert_equal_runs(run: Path, expected: list[dict[str, Any]]) -> None:
    """The same losses, gradient norms and temperatures at every step, to the last bit, and the same evaluations."""
    exact = ("loss", "grad_norm", "temperature", "lr/audio", "samples_seen", "t2a/mAP@10", "a2t/R@1")
    found = lines(run)
    assert [(x["kind"], x["step"]) for x in found] == [(x["kind"], x["step"]) for x in expected]
    for got, wanted in zip(found, expected, strict=True):
        assert {k: got.get(k) for k in exact} == {k: wanted.get(k) for k in exact}


def test_killed_twice_and_resumed(folder: Path, uninterrupted: list[dict[str, Any]]) -> None:
    """kill -9 of all processes at two places, in the middle of an epoch."""
    run = folder / "killed"
    for step in (5, 8):
        process = start(folder, run)
        wait_for_step(process, run, step)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    process = start(folder, run)
    assert process.wait(timeout=240) == 0, output(process)
    assert_equal_runs(run, uninterrupted)


def test_a_killed_rank_ends_the_others(folder: Path, uninterrupted: list[dict[str, Any]]) -> None:
    """The peers do not hang; a broken newest checkpoint is passed over for the one before it, by name."""
    run = folder / "one-killed"
    process = start(folder, run)
    wait_for_step(process, run, 7)  # it is logged when step 8 has begun
    ranks = subprocess.run(
        ["pgrep", "-P", str(process.pid), "-f", "atr_scale.train"], capture_output=True, text=True
    ).stdout.split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    assert process.wait(timeout=240) != 0

    newest = (run / "latest").resolve()
    assert newest.name == "step-6"
    weights = bytearray((newest / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (newest / "model.safetensors").write_bytes(weights)
    process = start(folder, run)
    _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said[-3000:]
    assert "step-6 is broken (model.safetensors has another checksum)" in said
    assert_equal_runs(run, uninterrupted)


def test_told_to_stop(folder: Path, uninterrupted: list[dict[str, Any]]) -> None:
    """SIGUSR1 to one rank: all save at the same step, leave a mark, end with 0, and the next start goes on."""
    run = folder / "preempted"
    process = start(folder, run)
    wait_for_step(process, run, 4)
    rank = subprocess.run(
        ["pgrep", "-P", str(process.pid), "-f", "atr_scale.train"], capture_output=True, text=True
    ).stdout.split()[0]
    os.kill(int(rank), signal.SIGUSR1)
    assert process.wait(timeout=240) == 0, output(process)
    stopped_at = int((run / "latest").resolve().name.removeprefix("step-"))
    assert (run / "preempted").exists() and 4 <= stopped_at < STEPS
    process = start(folder, run)
    assert process.wait(timeout=240) == 0, output(process)
    assert not (run / "preempted").exists()
    assert_equal_runs(run, uninterrupted)


def test_resume_refuses_another_run(folder: Path, uninterrupted: list[dict[str, Any]]) -> None:
    """Another learning rate, or another number of ranks under ZeRO: one line each, nothing touched."""
    run = folder / "uninterrupted"
    before = (run / "metrics.jsonl").read_bytes()
    for changes, words in (
        ({"lr": 5e-4}, "train.lr was 0.001, now 0.0005"),
        ({"ranks": 1}, "on 2 ranks, not on 1"),
    ):
        process = start(folder, run, **changes)
        _, said = process.communicate(timeout=240)
        assert process.returncode != 0 and said.count(words) == 1, said[-3000:]
        assert [line for line in said.splitlines() if "error: " in line and words in line]
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_diverged_run_stops(folder: Path) -> None:
    """Weights blown up by an absurd rate: three skipped steps in a row, then the end, with the samples named."""
    run = folder / "diverged"
    process = start(folder, run, lr=1e30, gradient_clipping=0.0, warmup_epochs=0, zero_stage=1, checkpoint_every=100)
    _, said = process.communicate(timeout=240)
    assert process.returncode != 0
    assert "3 non-finite steps in a row" in said, said[-3000:]
    assert len(list(run.glob("nonfinite-step-*-rank-0.json"))) == 3
    assert not (run / "checkpoints").exists()
