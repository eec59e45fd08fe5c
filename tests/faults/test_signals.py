"""Signals at bad moments: before training, during an evaluation, during a save, twice; and clocks that jump."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.runs import ENVIRONMENT, TinyRuns, alive, family, free_port, ranks_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
KILL_S = 30.0  # after which launchers kill

SLOW_EVALUATION = """
import atr_scale.evaluation.embed as embed, sys, time
embed_batch = embed._embed_batch
def slowly(*args):
    print("an evaluation has begun", file=sys.stderr, flush=True)
    time.sleep(4)
    return embed_batch(*args)
embed._embed_batch = slowly
"""
SLOW_SAVE = """
import sys, time
from atr_scale.checkpoint_writer import Writing
write = Writing._own_files
def slowly(*args):
    print("a save has begun", file=sys.stderr, flush=True)
    time.sleep(3)
    written = write(*args)
    print("a save is written", file=sys.stderr, flush=True)
    return written
Writing._own_files = slowly
"""
SLOW_START = """
import sys, time
from atr_scale.training import loop
def slowly(*args):
    print("data is being opened", file=sys.stderr, flush=True)
    time.sleep(120)
loop.open_parts = slowly
"""
SLOW_READING = """
import time
from atr_scale.data.stream import TrainingStream
parcels = TrainingStream.parcels
def slowly(*args):
    for parcel in parcels(*args):
        time.sleep(0.5)
        yield parcel
TrainingStream.parcels = slowly
"""
JUMPING_CLOCK = """
import time
from atr_scale.training.engine import Engine
update, now, jumps = Engine.update, time.time, [0.0, 0.0, 86_400.0, 86_400.0, -86_400.0, -86_400.0]
def updated(self, *args, **more):
    shift = jumps.pop(0) if jumps else 0.0
    time.time = lambda: now() + shift
    return update(self, *args, **more)
Engine.update = updated
"""


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def evaluations(run: Path) -> list[int]:
    """The steps whose evaluations are in the record."""
    return [line["step"] for line in lines(run / "metrics.jsonl") if line["kind"] != "train"]


@pytest.mark.fault(
    "TERM to one of two ranks during an evaluation",
    expected="both leave it within 30 s and have saved; it is repeated after the resume",
)
def test_during_an_evaluation(runs: TinyRuns, outcome: Callable[[str], None]) -> None:
    schedule: dict[str, Any] = {"steps": 4, "evaluate_every": 2, "log_every": 1}
    one_by_one = ("evaluation.batch_size=1",)
    process = runs.start(ranks=2, hooks=SLOW_EVALUATION, overrides=one_by_one, **schedule)
    runs.until_said("an evaluation has begun")
    ranks_of(process.pid)[1].send_signal(signal.SIGTERM)
    began = time.monotonic()
    assert runs.ended(process) == 0
    seconds = time.monotonic() - began
    assert seconds < KILL_S
    run = runs.folder()
    assert (run / "preempted").exists()
    assert (run / "latest").resolve().name == "step-2"
    assert evaluations(run) == []
    assert runs.ended(runs.start(ranks=2, overrides=one_by_one, **schedule)) == 0
    assert evaluations(run) == [2, 4]
    assert not (run / "preempted").exists()
    assert [line["reason"] for line in lines(run / "attempts.jsonl") if line["event"] == "end"] == ["preempted", "done"]
    outcome(f"both ranks had saved step 2 and left after {seconds:.0f} s; the next start evaluated it first")


@pytest.mark.fault(
    "TERM, and another, during a save",
    expected="the save is finished; the run saves the step that it has made meanwhile, and leaves",
)
def test_twice_during_a_save(runs: TinyRuns, outcome: Callable[[str], None]) -> None:
    process = runs.start(hooks=SLOW_SAVE, steps=6, checkpoint_every=2, log_every=1)
    runs.until_said("a save has begun")
    process.terminate()
    time.sleep(1)
    process.terminate()
    process.send_signal(signal.SIGUSR1)
    assert runs.ended(process, KILL_S) == 0
    run = runs.folder()
    assert runs.said().count("a save is written") == 2
    first, last = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert first == "step-2" and last in ("step-3", "step-4")
    assert (run / "preempted").read_text() in ("SIGTERM\n", "SIGUSR1\n")
    assert runs.ended(runs.start(steps=6, checkpoint_every=2, log_every=1)) == 0
    outcome("step 2 and the step made while it was written are saved, and the next start went on to the end")


@pytest.mark.fault(
    "TERM while data is opened", expected="the process leaves at once with 0; nothing is in its way later"
)
def test_before_training(runs: TinyRuns, outcome: Callable[[str], None]) -> None:
    process = runs.start(hooks=SLOW_START, steps=2)
    runs.until_said("data is being opened")
    began = time.monotonic()
    process.terminate()
    assert runs.ended(process, KILL_S) == 0
    seconds = time.monotonic() - began
    run = runs.folder()
    assert (run / "preempted").read_text() == "SIGTERM\n"
    assert not (run / "run.lock").exists()
    assert lines(run / "attempts.jsonl")[-1]["reason"] == "preempted"
    assert "Traceback" not in runs.said()
    assert runs.ended(runs.start(steps=2)) == 0
    outcome(f"exit code 0 after {seconds:.0f} s; the next start trained to its end")


@pytest.mark.fault("TERM while a rank waits for the others", expected="the process ends at once")
def test_while_waiting_for_other_ranks(runs: TinyRuns, outcome: Callable[[str], None]) -> None:
    alone = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    process = runs.start(environment=alone)
    runs.until_said("joining 2 ranks")
    process.terminate()
    assert runs.ended(process, KILL_S) == -signal.SIGTERM
    assert not runs.folder().exists()
    outcome("it was ended by the signal, and had written nothing")


@pytest.mark.fault(
    "TERM or USR2 to all processes of a run, as SLURM sends it, while the rank waits for the reader",
    expected="the ranks save and leave; the reader and its helpers go on until then",
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_to_all_processes(runs: TinyRuns, outcome: Callable[[str], None], number: signal.Signals) -> None:
    process = runs.start(
        hooks=SLOW_READING, steps=100, checkpoint_every=100, log_every=1, overrides=("data.workers=1",)
    )
    runs.until_step(3)
    others = family(process.pid)
    assert len(others) >= 3, "the reader, its server, and the tracker of resources"
    for one in (*others, process):
        one.send_signal(number)
    assert runs.ended(process, KILL_S) == 0
    said = runs.said()
    assert "told to stop: saved at step" in said
    assert "Traceback" not in said and "died" not in said, said
    runs.until(lambda: not alive(others), "they have ended", 10)
    outcome("saved; nothing else was said, and no process was left")


@pytest.mark.fault("the clock jumps by a day, to and fro", expected="nothing")
def test_a_clock_that_jumps(runs: TinyRuns, outcome: Callable[[str], None]) -> None:
    process = runs.start(hooks=JUMPING_CLOCK, steps=8, checkpoint_every=3, log_every=1, overrides=("data.workers=1",))
    assert runs.ended(process) == 0
    logged = [line for line in lines(runs.folder() / "metrics.jsonl") if line["kind"] == "train"]
    assert [line["step"] for line in logged] == list(range(1, 9))
    assert all(0 < value < 1e5 for line in logged for key, value in line.items() if key.endswith("per_s"))
    status = subprocess.run(
        [sys.executable, "-m", "atr_scale.cli", "status", str(runs.folder()), "--json"],
        capture_output=True, check=True, env={**os.environ, **ENVIRONMENT},
    )  # fmt: skip
    found = json.loads(status.stdout)
    assert '"done"' in json.dumps(found)
    outcome("all steps were made, no speed was wrong, and the status is done")
