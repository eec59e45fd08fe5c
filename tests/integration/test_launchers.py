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
