"""The same run under every launcher: they only start processes, so the losses agree."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.tiny import TinyInputs, make_tiny_inputs, read_training, write_tiny_config

ROOT = Path(__file__).parents[2]
PROGRAMS = Path(sys.executable).parent  # of the same environment
STEPS = 4
TRAIN = ["-m", "atr_scale.train"]
ACCELERATE = [str(PROGRAMS / "accelerate"), "launch", "--config_file"]
CLOUD = ROOT / "launch/cloud.sh"
# A launcher is one command a machine; several machines are this one several times.
LAUNCHERS = {
    "torchrun": [[str(PROGRAMS / "torchrun"), "--standalone", "--nproc-per-node", "2", *TRAIN]],
    "accelerate": [[*ACCELERATE, "launch/accelerate/cpu.yaml", *TRAIN]],
    "accelerate, one node": [[*ACCELERATE, "launch/accelerate/one_node.yaml", "--num_processes", "2", *TRAIN]],
    "accelerate, many nodes": [
        [*ACCELERATE, "launch/accelerate/many_nodes.yaml", *numbers, "--main_process_port", "PORT", *TRAIN]
        for numbers in (["--num_processes", "2", "--machine_rank", rank] for rank in "01")
    ],
    "cloud.sh": [[str(CLOUD), "2", "127.0.0.1"]] * 2,
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyInputs:
    return make_tiny_inputs(tmp_path_factory.mktemp("tiny"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def losses(launcher: list[list[str]], tiny: TinyInputs, folder: Path) -> tuple[list[float], int]:
    """Loss of each step under `launcher`, and how many ranks there were."""
    config = write_tiny_config(folder / "config.yaml", tiny, folder / "run", steps=STEPS)
    launchers_own = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")
    environment = {key: value for key, value in os.environ.items() if key not in launchers_own}
    port = str(free_port())
    environment |= {"OMP_NUM_THREADS": "1", "MASTER_PORT": port, "PROCESSES": "1"}
    machines = []
    for number, command in enumerate(launcher):
        command = [port if part == "PORT" else part for part in command]
        with open(folder / f"machine-{number}.log", "w") as log:
            machines.append(
                subprocess.Popen([*command, str(config)], cwd=ROOT, env=environment, stdout=log, stderr=log)
            )
    try:
        codes = [machine.wait(timeout=240) for machine in machines]
    finally:
        for machine in machines:
            machine.terminate()  # launchers end their workers
    logs = "".join(path.read_text()[-4000:] for path in sorted(folder.glob("machine-*.log")))
    assert not any(codes), logs
    lines = read_training(folder / "run")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    state = yaml.safe_load((folder / f"run/checkpoints/step-{STEPS}/state.json").read_text())
    return [line["loss"] for line in lines], state["world_size"]


@pytest.fixture(scope="module")
def alone(tiny: TinyInputs, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    values, ranks = losses([[sys.executable, *TRAIN]], tiny, tmp_path_factory.mktemp("alone"))
    assert ranks == 1
    return values


@pytest.mark.parametrize("name", LAUNCHERS)
def test_two_processes_lose_as_one(name: str, tiny: TinyInputs, alone: list[float], tmp_path: Path) -> None:
    if name == "cloud.sh" and not PROGRAMS.is_relative_to(ROOT):
        pytest.skip("cloud.sh would install an environment; launch/test.sh has done so")
    values, ranks = losses(LAUNCHERS[name], tiny, tmp_path)
    assert ranks == 2
    assert len(set(values)) == STEPS, "the model does not move"
    assert values == pytest.approx(alone, rel=1e-5)


def report_of(launcher: list[str], folder: Path, *arguments: str) -> list[str]:
    """Lines of what a failing launcher and its ranks print, without the rule that closes the launcher's report."""
    launchers_own = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in launchers_own}
    path = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [*launcher, *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240
    )
    assert done.returncode == 1, done.stdout  # the launcher's own code
    lines = done.stdout.rstrip().splitlines()
    assert set(lines.pop()) == {"="}, done.stdout
    return lines


@pytest.mark.parametrize(
    ("name", "override", "cause"),
    [
        ("torchrun", "trian.lr=1", "unknown key 'trian'; did you mean 'train'?"),
        ("torchrun", "data.train[0].shards=nowhere", "no shards in nowhere"),  # seen after the ranks have met
        ("accelerate", "trian.lr=1", "unknown key 'trian'; did you mean 'train'?"),
    ],
)
def test_a_mistake_of_all_ranks_is_told_once_and_last(
    name: str, override: str, cause: str, tiny: TinyInputs, tmp_path: Path
) -> None:
    config = write_tiny_config(tmp_path / "config.yaml", tiny, tmp_path / "run")
    lines = report_of(LAUNCHERS[name][0], tmp_path, str(config), override)
    text = "\n".join(lines)
    assert text.count(cause) == 1 and lines[-1].startswith("  traceback : error: ") and cause in lines[-1], text
    assert "Traceback" not in text.partition("Traceback")[2], "only the launcher's own"
    codes = [line.split()[2] for line in lines if line.startswith("  exitcode  :")]
    assert codes == ["2", "2"], text


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_mistake_of_one_rank_is_told_by_it(rank: str, tiny: TinyInputs, tmp_path: Path) -> None:
    """The other rank waits for it in a collective of the first step meanwhile. Its failure, if any, comes second."""
    (tmp_path / "one_rank_lacks.py").write_text(
        "import os\n"
        "from atr_scale import errors\n"
        "from atr_scale.training import engine\n"
        "errors.GRACE_S = 1.0\n"
        "update = engine.Engine.update\n"
        "def lacking(*given, **named):\n"
        f"    if os.environ['RANK'] == '{rank}':\n"
        "        raise errors.UserError('no table here')\n"
        "    return update(*given, **named)\n"
        "engine.Engine.update = lacking\n"
    )
    config = write_tiny_config(tmp_path / "config.yaml", tiny, tmp_path / "run")
    lines = report_of(LAUNCHERS["torchrun"][0], tmp_path, str(config), "--plugins", "one_rank_lacks")
    text = "\n".join(lines)
    assert text.count("no table here") == 1 and lines[-1] == "  traceback : error: no table here", text
    assert f"rank      : {rank} " in "\n".join(lines[-5:])


def test_a_failure_ends_the_report(tiny: TinyInputs, tmp_path: Path) -> None:
    """No mistake of the user: the last text is the traceback of the rank that failed first."""
    (tmp_path / "failing.py").write_text(
        "from atr_scale.training import engine\n"
        "def fail(*_, **__):\n"
        "    raise RuntimeError('out of order')\n"
        "engine.Engine.update = fail\n"
    )
    config = write_tiny_config(tmp_path / "config.yaml", tiny, tmp_path / "run")
    lines = report_of(LAUNCHERS["torchrun"][0], tmp_path, str(config), "--plugins", "failing")
    assert "RuntimeError: out of order" in "\n".join(lines[-3:]), "\n".join(lines[-60:])
