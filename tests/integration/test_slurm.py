"""The job scripts on a SLURM cluster in a box: preempted in the middle, one saves, requeues itself and completes."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from atr_scale.experiments.sweep import last_error
from atr_scale.status import read_status
from tests.faults.audit import read_audit
from tests.tiny import TinyInputs, make_tiny_inputs, read_training, write_tiny_config
from tools.cluster import ROOT, Cluster, no_cluster, running_cluster

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes, one more than a job takes."""
    if reason := no_cluster():
        pytest.skip(reason)
    with running_cluster(tmp_path_factory.mktemp("cluster") / "lab", 3) as cluster:
        yield cluster


@pytest.fixture
def cluster(lab: Cluster) -> Cluster:
    """All nodes are free. After a test they may still be ending its job, or be starting."""
    deadline = time.monotonic() + 120
    while lab.idle() < 3:
        assert time.monotonic() < deadline, lab.call("sinfo", "--Node", "--long")
        time.sleep(0.3)
    return lab


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyInputs:
    return make_tiny_inputs(tmp_path_factory.mktemp("tiny"))


def steps(run_dir: Path) -> list[float]:
    try:
        return [line["step"] for line in read_training(run_dir)]
    except (FileNotFoundError, ValueError):  # not begun, or in the middle of a line
        return []


def test_preempted_job_saves_requeues_and_completes(cluster: Cluster, tiny: TinyInputs, tmp_path: Path) -> None:
    run_dir, total = tmp_path / "run", 120
    config = write_tiny_config(tmp_path / "config.yaml", tiny, run_dir, steps=total, checkpoint_every=total)
    number = cluster.submit(config)
    cluster.wait(number, lambda: len(steps(run_dir)) >= 5)
    cluster.call("scancel", "--signal=USR1", "--batch", number)
    cluster.wait(number, lambda: (run_dir / "preempted").exists())
    (saved,) = [int(path.name.removeprefix("step-")) for path in (run_dir / "checkpoints").glob("step-*")]
    assert 5 <= saved < total

    job = cluster.finish(number)
    log = cluster.log(number)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), log
    assert steps(run_dir) == list(range(1, total + 1))
    assert not (run_dir / "preempted").exists()
    assert f"saved at step {saved} of {total}" in log and f"steps {saved} to {total}" in log
    assert "2 ranks" in log


def test_both_stages_in_one_chain(cluster: Cluster, tiny: TinyInputs, tmp_path: Path) -> None:
    """Pretraining, the tables of what it has learnt, and distillation from them, submitted at once."""
    stage1, stage2, tables = tmp_path / "stage1", tmp_path / "stage2", tmp_path / "tables"
    config = write_tiny_config(tmp_path / "config.yaml", tiny, stage1)
    first = cluster.submit(config)
    estimate = ("--shards", str(tiny.shards), "--out", str(tables))
    second = cluster.sbatch("estimate_correspondences", str(stage1), *estimate, after=first)
    third = cluster.sbatch(
        "finetune_clotho",
        f"run.dir={stage2}",
        f"train.initial_checkpoint={stage1}",
        "objective.distillation.weight=1",
        f"objective.distillation.tables=[{tables}/stage1.safetensors]",
        after=second,
        CONFIG=str(config),
    )
    fourth = cluster.sbatch("evaluate", str(stage2), "--shards", str(tiny.shards), after=third)
    for number in (first, second, third, fourth):
        assert cluster.finish(number)["JobState"] == "COMPLETED", cluster.log(number)
    assert " done: " in cluster.last_line(third) and (stage2 / "results.json").exists(), cluster.log(fourth)
    assert "t2a/mAP@10" in cluster.log(second)
    assert all("loss/distillation" in line for line in read_training(stage2))
    assert steps(stage2) == [1, 2, 3, 4]


def test_failing_job_requeues_up_to_the_cap(cluster: Cluster, tiny: TinyInputs, tmp_path: Path) -> None:
    """A learning rate that makes the loss non-finite, which aborts training with exit code 1."""
    config = write_tiny_config(tmp_path / "config.yaml", tiny, tmp_path / "run", steps=20)
    number = cluster.submit(config, "train.lr=1e38", "train.warmup_steps=0", MAX_FAILURES="1")
    job = cluster.finish(number)
    assert (job["JobState"], job["Restarts"]) == ("FAILED", "1"), cluster.log(number)
    assert "requeued (1 of at most 1)" in cluster.log(number)
    assert "error: 3 non-finite steps" in last_error(cluster.folder / f"job-{number}.log"), "the cause"


def test_mistake_in_the_configuration_is_not_tried_again(cluster: Cluster, tiny: TinyInputs, tmp_path: Path) -> None:
    config = write_tiny_config(tmp_path / "config.yaml", tiny, tmp_path / "run")
    number = cluster.submit(config, "train.stepps=20")
    job = cluster.finish(number)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "2:0", "0")
    assert "did you mean 'train.steps'" in cluster.log(number)


def test_a_mistake_of_all_ranks_is_told_once(cluster: Cluster, tiny: TinyInputs, tmp_path: Path) -> None:
    """One that is found only by the ranks, on both nodes."""
    config = write_tiny_config(tmp_path / "config.yaml", tiny, tmp_path / "run")
    number = cluster.submit(config, "data.train[0].shards=nowhere")
    job = cluster.finish(number)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "2:0", "0"), cluster.log(number)
    assert cluster.log(number).count("error: no shards in nowhere") == 1, cluster.log(number)


def test_sweep_of_two_configurations_and_two_seeds(cluster: Cluster, tiny: TinyInputs, tmp_path: Path) -> None:
    """An array job, of which the task with the array's own number is preempted; then the runs are compared.

    The preempted one has steps enough to be still in training then.
    """
    folder, few, many = tmp_path / "sweep", 4, 100
    config = write_tiny_config(tmp_path / "config.yaml", tiny, tmp_path / "run", checkpoint_every=many)
    command = ["python", "-m", "atr_scale.cli", "sweep", str(config), f"train.steps=[{few},{many}]", "--seeds", "2"]
    command += [f"data.test={tiny.shards}", "--out", str(folder), "--slurm", "--at-once", "4"]
    size = "--nodes=1 --ntasks-per-node=1 --gpus-per-node=0 --cpus-per-task=1"
    said = cluster.call(*command, "--sbatch", size)
    assert said.count("not submitted") == 4
    (job,) = re.findall(r"submitted: job (\d+) with 4 runs", said)
    names = {f"steps={count},seed={seed}": count for count in (few, many) for seed in (0, 1)}
    last = folder / f"steps={many},seed=1"

    cluster.wait(job, lambda: len(steps(last)) >= 1)
    cluster.call("scancel", "--signal=USR1", "--batch", f"{job}_3")
    shown = cluster.call(*command)
    assert "failed" not in shown and "submitted" not in shown and f"{last.name}: step " in shown
    log = folder / f"logs/slurm-{job}_3.log"
    cluster.wait(job, lambda: cluster.call("squeue", "--noheader", "--me", "--name=pretrain_wavcaps") == "")
    assert "all 4 runs finished" in cluster.call(*command)
    assert log.read_text().count("requeued (1 of at most 100)") == 1
    assert all("requeued" not in (folder / f"logs/slurm-{job}_{task}.log").read_text() for task in range(3))
    assert all(steps(folder / name) == list(range(1, count + 1)) for name, count in names.items())
    compared = cluster.call("python", "-m", "atr_scale.cli", "compare", str(folder), "--by", "duration")
    assert "| experiment | seeds | step | train.steps |" in compared
    assert all(f"| steps={count} | 0, 1 | {count} | {count} |" in compared for count in (few, many))
    assert f"Differences to steps={few}" in compared and "t2a/R@1 by duration" in compared
    rows = [line for line in compared.splitlines() if line.startswith("| steps=")]
    assert any("±" in row for row in rows)


def test_cancelled_job_stays_cancelled(cluster: Cluster, tiny: TinyInputs, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    config = write_tiny_config(tmp_path / "config.yaml", tiny, run_dir, steps=100_000, checkpoint_every=100_000)
    number = cluster.submit(config)
    cluster.wait(number, lambda: len(steps(run_dir)) >= 2)
    cluster.call("scancel", number)
    job = cluster.finish(number)
    time.sleep(2)
    assert (job["JobState"], cluster.job(number)["JobState"]) == ("CANCELLED", "CANCELLED"), cluster.log(number)
    assert cluster.job(number)["Restarts"] == "0"


def test_a_lost_node_is_replaced_by_the_spare_one(cluster: Cluster, tiny: TinyInputs, tmp_path: Path) -> None:
    run_dir, total = tmp_path / "run", 150
    config = write_tiny_config(tmp_path / "config.yaml", tiny, run_dir, steps=total, checkpoint_every=5)
    number = cluster.submit(config)
    cluster.wait(number, lambda: len(steps(run_dir)) >= 12)
    lost = cluster.nodes(number)[1]
    cluster.lab("kill", lost)
    try:
        job = cluster.finish(number)
        assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), cluster.log(number)
        assert lost not in cluster.nodes(number)
        assert steps(run_dir) == list(range(1, total + 1))
        assert "start 2, on " in cluster.log(number) and " done: " in cluster.last_line(number)
    finally:
        cluster.lab("boot", lost)


@pytest.mark.parametrize(
    ("options", "ranks"),
    [
        ("--nodes=1-2 --gpus-per-node=2 --cpus-per-task=6", [f"{rank} of 4, 3 CPUs, GPUs 0,1" for rank in range(4)]),
        (
            "--gpus-per-node=0 --gres=gpu:2 --ntasks-per-node=2 --cpus-per-task=3",
            [f"{rank} of 2, 3 CPUs, GPUs 0,1" for rank in range(2)],
        ),
        (
            "--gpus-per-node=4 --cpus-per-task=2",
            ["error: 2 CPUs for 4 GPUs of each node: give --cpus-per-task=4 or more"],
        ),
    ],
)
def test_ranks_of_a_job_and_their_cpus_and_gpus(
    cluster: Cluster, tmp_path: Path, options: str, ranks: list[str]
) -> None:
    """A rank for each GPU if no number of tasks is given."""
    script = tmp_path / "script.sh"
    words = "$SLURM_PROCID of $SLURM_NTASKS, $SLURM_CPUS_PER_TASK CPUs, GPUs $SLURM_STEP_GPUS"
    script.write_text(f"#!/bin/bash\nsource slurm/prologue.sh\nwork test bash -c 'echo {words}'\n")
    log = f"--output={cluster.folder}/job-%j.log"
    number = cluster.call("sbatch", "--parsable", *options.split(), log, str(script), HEALTH_SECONDS="0")
    cluster.finish(number)
    assert sorted(cluster.log(number).splitlines()[:-1]) == ranks, cluster.log(number)


def test_nodes_among_which_the_batch_does_not_divide_have_no_ranks(
    cluster: Cluster, tiny: TinyInputs, tmp_path: Path
) -> None:
    """A batch of four on three nodes. The ranks tell where they are, and do not train."""
    config = write_tiny_config(tmp_path / "config.yaml", tiny, tmp_path / "run")
    script = tmp_path / "script.sh"
    words = "$SLURM_PROCID of $SLURM_NTASKS on $SLURMD_NODENAME"
    ranks = f"""ranks() {{ srun "${{step[@]}}" bash -c 'echo {words}'; }}"""
    script.write_text(f"#!/bin/bash\nsource slurm/prologue.sh\n{ranks}\ntrain {config}\n")
    options = ("--parsable", "--nodes=1-3", f"--output={cluster.folder}/job-%j.log")
    number = cluster.call("sbatch", *options, str(script), HEALTH_SECONDS="0")
    cluster.finish(number)
    said, *ranks_said, _ = cluster.log(number).splitlines()
    assert "2 of 3 nodes have ranks" in said and "divide among 3 ranks" in said, cluster.log(number)
    assert sorted(ranks_said) == ["0 of 2 on node1", "1 of 2 on node2"]


def test_a_job_for_a_range_of_nodes_shrinks_and_grows(cluster: Cluster, tiny: TinyInputs, tmp_path: Path) -> None:
    """By itself, even if its first node is lost, on which the job script runs. The third node is in use, then away."""
    jobs: dict[str, str] = {}
    train: dict[str, Any] = {"steps": 30, "checkpoint_every": 4, "lr": 1e-4}  # losses do not get tiny
    for name, nodes, more in (("undisturbed", "1", {"SBATCH_EXCLUSIVE": "exclusive"}), ("run", "1-2", {})):
        config = write_tiny_config(tmp_path / f"{name}.yaml", tiny, tmp_path / name, **train)
        recorder = ('plugins=["tools.rehearse.recorder"]',)
        variables = {"AUDIT": str(tmp_path / f"{name}.audit"), "STEP_SECONDS": "0.1", "HEALTH_SECONDS": "0", **more}
        jobs[name] = cluster.sbatch("train", str(config), *recorder, nodes=nodes, **variables)
    job, run_dir = jobs["run"], tmp_path / "run"
    cluster.wait(job, lambda: cluster.job(job)["JobState"] == "RUNNING")
    (away,), (lost, kept) = cluster.nodes(jobs["undisturbed"]), cluster.nodes(job)
    cluster.call("scontrol", "update", f"NodeName={away}", "State=DRAIN", "Reason=away")
    try:
        cluster.wait(job, lambda: len(steps(run_dir)) >= 6)
        cluster.lab("kill", lost)
        try:
            cluster.call("scontrol", "update", f"NodeName={lost}", "State=DOWN", "Reason=lost")  # soon it is anyway
            cluster.wait(job, lambda: len(steps(run_dir)) >= 12)
            assert cluster.nodes(job) == [kept]
        finally:
            cluster.lab("boot", lost)
        cluster.wait(job, lambda: cluster.idle() >= 1)
        cluster.call("scancel", "--signal=USR1", "--batch", job)
        state = cluster.finish(job)
    finally:
        cluster.call("scontrol", "update", f"NodeName={away}", "State=RESUME")
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "2"), cluster.log(job)
    assert [attempt.world_size for attempt in read_status(run_dir).attempts] == [2, 1, 2]
    assert cluster.finish(jobs["undisturbed"])["JobState"] == "COMPLETED", cluster.log(jobs["undisturbed"])
    losses, samples = {}, {}
    for name in jobs:
        losses[name] = {line["step"]: line["loss"] for line in read_training(tmp_path / name)}
        samples[name] = sorted((row.step, row.key) for row in read_audit(tmp_path / f"{name}.audit", tiny.text_encoder))
    assert losses["run"] == pytest.approx(losses["undisturbed"], rel=1e-5) and len(losses["run"]) == train["steps"]
    assert samples["run"] == samples["undisturbed"] and len(samples["run"]) == 4 * train["steps"]


def test_a_node_that_hangs_is_left_out(cluster: Cluster, tiny: TinyInputs, tmp_path: Path) -> None:
    """Its Python never answers. The health check ends, names the node, and the next start goes without it."""
    run_dir = tmp_path / "run"
    config = write_tiny_config(tmp_path / "config.yaml", tiny, run_dir)
    hanging = tmp_path / "python"
    hanging.write_text("#!/bin/sh\nexec sleep 600\n")
    hanging.chmod(0o755)
    within = ["nsenter", "--mount", "--target", (cluster.folder / "node1.pid").read_text().strip()]
    python = str(Path(sys.executable).resolve())
    subprocess.run([*within, "mount", "--bind", str(hanging), python], check=True)
    try:
        cluster.call("scontrol", "update", "NodeName=node3", "State=DRAIN", "Reason=for later")  # else it may be taken
        number = cluster.submit(config, HEALTH_SECONDS="40")
        cluster.wait(number, lambda: cluster.job(number)["JobState"] == "RUNNING")
        cluster.call("scontrol", "update", "NodeName=node3", "State=RESUME")
        cluster.wait(number, lambda: "start 2, on " in cluster.log(number), seconds=150)
    finally:
        cluster.lab("kill", "node1")
        cluster.lab("boot", "node1")
    job = cluster.finish(number)
    log = cluster.log(number)
    assert "the health check failed on node1: requeued (1 of at most 2)" in log, log
    assert (job["JobState"], cluster.nodes(number)) == ("COMPLETED", ["node2", "node3"]), log
    assert steps(run_dir) == [1, 2, 3, 4]


def test_the_time_limit_requeues_until_the_cap(cluster: Cluster, tiny: TinyInputs, tmp_path: Path) -> None:
    """A limit of a minute, which SLURM announces to the script; a job that waits for this one must not start then."""
    run_dir, total = tmp_path / "run", 100_000
    config = write_tiny_config(tmp_path / "config.yaml", tiny, run_dir, steps=total, checkpoint_every=total)
    number = cluster.submit(config, MAX_REQUEUES="0", SBATCH_TIMELIMIT="1", SBATCH_SIGNAL="B:USR1@30")
    job = cluster.finish(number)
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "1:0"), cluster.log(number)
    assert "submit it again to go on" in cluster.last_line(number)
    assert (run_dir / "preempted").exists(), "also if the first step has not been made yet"


def test_shards_are_copied_to_a_disk_of_each_node(cluster: Cluster, tiny: TinyInputs, tmp_path: Path) -> None:
    """Submitted by the script itself; the second start of the run copies nothing."""
    config = write_tiny_config(tmp_path / "config.yaml", tiny, tmp_path / "run")
    script = (str(ROOT / "slurm/pretrain_wavcaps.sh"), "--parsable", "--nodes=2", "--ntasks-per-node=1")
    size = ("--gpus-per-node=0", "--cpus-per-task=1", f"--output={cluster.folder}/job-%j.log")
    stage = tmp_path / "local"
    for total, copied in ((4, True), (6, False)):
        number = cluster.call(*script, *size, f"train.steps={total}", CONFIG=str(config), STAGE=str(stage))
        before = {path: path.stat().st_mtime_ns for path in stage.rglob("*.tar")}
        assert cluster.finish(number)["JobState"] == "COMPLETED", cluster.log(number)
        after = {path: path.stat().st_mtime_ns for path in stage.rglob("*.tar")}
        assert after and (before != after) == copied
        assert steps(tmp_path / "run") == list(range(1, total + 1))
        resolved = (tmp_path / f"run/checkpoints/step-{total}/config.resolved.yaml").read_text()
        assert f"shards: {stage}/" in resolved
