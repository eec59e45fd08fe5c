"""Runs that end in the middle, killed, told to stop or damaged, and are resumed: they equal an uninterrupted run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.audit import HOOKS, Row, read_audit
from tests.faults.runs import TinyRuns, ranks_of, tiny_runs
from tests.tiny_run import tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
Outcome = Callable[[str], None]
STEPS = 10
# 3 steps of warm-up, then down to step 8, then flat.
SCHEDULE: dict[str, Any] = {"warmup_steps": None, "warmup_epochs": 0.9, "decay_steps": 8}

# The rank and step of KILL end inside an update: before the all-reduce of its result, or inside DeepSpeed's step. SLOW:
# seconds that each update takes longer, so that a signal comes in time.
KILLED = """
import os, signal, time
from atr_scale.training.engine import Engine
rank, step, place = os.environ.get("KILL", "none 0 none").split()
update, agree = Engine.update, Engine._agree
def kill():
    os.kill(os.getpid(), signal.SIGKILL)
def stepping(self, batches, rates, seeds, context, **more):
    time.sleep(float(os.environ.get("SLOW", "0")))
    self.dies = os.environ["RANK"] == rank and context.step + 1 == int(step)
    if self.dies and place == "applying":
        self.deepspeed.step = kill
    return update(self, batches, rates, seeds, context, **more)
def agreeing(self, *given):
    if self.dies and place == "agreeing":
        kill()
    return agree(self, *given)
Engine.update, Engine._agree = stepping, agreeing
"""


class Trained:
    """A run of ten steps on two ranks, in a folder that other tests may copy."""

    def __init__(self, runs: TinyRuns) -> None:
        self.runs, self.run, self.audit = runs, runs.folder(), runs.place / "audit"

    def start(self, kill: str = "", slow: float = 0, ranks: int = 2, **train: Any) -> subprocess.Popen[bytes]:
        return self.runs.start(
            ranks=ranks,
            hooks=HOOKS + KILLED,
            environment={"AUDIT": str(self.audit), "SLOW": str(slow), **({"KILL": kill} if kill else {})},
            **{"steps": STEPS, "checkpoint_every": 3, "zero_stage": 2, **SCHEDULE, **train},
        )

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]

    def rows(self) -> list[Row]:
        return read_audit(self.audit, self.runs.inputs / "train" / "text_encoder")

    def weights(self) -> bytes:
        return (self.run / "latest" / "model.safetensors").read_bytes()

    def stopped_at(self) -> int:
        return int((self.run / "latest").resolve().name.removeprefix("step-"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs of the runs; the text encoder has dropout, whose draws a resume must repeat."""
    folder = tmp_path_factory.mktemp("resume")
    tiny_config(folder, folder)
    path = folder / "train" / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_dropout_prob": 0.2}))
    return folder


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Iterator[Trained]:
    """A run that nothing disturbed, which no test changes."""
    (folder / "undisturbed").mkdir()
    with tiny_runs(folder / "undisturbed", folder) as runs:
        trained = Trained(runs)
        assert runs.ended(trained.start()) == 0
        for words in (
            "10 optimizer steps, 3 of them warm-up, then cosine to step 8, then flat for 2; an epoch of clips is 3.3",
            "visits: 120, on average 3.0 to each of 40 clips and 3.0 to each of 40 captions; an epoch of clips is 40",
        ):
            assert words in runs.said()
        yield trained


@pytest.fixture
def trained(folder: Path, tmp_path: Path) -> Iterator[Trained]:
    with tiny_runs(tmp_path, folder) as runs:
        yield Trained(runs)


def assert_equal_runs(found: Trained, expected: Trained) -> None:
    """The same losses, gradient norms and temperatures at every step, to the last bit, and the same evaluations."""
    exact = (
        *("kind", "step", "loss", "loss/nt_xent/t2a", "loss/nt_xent/a2t", "temperature", "lr/audio", "samples_seen"),
        *(
            "grad_norm",
            "grad_norm/audio",
            "grad_norm/text",
            "grad_norm/heads",
            "duplicates/clips",
            "duplicates/captions",
        ),
        *("t2a/mAP@10", "a2t/R@1"),
    )
    assert {key for line in expected.lines() for key in line} >= set(exact)
    assert [{k: x.get(k) for k in exact} for x in found.lines()] == [
        {k: x.get(k) for k in exact} for x in expected.lines()
    ]
    assert found.weights() == expected.weights()


@pytest.mark.fault(
    "kill -9 of a rank inside an update, twice (another rank, another place)",
    expected="the peers end; resumed from the last checkpoint, losses, weights and samples equal an undisturbed run's",
)
def test_killed_inside_an_update_twice(trained: Trained, undisturbed: Trained, outcome: Outcome) -> None:
    ends = []
    for kill, saved in (("1 5 agreeing", 3), ("0 8 applying", 6)):
        process, began = trained.start(kill), time.monotonic()
        assert trained.runs.ended(process) == 1
        ends.append(time.monotonic() - began)
        assert trained.stopped_at() == saved
    assert trained.runs.ended(trained.start()) == 0, trained.runs.said()
    assert_equal_runs(trained, undisturbed)
    assert trained.rows() == undisturbed.rows()
    outcome("losses of all steps, the final weights and all samples are equal to the last bit")


@pytest.mark.fault(
    "a flipped bit in the newest checkpoint", expected="the one before it is used and named; the same end of the run"
)
def test_a_flipped_bit(trained: Trained, undisturbed: Trained, outcome: Outcome) -> None:
    shutil.copytree(undisturbed.run, trained.run, symlinks=True)
    newest = (trained.run / "latest").resolve() / "model.safetensors"
    weights = bytearray(newest.read_bytes())
    weights[-1] ^= 1
    newest.write_bytes(weights)
    assert trained.runs.ended(trained.start()) == 0, trained.runs.said()
    assert "step-10 is broken (model.safetensors has another checksum)" in trained.runs.said()
    assert_equal_runs(trained, undisturbed)
    outcome("went on from step 9, the broken one was named; losses and weights are equal to the last bit")


@pytest.mark.fault(
    "preemption: SIGTERM to one of two ranks, and after the resume SIGUSR2 to the other",
    expected="all ranks save at one step and end with 0; the next start goes on to the same end",
)
def test_told_to_stop(trained: Trained, undisturbed: Trained, outcome: Outcome) -> None:
    stops = [0]
    for rank, number in ((0, signal.SIGTERM), (1, signal.SIGUSR2)):
        process, step = trained.start(slow=0.8), stops[-1] + 1
        trained.runs.until_step(step)
        os.kill(ranks_of(process.pid)[rank].pid, number)
        assert trained.runs.ended(process) == 0, trained.runs.said()
        stops.append(trained.stopped_at())
        assert (trained.run / "preempted").exists() and step <= stops[-1] <= STEPS, stops
    assert stops[1] < STEPS, "the second signal came to an end that was already saved"
    assert trained.runs.ended(trained.start()) == 0, trained.runs.said()
    assert not (trained.run / "preempted").exists()
    assert_equal_runs(trained, undisturbed)
    outcome(f"saved at steps {stops[1]} and {stops[2]}, rc 0; losses and weights are equal to the last bit")


@pytest.mark.fault(
    "a resume with another learning rate and architecture",
    expected="refused in one line that names the keys, exit code 2; nothing is touched",
)
def test_resume_refuses_another_run(trained: Trained, undisturbed: Trained, outcome: Outcome) -> None:
    shutil.copytree(undisturbed.run, trained.run, symlinks=True)
    before = (trained.run / "metrics.jsonl").read_bytes()
    changed = trained.runs.start(
        overrides=("model.projection.dim=8",), steps=STEPS, zero_stage=2, **{**SCHEDULE, "lr": 5e-4}
    )
    assert trained.runs.ended(changed) == 2
    errors = [line for line in trained.runs.said().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in trained.runs.said()
    assert "train.lr was 0.001, now 0.0005" in errors[0] and "model.projection.dim was 16, now 8" in errors[0]
    assert (trained.run / "metrics.jsonl").read_bytes() == before
    outcome("exit code 2, one line: the keys with both values")


@pytest.mark.fault("a run diverges", expected="three skipped updates in a row end it, and the samples are named")
def test_a_diverged_run_stops(trained: Trained, outcome: Outcome) -> None:
    """Weights blown up by an absurd rate."""
    process = trained.start(
        ranks=1, lr=1e30, gradient_clipping=0.0, warmup_epochs=0, zero_stage=1, checkpoint_every=100
    )
    assert trained.runs.ended(process) == 1
    last = trained.runs.said().splitlines()[-1]
    assert last.startswith("error: 3 non-finite steps in a row up to step 4: lower train.lr, or look at the samples")
    assert len(list(trained.run.glob("nonfinite-step-*-rank-0.json"))) == 3
    assert not (trained.run / "checkpoints").exists()
    outcome("rc 1 after three skipped updates; no checkpoint of it was saved")
