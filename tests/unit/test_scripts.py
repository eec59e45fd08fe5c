"""Every shell script parses, passes shellcheck, may be executed, and tells its mistakes in one line."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("launch", "slurm", "tools")
SCRIPTS = sorted([*(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.sh")), *(ROOT / ".ci").iterdir()])
SOURCED = {"slurm/prologue.sh", "slurm/site.sh", "launch/demo.sh"}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def call(*command: str | Path, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=240
    )


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_script_parses(path: Path) -> None:
    result = call("bash", "-n", path)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_shellcheck_finds_nothing(path: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    result = call("shellcheck", "--external-sources", name(path), cwd=ROOT)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_script_is_strict_and_can_be_started(path: Path) -> None:
    text = path.read_text()
    assert "set -euo pipefail" in text
    if name(path) in SOURCED:
        return
    assert text.startswith("#!/usr/bin/env bash\n")
    assert os.access(path, os.X_OK), "not executable"


def one_line(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    return line


def without_environment(folder: Path) -> Path:
    """What launch/environment.sh reads, copied to `folder`: the repository may have its environment already."""
    (folder / "launch").mkdir()
    for file in ("pyproject.toml", "launch/environment.sh", "launch/constraints.txt", "launch/cuda.txt"):
        shutil.copy(ROOT / file, folder / file)
    (folder / "atr_scale").mkdir()
    return folder / "launch/environment.sh"


def test_environment_that_is_a_link_is_left_as_it_is(tmp_path: Path) -> None:
    script = without_environment(tmp_path)
    (tmp_path / "other/bin").mkdir(parents=True)
    (tmp_path / "other/bin/activate").write_text("of another checkout\n")
    (tmp_path / ".venv").symlink_to("other")
    line = one_line(call("bash", script, cwd=tmp_path))
    assert ".venv is a link to other, which is no environment of this repository: remove the link" in line
    assert (tmp_path / "other/bin/activate").exists()


def test_environment_without_a_new_enough_python(tmp_path: Path) -> None:
    script = without_environment(tmp_path)
    programs = tmp_path / "programs"
    programs.mkdir()
    for program in ("bash", "dirname", "cat", "flock", "sha256sum", "cut", "grep"):
        (programs / program).symlink_to(shutil.which(program) or "")
    old = programs / "python3"
    old.write_text("#!/bin/bash\nexit 1\n")
    old.chmod(0o755)
    result = call(programs / "bash", script, cwd=tmp_path, PATH=str(programs), PYTHON="")
    assert "Python 3.11" in one_line(result)
    assert not (tmp_path / ".venv").exists()


def test_constraints_pin_every_direct_dependency() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {item.split(">")[0].split("[")[0].strip().lower() for item in wanted}
    lines = (ROOT / "launch/constraints.txt").read_text().splitlines()
    pins = dict(line.lower().split("==") for line in lines if line and not line.startswith("#"))
    assert names <= set(pins), f"not pinned: {names - set(pins)}"
    assert not any("+" in version for version in pins.values()), "a local version exists in one index alone"


def test_cloud_script_says_what_it_wants() -> None:
    assert "MACHINES" in one_line(call(ROOT / "launch/cloud.sh", "configs/pretrain_wavcaps.yaml"))

    for words, mistake in (
        (("2:1", "here"), "the smaller number first"),
        (("2", "here:29500"), "the port as MASTER_PORT"),
        (("0", "here"), "usage"),
    ):
        assert mistake in one_line(call(ROOT / "launch/cloud.sh", *words, "config.yaml"))
    for variable in ("PROCESSES=0", "MASTER_PORT=ssh", "MAX_RESTARTS=-1"):
        assert "give a number" in one_line(call("env", variable, ROOT / "launch/cloud.sh", "2", "here", "config.yaml"))


# How the ranks of a machine end, what signal the script gets meanwhile, its exit code and a part of its last line.
ENDS = [
    (0, None, 0, "done"),
    (0, "TERM", 0, "done"),
    (1, None, 1, "was started again 1 times already"),
    (2, None, 2, "it is not tried again"),
    (69, None, 1, "fewer machines"),
    (1, "TERM", 1, "told to stop, and failed with exit code 1"),
    (75, "TERM", 0, "told to stop, and nothing was saved"),
    (0, "TERM, saves", 0, "goes on from its last checkpoint"),
    (1, "TERM, saves", 1, "told to stop, and failed with exit code 1"),
]


@pytest.mark.parametrize(("ends", "signal", "code", "says"), ENDS)
def test_what_the_cloud_script_makes_of_the_ranks(
    ends: int, signal: str | None, code: int, says: str, tmp_path: Path
) -> None:
    (tmp_path / "launch").mkdir()
    for name in ("cloud.sh", "environment.sh"):
        shutil.copy(ROOT / "launch" / name, tmp_path / "launch")
    python = tmp_path / "python"
    told, _, saves = (signal or "").partition(", ")
    does = (f"kill -{told} $PPID; " if told else "") + (
        f"mkdir '{tmp_path}/a run'; touch '{tmp_path}/a run/preempted'; " if saves else ""
    )
    python.write_text(
        "#!/bin/bash\ntrap '' TERM\ncase $2 in\n"
        f"atr_scale.job_inputs) echo '{tmp_path}/a run' ;;\n"
        f"atr_scale.machine_ranks) {does} sleep 0.2; echo 'error: fewer machines came' >&2; exit {ends} ;;\nesac\n"
    )
    python.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    command = tmp_path / "launch/cloud.sh", "2", "here", "config.yaml"
    result = call(*command, PATH=path, MAX_RESTARTS="1", PROCESSES="1")
    said = (result.stderr + result.stdout).splitlines()
    assert (result.returncode, says in said[-1]) == (code, True), said


JOB_SCRIPTS = ["train", "pretrain_wavcaps", "estimate_correspondences", "finetune_clotho", "evaluate"]


def outside_of_a_job(script: str, *arguments: str, path: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")} | {"PATH": path}
    command = [str(ROOT / f"slurm/{script}.sh"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize("script", JOB_SCRIPTS)
def test_job_script_on_a_machine_without_slurm(script: str, tmp_path: Path) -> None:
    for program in ("bash", "env", "dirname"):
        (tmp_path / program).symlink_to(shutil.which(program) or "")
    assert "no sbatch on this machine" in one_line(outside_of_a_job(script, path=str(tmp_path)))


@pytest.mark.parametrize("script", JOB_SCRIPTS)
def test_job_script_submits_itself(script: str, tmp_path: Path) -> None:
    """Options of sbatch come first, arguments of the job behind the script."""
    (tmp_path / "sbatch").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "sbatch").chmod(0o755)
    result = outside_of_a_job(
        script, "--parsable", "--nodes=2", "one", "--two", path=f"{tmp_path}:{os.environ['PATH']}"
    )
    assert result.stdout.splitlines() == ["--parsable", "--nodes=2", f"slurm/{script}.sh", "one", "--two"]
    result = outside_of_a_job(script, "--parsable", "one", path=f"{tmp_path}:{os.environ['PATH']}")
    assert result.stdout.splitlines() == ["--parsable", f"slurm/{script}.sh", "one"]
    for words, better in ((("--nodes", "4"), "write --nodes=4"), (("-p", "gpu"), "write -pgpu")):
        result = outside_of_a_job(script, "--hold", *words, "a=1", path=f"{tmp_path}:{os.environ['PATH']}")
        assert better in one_line(result)
