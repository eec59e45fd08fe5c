"""A run folder on S3: nodes, launchers and the store fail, and the run goes on from the bucket alone.

The server is rclone, behind a proxy that injects the faults.
"""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import atr_scale
from atr_scale.cli import app
from atr_scale.data import storage
from atr_scale.errors import UserError
from atr_scale.remote.lock import RemoteLock
from atr_scale.run_checkpoints import verify
from tests.faults.proxy import Answer, Fault, FaultProxy, Silence, for_all, needs_rclone, s3_behind_proxy
from tests.faults.runs import TinyRuns, family, steps_of
from tests.faults.test_run_folder import SLOW_STEPS
from tests.tiny import read_training

pytestmark = [needs_rclone, pytest.mark.slow, pytest.mark.timeout(300)]
Outcome = Callable[[str], None]

# Each rank is a node of its own: its local folder is not that of the others.
A_NODE_EACH = "import os; os.environ['ATR_SCALE_SCRATCH'] += '/node-' + os.environ['RANK']\n"
SOON = "from atr_scale.remote import mirror; mirror.STOPPED_S = mirror.SILENT_S = 4.0\n"  # instead of 15 s and 60 s
ELSEWHERE = "from atr_scale import locks; locks._machine = lambda: 'another machine'\n"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The server's folder, with an empty bucket."""
    folder = tmp_path_factory.mktemp("s3")
    (folder / "bucket").mkdir()
    return folder


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[FaultProxy]:
    with s3_behind_proxy(root) as proxy:
        yield proxy


@pytest.fixture
def proxy(server: FaultProxy) -> Iterator[FaultProxy]:
    server.requests.clear()
    yield server
    server.fault = for_all(None)


class Remote:
    """A run in the bucket: its address, and what the server has of it."""

    def __init__(self, root: Path, name: str) -> None:
        self.address, self.folder = f"s3://bucket/runs/{name}", root / "bucket" / "runs" / name
        self.overrides = (f"run.dir={self.address}",)

    def checkpoints(self) -> list[int]:
        return sorted(int(path.parent.name[5:]) for path in self.folder.glob("checkpoints/step-*/manifest.json"))

    def latest(self) -> str:
        return (self.folder / "latest").read_text().strip()


def attempts_of(run: Path) -> tuple[list[int], list[str]]:
    """From which steps the attempts of a run have trained, and how they have ended."""
    lines = [json.loads(line) for line in (run / "attempts.jsonl").read_text().splitlines()]
    starts = [line["step"] for line in lines if line["event"] == "training"]
    return starts, [line["reason"] for line in lines if line["event"] == "end"]


@pytest.mark.fault(
    "both nodes of a run on S3 are killed and their disks are lost",
    expected="another node goes on from the bucket alone, as without the fault",
)
def test_dead_nodes(runs: TinyRuns, root: Path, proxy: FaultProxy, outcome: Outcome) -> None:
    remote = Remote(root, "dead")
    train: dict[str, Any] = {"steps": 24, "checkpoint_every": 4, "keep_checkpoints": 2, "log_every": 1, "zero_stage": 3}
    reference = runs.start("reference", ranks=2, **train)
    scratch = runs.place / "scratch"
    first = runs.start(
        "first",
        ranks=2,
        hooks=A_NODE_EACH + SLOW_STEPS,
        overrides=remote.overrides,
        environment={"ATR_SCALE_SCRATCH": str(scratch)},
        **train,
    )
    runs.until(lambda: remote.checkpoints()[-1:] >= [8], "the bucket has step 8")
    for process in [*family(first.pid), first]:
        process.kill()
    first.wait()
    runs.ends_with(0, reference)
    assert {path.name for path in scratch.iterdir()} == {"node-0", "node-1"}
    shutil.rmtree(scratch)
    saved = remote.checkpoints()
    assert saved[-1] < 24
    # Without a manifest, as if the upload had been cut.
    storage.write_bytes(f"{remote.address}/checkpoints/step-23/model.safetensors", b"half")
    storage.write_bytes(f"{remote.address}/latest", b"checkpoints/step-23\n")
    second = runs.start(
        "second",
        ranks=2,
        overrides=remote.overrides,
        environment={"ATR_SCALE_SCRATCH": str(runs.place / "elsewhere")},
        **train,
    )
    runs.ends_with(0, second)
    starts, ends = attempts_of(remote.folder)
    assert starts == [0, saved[-1]], "it goes on from the newest complete checkpoint"
    assert ends == ["killed", "done"]
    assert steps_of(remote.folder) == list(range(1, 25))
    losses, wanted = (
        [line["loss"] for line in read_training(run)] for run in (remote.folder, runs.folder("reference"))
    )
    assert losses == wanted
    assert remote.checkpoints() == [20, 24] and remote.latest() == "checkpoints/step-24"
    assert {path.name for path in (remote.folder / "checkpoints").iterdir()} == {"step-20", "step-24"}
    assert verify(remote.folder / "checkpoints" / "step-24") == []
    assert not (remote.folder / "run.lock").exists()
    outcome(f"rc 0 from step {saved[-1]} on, losses of all 24 steps equal, 2 checkpoints kept")


def test_commands_take_the_address(
    root: Path, proxy: FaultProxy, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the run of the test above."""
    remote = Remote(root, "dead")
    monkeypatch.setenv("ATR_SCALE_SCRATCH", str(tmp_path))
    status = CliRunner().invoke(app, ["status", remote.address, "--json"])
    found = json.loads(status.stdout)
    assert (found["run"], found["state"], found["step"], found["checkpoint_step"]) == (remote.address, "done", 24, 24)
    assert not list(tmp_path.rglob("*.safetensors")), "status downloads no weights"
    shards = str(inputs / "validation" / "shards")
    measured = CliRunner().invoke(app, ["evaluate", remote.address, "--shards", shards, "--split", "new"])
    assert measured.exit_code == 0, measured.output
    results = json.loads((remote.folder / "results.json").read_text())["results"]
    assert results[-1]["split"] == "new" and results[-1]["checkpoint"] in ("best", "last")
    assert (remote.folder / "evaluation-new.json").exists() and (remote.folder / "report.md").exists()
    assert not list(tmp_path.rglob("optimizer")), "nor is the optimizer's state downloaded"
    model = atr_scale.load(remote.address, "cpu")
    same = atr_scale.load(remote.folder / "checkpoints" / "step-24", "cpu")
    assert (model.embed_text(["a low tone"]) == same.embed_text(["a low tone"])).all()
    with pytest.raises(UserError, match="no run at s3://bucket/runs/none"):
        CliRunner().invoke(app, ["status", "s3://bucket/runs/none"], catch_exceptions=False)


class Outage:
    """From the first upload of a checkpoint's weights on, for some seconds, nothing can be written."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.began: float | None = None

    def __call__(self, method: str, path: str) -> Fault | None:
        if self.began is None and method == "PUT" and "model.safetensors" in path:
            self.began = time.monotonic()
        down = self.began is not None and time.monotonic() - self.began < self.seconds
        return Answer(503) if down else None


@pytest.mark.fault("S3 answers 503 to uploads for 10 s", expected="training goes on; the bucket catches up")
def test_an_outage_of_uploads(runs: TinyRuns, root: Path, proxy: FaultProxy, outcome: Outcome) -> None:
    remote = Remote(root, "outage")
    proxy.fault = outage = Outage(10)
    process = runs.start(
        hooks=SLOW_STEPS,
        overrides=remote.overrides,
        environment={"ATR_SCALE_SCRATCH": str(runs.place / "scratch")},
        steps=40,
        checkpoint_every=5,
        log_every=1,
    )
    local = runs.until(lambda: list(runs.place.glob("scratch/runs/*/outage")), "there is a local folder")[0]
    runs.until(lambda: outage.began, "an upload")
    before = len(steps_of(local))
    runs.until(lambda: outage.began and time.monotonic() - outage.began > 8, "some seconds")
    made = len(steps_of(local)) - before
    assert made >= 5, "training does not wait"
    runs.ends_with(0, process)
    assert runs.said().count("an upload has failed") == 1
    assert remote.checkpoints()[-1] == 40 and remote.latest() == "checkpoints/step-40"
    assert steps_of(remote.folder) == list(range(1, 41))
    sent = [path for method, path, fault in proxy.requests if method == "PUT" and fault is None and "/step-" in path]
    assert len(sent) == len(set(sent)), "no file is sent twice"
    outcome(f"rc 0, {made} steps meanwhile, one line, all checkpoints in the bucket")


@pytest.mark.fault(
    "S3 answers 503 to uploads until the run ends", expected="exit code 1 naming the store; the next start uploads"
)
def test_an_outage_at_the_end(runs: TinyRuns, root: Path, proxy: FaultProxy, outcome: Outcome) -> None:
    remote = Remote(root, "away")
    proxy.fault = Outage(1000)
    environment = {"ATR_SCALE_SCRATCH": str(runs.place / "scratch")}
    overrides = (*remote.overrides, "data.outage_seconds=2")
    first = runs.start(overrides=overrides, environment=environment, steps=12, checkpoint_every=5)
    runs.ends_with(1, first)
    assert f"error: {remote.address} could not be written for" in runs.said() and "Traceback" not in runs.said()
    assert remote.checkpoints() == []
    proxy.fault = for_all(None)
    runs.ends_with(0, runs.start(overrides=overrides, environment=environment, steps=12, checkpoint_every=5))
    assert remote.checkpoints()[-1] == 12
    assert attempts_of(remote.folder)[0] == [0, 12], "nothing is trained again"
    outcome("rc 1, one line; the same command uploads what is missing, rc 0")


@pytest.mark.fault(
    "a run on S3 is told to stop (SIGTERM) while S3 answers 503 to everything",
    expected="saved on its machine, one line, exit code 0 in the time of grace; this machine goes on from there and "
    "uploads it, another one from the last checkpoint in the bucket",
)
def test_told_to_stop_in_an_outage(runs: TinyRuns, root: Path, proxy: FaultProxy, outcome: Outcome) -> None:
    remote, other = Remote(root, "stopped"), Remote(root, "stopped-2")
    train: dict[str, Any] = {"steps": 40, "checkpoint_every": 5, "log_every": 1}
    here, elsewhere = ({"ATR_SCALE_SCRATCH": str(runs.place / name)} for name in ("here", "elsewhere"))
    first = runs.start(hooks=SOON + SLOW_STEPS, overrides=remote.overrides, environment=here, **train)
    runs.until(remote.checkpoints, "a checkpoint in the bucket")
    proxy.fault = for_all(Answer(503))
    there, local = remote.checkpoints()[-1], next(runs.place.glob("here/runs/*/stopped"))
    runs.until(lambda: steps_of(local)[-1] > there + 1, "it trains on")
    first.send_signal(signal.SIGTERM)
    began = time.monotonic()
    runs.ends_with(0, first)
    seconds = time.monotonic() - began
    assert seconds < 25, "it would wait 600 s at its end"
    saved = int((local / "latest").resolve().name[5:])
    assert saved > there and (local / "preempted").exists() and remote.checkpoints()[-1] == there
    said = runs.said()
    assert said.count("could not be written for") == 1 and f"machine it goes on from step-{there}" in said, said
    assert "Traceback" not in said

    proxy.fault = for_all(None)
    shutil.copytree(remote.folder, other.folder)
    second = runs.start("second", overrides=other.overrides, environment=elsewhere, **train)
    runs.ends_with(0, runs.start(overrides=remote.overrides, environment=here, **train))
    runs.ends_with(0, second)
    assert [attempts_of(each.folder) for each in (remote, other)] == [
        ([0, saved], ["preempted", "done"]),
        ([0, there], ["killed", "done"]),
    ]
    assert remote.checkpoints()[-1] == other.checkpoints()[-1] == 40
    losses, others = ([line["loss"] for line in read_training(run.folder)] for run in (remote, other))
    assert losses == others and len(losses) == 40
    outcome(f"rc 0 after {seconds:.0f} s; here on from step {saved}, elsewhere from step {there}; the same losses")


@pytest.mark.fault(
    "S3 takes an upload and never answers, until the run ends",
    expected="exit code 1 naming the store after the time limit, although the upload hangs; the next start uploads",
)
def test_an_upload_that_hangs(runs: TinyRuns, root: Path, proxy: FaultProxy, outcome: Outcome) -> None:
    remote = Remote(root, "hangs")
    proxy.fault = lambda method, path: Silence() if method == "PUT" and "model.safetensors" in path else None
    environment = {"ATR_SCALE_SCRATCH": str(runs.place / "scratch")}
    overrides = (*remote.overrides, "data.outage_seconds=2")
    first = runs.start(hooks=SOON, overrides=overrides, environment=environment, steps=4)
    local = runs.until(lambda: list(runs.place.glob("scratch/runs/*/hangs/latest")), "it has saved")[0].parent
    began = time.monotonic()
    runs.ends_with(1, first)
    seconds = time.monotonic() - began
    assert seconds < 40, "a file is given up after 45 s"
    said = runs.said()
    line = f"error: {remote.address} could not be written for 4 s (data.outage_seconds = 2): no answer; what is missing"
    assert line in said and str(local) in said and "Traceback" not in said
    assert remote.checkpoints() == []
    proxy.fault = for_all(None)
    runs.ends_with(0, runs.start(overrides=overrides, environment=environment, steps=4))
    assert remote.checkpoints() == [4] and attempts_of(remote.folder)[0] == [0, 4], "nothing is trained again"
    outcome(f"rc 1 after {seconds:.0f} s, one line; the same command uploads what is missing, rc 0")


@pytest.mark.fault("a run on S3 is started again elsewhere", expected="one line naming the owner, exit code 2")
def test_a_second_start(runs: TinyRuns, root: Path, proxy: FaultProxy, outcome: Outcome) -> None:
    remote = Remote(root, "twice")
    train: dict[str, Any] = {"steps": 400, "checkpoint_every": 400, "log_every": 1}
    first = runs.start(
        hooks=SLOW_STEPS,
        overrides=remote.overrides,
        environment={"ATR_SCALE_SCRATCH": str(runs.place / "one")},
        **train,
    )
    runs.until(lambda: steps_of(remote.folder), "it trains")
    second = runs.start(
        "second",
        hooks=ELSEWHERE,
        overrides=remote.overrides,
        environment={"ATR_SCALE_SCRATCH": str(runs.place / "two")},
        **train,
    )
    runs.ends_with(2, second)
    line = f"error: the run folder {remote.address} is in use by process {first.pid} on "
    assert line in runs.said() and "its lock is void after 300 s" in runs.said()
    first.send_signal(signal.SIGTERM)
    runs.ends_with(0, first)
    assert (remote.folder / "preempted").read_text() == "SIGTERM\n"
    saved = remote.checkpoints()[-1]
    assert 0 < saved < 400 and steps_of(remote.folder)[-1] == saved, "a preemption waits for the upload"
    outcome("rc 2, the owner is named; told to stop, it has uploaded its last checkpoint, rc 0")


def test_a_bucket_that_is_not_there_is_one_line(proxy: FaultProxy) -> None:
    with pytest.raises(UserError, match=r"the run folder s3://nowhere/x cannot be written .*check the bucket"):
        RemoteLock("s3://nowhere/x").__enter__()
