"""Two processes for one folder, and processes whose parents are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.coded import write_corpus
from tests.faults.runs import TinyRuns, alive, family, free_port, ranks_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
GONE_S = 10.0
ACCELERATE = [str(Path(sys.executable).with_name("accelerate")), "launch", "--config_file"]
ACCELERATE.append(str(Path(__file__).parents[2] / "launch" / "accelerate" / "cpu.yaml"))


@pytest.mark.fault("two trainings in one run folder", expected="the second one is refused in one line, exit code 2")
def test_two_trainings(runs: TinyRuns, outcome: Callable[[str], None]) -> None:
    first = runs.start(steps=100_000, log_every=1)
    runs.until_step(1)
    second = runs.start(steps=100_000, log_every=1)
    runs.ends_with(2, second)
    assert f"error: the run folder {runs.folder()} is in use by process {first.pid} on " in runs.said()
    assert "Traceback" not in runs.said()
    runs.until_it_trains_on()
    first.kill()
    first.wait()
    third = runs.start(steps=100_000, log_every=1)
    runs.until_said("which is dead: going on")
    runs.until_it_trains_on()
    third.terminate()
    runs.ends_with(0, third)
    assert not (runs.folder() / "run.lock").exists()
    outcome("the second ended with exit code 2 and named the first; after kill -9 of this the next one trained at once")


@pytest.mark.fault("two builds in one folder", expected="the second one is refused in one line, exit code 2")
def test_two_builds(runs: TinyRuns, outcome: Callable[[str], None]) -> None:
    write_corpus(runs.place / "corpus", range(8))
    out = runs.place / "shards"
    stopped = (
        "import os, signal; import atr_scale.data.shard_builder as b; r = b._run\n"
        "b._run = lambda *a: (os.kill(os.getpid(), signal.SIGSTOP), r(*a))[1]\n"
    )
    code = "import sys; from atr_scale.cli import main; sys.argv[0] = 'atr-scale'; main()"
    line = ["shards", "build", "folder", "--root", str(runs.place / "corpus"), "--out", str(out)]
    first = subprocess.Popen([sys.executable, "-c", stopped + code, *line], stderr=subprocess.PIPE)
    try:
        runs.until(lambda: (out / ".build.lock").exists(), "the first build is in its folder")
        second = subprocess.run([sys.executable, "-c", code, *line], capture_output=True, text=True, timeout=120)
        assert second.returncode == 2
        assert f"error: the folder {out} is in use by process {first.pid} on " in second.stderr
        first.send_signal(signal.SIGCONT)
        assert first.wait(120) == 0
    finally:
        first.kill()
        first.wait()
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "shard-000000.tar"]
    outcome("the second ended with exit code 2 and named the first, which then ended well")


@pytest.mark.fault(
    "kill -9 of a rank, or of the launcher",
    expected="loader workers, their server and the other ranks are gone within 10 s; the next start is not refused",
)
@pytest.mark.parametrize("killed", ["a rank alone", "torchrun", "accelerate"])
def test_orphans(killed: str, runs: TinyRuns, outcome: Callable[[str], None]) -> None:
    ranks = 1 if killed == "a rank alone" else 2
    launcher = [*ACCELERATE, "--main_process_port", str(free_port())]
    options: dict[str, Any] = {"launcher": launcher} if killed == "accelerate" else {"ranks": ranks}
    process = runs.start(steps=100_000, log_every=1, overrides=("data.workers=2",), **options)
    runs.until_step(1)
    others = family(process.pid)
    assert len(others) >= (2 if ranks == 2 else 0) + 3 * ranks, "ranks, servers, and workers"
    process.kill()
    process.wait()
    began = time.monotonic()
    if killed != "torchrun":
        runs.until(lambda: not alive(others), f"all of {others} are gone", GONE_S)
        outcome(f"all {len(others)} processes were gone after {time.monotonic() - began:.0f} s")
        return
    runs.start(steps=100_000, log_every=1, **options)  # at once: those of before still hold the folder
    runs.until(lambda: not alive(others), f"all of {others} are gone", GONE_S)
    seconds = time.monotonic() - began
    runs.until_it_trains_on()
    outcome(f"all {len(others)} processes were gone after {seconds:.0f} s, and the next start trained")


@pytest.mark.fault("kill -9 of one of two ranks", expected="torchrun starts both again, and nothing of before is left")
def test_a_killed_rank_is_restarted(runs: TinyRuns, outcome: Callable[[str], None]) -> None:
    options = ("data.workers=1",)
    process = runs.start(ranks=2, torchrun=["--max-restarts=1"], steps=8, log_every=1, checkpoint_every=2,
                         overrides=options, hooks=SLOW)  # fmt: skip
    runs.until_step(3)
    before = family(process.pid)
    ranks_of(process.pid)[1].kill()
    runs.ends_with(0, process, 200)
    assert not alive(before)
    said = runs.said()
    assert (
        "error: the connection to another rank failed (Connection closed by peer" in said and "Traceback" not in said
    ), said
    outcome(f"both ranks were started again and trained to the end; none of {len(before)} processes was left")


@pytest.mark.fault("the shell that started a training in the background ends", expected="the training goes on")
def test_a_training_without_launcher_outlives_its_shell(runs: TinyRuns, outcome: Callable[[str], None]) -> None:
    runs.ended(runs.start(steps=1, log_every=1))
    command = f"nohup {sys.executable} {runs.place}/run.py {runs.place}/run.yaml train.steps=3 >> {runs.log} 2>&1 &"
    subprocess.run(["sh", "-c", command], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    runs.until_said("trained to step 3")
    outcome("it trained to its end")


SLOW = """
import time
from atr_scale.training.engine import Engine
update = Engine.update
def slowly(self, *args, **more):
    time.sleep(0.5)
    return update(self, *args, **more)
Engine.update = slowly
"""
