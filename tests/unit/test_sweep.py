"""Sweeps: the grid and its names, what is checked before a start, and runs here, for which small scripts stand."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from atr_scale.cli import app
from atr_scale.config import RunConfig, load_config
from atr_scale.errors import UserError
from atr_scale.evaluation.result import evaluate_retrieval
from atr_scale.evaluation.results import record_results, record_training
from atr_scale.evaluation.retrieval_scores import ScoreMatrix
from atr_scale.experiments import local, slurm
from atr_scale.experiments.grid import Axis, combinations, parse_arguments, run_names
from atr_scale.experiments.sweep import Sweep, SweepRun, last_error, plan_sweep
from atr_scale.experiments.task import task_words

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path: Path) -> str:
    values = {
        "run": {"dir": str(tmp_path / "run"), "seed": 3},
        "data": {"train": [{"shards": "x"}], "test": "y"},
        "model": {"audio": {"name": "small_cnn"}, "text": {"name": "x"}},
        "train": {"steps": 4},
    }
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(values))
    return str(path)


def test_a_list_is_an_axis_and_its_items_stay_as_written() -> None:
    axes, shared = parse_arguments(
        ["train.lr=[1e-4, 3e-4]", "train.steps=8", "train.betas=[[0.9,0.98],[0.9, 0.999]]",
         "model.scorer=[{name: mean}, {name: tap}]", "plugins+=[a,b]", "data.validation=[[a,b]]"]
    )  # fmt: skip
    assert axes == [
        Axis("train.lr", ("1e-4", "3e-4")),
        Axis("train.betas", ("[0.9,0.98]", "[0.9, 0.999]")),
        Axis("model.scorer", ("{name: mean}", "{name: tap}")),
    ]
    assert shared == ["train.steps=8", "plugins+=[a,b]", "data.validation=[a,b]"]
    assert [one["train.lr"] + one["model.scorer"] for one in combinations(axes)][:2] == [
        "1e-4{name: mean}", "1e-4{name: tap}",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.lr=[1e-4"], "is no list"),
        (["train.lr=[]"], "has no values"),
        (["train.lr=[1,2]", "train.lr=3"], "train.lr is given twice"),
        (["run.dir=[a,b]"], "run.dir is no key to sweep"),
    ],
)
def test_wrong_grids_are_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_arguments(arguments)


def test_names_tell_what_differs_and_are_safe() -> None:
    assert run_names([Axis("train.lr", ("1e-4", "3e-4")), Axis("model.scorer.name", ("tap",))]) == [
        "lr=1e-4,scorer.name=tap", "lr=3e-4,scorer.name=tap",
    ]  # fmt: skip
    assert run_names([]) == ["run"]
    paths = run_names([Axis("train.initial_checkpoint", ("runs/a b/", "'../c:d'"))])
    assert paths == ["initial_checkpoint=a-b", "initial_checkpoint=c-d"]
    assert run_names([Axis("data.train[0].shards", ("a",))]) == ["train-0-.shards=a"]
    same_end = run_names([Axis("train.initial_checkpoint", ("a/x", "b/x", "b/X"))])
    assert len({name.lower() for name in same_end}) == 3, "also on a file system that ignores the case"
    both = run_names([Axis("objective.pmr.weight", ("0", "1")), Axis("plug.pmr.weight", ("2",))])
    assert both[0] == "objective.pmr.weight=0,plug.pmr.weight=2"
    (long,) = run_names([Axis(f"train.key{number}", ("x" * 50,)) for number in range(9)])
    assert len(long) <= 100 and "/" not in long


def test_every_run_is_its_configuration_with_a_folder_and_a_seed(config: str, tmp_path: Path) -> None:
    sweep = plan_sweep(config, ["train.lr=[1e-4,3e-4]", "train.steps=8"], seeds=2)
    assert [run.name for run in sweep.runs] == [f"lr={lr},seed={seed}" for lr in ("1e-4", "3e-4") for seed in (3, 4)]
    for run in sweep.runs:
        assert load_config(config, run.overrides) == run.config
        assert run.dir == tmp_path / "run" / "sweep" / run.name
    assert sweep.runs[2].config.train.lr == 3e-4 and sweep.runs[2].config.train.steps == 8
    assert not sweep.folder.exists(), "planning writes nothing"
    sweep.save()
    assert task_words("train", sweep.folder, 3) == [config, *sweep.runs[3].overrides]
    assert task_words("evaluate", sweep.folder, 3) == [str(sweep.runs[3].dir), "--split", "test"]
    assert task_words("dir", sweep.folder, 3) == [str(sweep.runs[3].dir)]
    (alone,) = plan_sweep(config, [], seeds=1, out=tmp_path / "alone").runs
    assert alone.name == "seed=3" and alone.dir == tmp_path / "alone" / "seed=3"
    with pytest.raises(UserError, match="holds 4 runs"):
        task_words("train", sweep.folder, 4)


def test_a_task_finds_its_words_without_what_takes_seconds_to_import() -> None:
    code = "import sys, atr_scale.experiments.task; print('torch' in sys.modules, 'pydantic' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False False\n"


def test_all_configurations_are_checked_with_a_line_for_each_that_is_wrong(config: str) -> None:
    with pytest.raises(UserError) as caught:
        plan_sweep(config, ["train.lr=[1e-4,-1,x]"])
    first, *lines = str(caught.value).splitlines()
    assert first == "2 of 3 configurations are wrong:"
    assert [line.partition(":")[0] for line in lines] == ["lr=-1", "lr=x"] and "train.lr" in lines[0]
    with pytest.raises(UserError, match=r"lr=1e0: the same configuration as lr=1, give each value once"):
        plan_sweep(config, ["train.lr=[1,1e0]"])
    with pytest.raises(UserError, match=r"lr=1-\w+: the same configuration as lr=1-\w+"):
        plan_sweep(config, ["train.lr=[1,1]"])
    with pytest.raises(UserError, match=r"^no configuration file at nowhere\.yaml"):
        plan_sweep("nowhere.yaml", ["train.lr=[1,2]"])
    with pytest.raises(UserError, match=r"did you mean 'train\.steps'"):
        plan_sweep(config, ["train.stepps=4"])


def test_a_sweep_keeps_the_numbers_of_its_runs_and_refuses_another_grid(config: str) -> None:
    plan_sweep(config, ["train.lr=[2e-4,3e-4]"]).save()
    more = plan_sweep(config, ["train.lr=[1e-4,2e-4,3e-4]"])
    assert {run.name: run.number for run in more.runs} == {"lr=1e-4": 2, "lr=2e-4": 0, "lr=3e-4": 1}
    more.save()
    assert [run["name"] for run in json.loads((more.folder / "sweep.json").read_text())["runs"]] == [
        "lr=2e-4", "lr=3e-4", "lr=1e-4",
    ]  # fmt: skip
    for other in (["train.eps=[1e-4,2e-4]"], ["train.lr=[1e-4,2e-4]", "train.steps=9"]):
        with pytest.raises(UserError, match=r"holds the sweep of .*config\.yaml train\.lr=\[\.\.\.\]: give --out"):
            plan_sweep(config, other)


def finish(run: SweepRun, tested: bool = True, config: RunConfig | None = None) -> None:
    run.dir.mkdir(parents=True, exist_ok=True)
    config = config or run.config
    record_training(run.dir, config, 4, 4)
    ids = np.arange(2)
    scores = ScoreMatrix(np.eye(2))
    result = evaluate_retrieval("test", 4, scores, scores.ranks(ids, ids), ["a", "b"], ["A", "B"])
    if tested:
        record_results(run.dir, run.name, config, [result], checkpoint="last", saved=True)


def test_a_run_is_finished_if_it_is_trained_and_tested_with_its_configuration(config: str) -> None:
    one, two, three = plan_sweep(config, ["train.lr=[1e-4,2e-4,3e-4]"]).runs
    assert not one.finished() and one.progress() == (0, 0)
    finish(one)
    finish(two, tested=False)
    assert one.finished() and not two.finished() and one.progress() == (4, 4)
    other = three.config.model_copy(deep=True)
    other.train.lr = 1.0
    finish(three, config=other)
    assert not three.finished()
    finish(three)
    assert three.finished()
    record_training(one.dir, one.config, 2, 8)
    (one.dir / "metrics.jsonl").write_text('{"kind": "train", "step": 5}\n')
    assert not one.finished() and one.progress() == (5, 8)


def scripts(monkeypatch: pytest.MonkeyPatch, **bodies: str) -> None:
    """Let a Python script stand for the training of a run, by the run's learning rate."""

    def commands_of(sweep: Sweep, run: SweepRun) -> list[list[str]]:
        body = bodies[f"lr{run.config.train.lr:.0f}"]
        prepared = f"from pathlib import Path; import signal, sys, time; run = Path({str(run.dir)!r}); {body}"
        return [[sys.executable, "-c", prepared], [sys.executable, "-c", f"print({run.name!r}, 'evaluated')"]]

    monkeypatch.setattr(local, "commands_of", commands_of)


def test_failures_are_listed_with_their_error_and_log(
    config: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    sweep = plan_sweep(config, ["train.lr=[1,2,3]"])
    sweep.save()
    finish(sweep.runs[2])
    fails = "print('error: no shards in x', flush=True); print('bye'); sys.exit(2)"
    scripts(monkeypatch, lr1="print('trained')", lr2=fails, lr3="sys.exit('a finished run is started again')")
    failed, stopped = local.run_local(sweep, 2)
    log = sweep.logs / "lr=2.log"
    assert f"lr=2: started, log in {log}" in caplog.messages and "lr=3: started" not in caplog.text
    assert failed == [f"lr=2: exit code 2: error: no shards in x ({log})"] and stopped == []
    assert "lr=1 evaluated" in (sweep.logs / "lr=1.log").read_text()
    assert "evaluated" not in log.read_text(), "a failed run is not evaluated"
    shown = CliRunner().invoke(app, ["sweep", config, "train.lr=[1,2,3]"])
    assert shown.exit_code == 1 and f"failed: lr=2: exit code 2: error: no shards in x ({log})" in shown.output


def test_runs_share_the_machine_as_asked(config: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sweep = plan_sweep(config, ["train.lr=[1,2]"])
    sweep.save()
    # Each waits for the other: one at a time they would never end.
    meet = "me, other = {}; Path(me).touch(); [time.sleep(0.05) for _ in iter(Path(other).exists, True)]"
    places = [str(tmp_path / name) for name in ("first", "second")]
    scripts(monkeypatch, lr1=meet.format(places), lr2=meet.format(places[::-1]))
    assert local.run_local(sweep, 2) == ([], [])


def test_runs_of_a_killed_sweep_are_not_started_twice(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have the lock of the sweep, whose own process is gone."""
    sweep = plan_sweep(config, ["train.lr=[1,2]"])
    sweep.save()
    with local._alone(sweep.folder) as lock:
        left = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock,))
    held = "print({fd.resolve().name for fd in Path('/proc/self/fd').iterdir()})"
    scripts(monkeypatch, lr1=held, lr2=held)
    with pytest.raises(UserError, match=r"sweep is carried out by another process, or runs that a killed one has left"):
        local.run_local(sweep, 1)
    left.communicate(b"\n")
    assert local.run_local(sweep, 1) == ([], [])
    assert "'lock'" in (sweep.logs / "lr=2.log").read_text(), "runs inherit it"


def test_a_file_system_without_locks(
    config: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    sweep = plan_sweep(config, ["train.lr=[1,2]"])
    sweep.save()
    monkeypatch.setattr("atr_scale.experiments.local.fcntl.flock", flock)
    scripts(monkeypatch, lr1="print('trained')", lr2="print('trained')")
    assert local.run_local(sweep, 2) == ([], []) and "has no locks" in caplog.text


def test_ctrl_c_lets_the_runs_save_and_starts_no_further_one(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = plan_sweep(config, ["train.lr=[1,2]"])
    sweep.save()
    saves = (
        "run.mkdir(parents=True); signal.signal(signal.SIGTERM, lambda *_: (run / 'saved').touch());"
        "signal.signal(signal.SIGINT, lambda *_: (run / 'interrupted').touch()); (run / 'begun').touch();"
        "[time.sleep(0.05) for _ in iter((run / 'saved').exists, True)];"
        "import os; (run / 'group').write_text(str(os.getpgrp()))"
    )
    scripts(monkeypatch, lr1=saves, lr2=saves)
    first, second = sweep.runs

    def press() -> None:
        while not (first.dir / "begun").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press).start()
    failed, stopped = local.run_local(sweep, 1)
    assert failed == [] and [run.name for run in stopped] == ["lr=1", "lr=2"]
    assert (first.dir / "saved").exists() and not (first.dir / "interrupted").exists() and not second.dir.exists()
    # A terminal sends the signal to the whole group of the sweep, which must not hold the runs.
    assert int((first.dir / "group").read_text()) != os.getpgrp()
    assert "evaluated" not in (sweep.logs / "lr=1.log").read_text()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_error_of_a_log_is_its_last_one(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert last_error(log) == "no log"
    log.write_text("ValueError: first\nRuntimeError: second.\nsaved\n")
    assert last_error(log) == "RuntimeError: second"
    told = "srun: error: node1: task 0: Exited with exit code 1\nslurmstepd-node1: error: *** STEP 2.0 CANCELLED ***\n"
    log.write_text(f"[rank0]: RuntimeError: non-finite\n{told}failed\n")
    assert last_error(log) == "[rank0]: RuntimeError: non-finite", "SLURM knows no cause"
    log.write_text("12:00:00 INFO killed\n")
    assert last_error(log) == "12:00:00 INFO killed"


def test_states_on_a_cluster(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = plan_sweep(config, ["train.lr=[1,2,3,4]"])
    calls: list[list[str]] = []

    def call(command: list[str], **variables: Any) -> str:
        calls.append(command)
        assert command[0] != "sbatch" or variables == {"SWEEP": str(sweep.folder)}
        queue = "17 1 RUNNING\n9 0 PENDING\n12 N/A RUNNING"
        return {"sbatch": "17", "bash": "--account=sound", "squeue": queue}[command[0]]

    monkeypatch.setattr(slurm, "_call", call)
    assert [one.state for one in slurm.states(sweep)] == ["not submitted"] * 4 and not calls
    script = ROOT / "slurm/pretrain_wavcaps.sh"
    assert slurm.submit(sweep, sweep.runs[:3], script=script, at_once=2, options=["--nodes=1"]) == "17"
    log = f"--output={sweep.logs}/slurm-%A_%a.log"
    site, submitted = calls
    assert site[-1] == str(ROOT / "slurm/site.sh")
    assert submitted == ["sbatch", "--parsable", "--account=sound", "--array=0,1,2%2", log, "--nodes=1", str(script)]
    finish(sweep.runs[0])
    (sweep.logs / "slurm-17_2.log").write_text("error: out of memory\n")
    again = plan_sweep(config, ["train.lr=[1,2,3,4]"])
    found = slurm.states(again)
    assert [one.state for one in found] == ["finished", "running", "failed", "not submitted"]
    assert found[2].detail == f"error: out of memory ({sweep.logs}/slurm-17_2.log)"
    with pytest.raises(UserError, match="no job script nowhere"):
        slurm.submit(again, again.runs, script=Path("nowhere"), at_once=None)
