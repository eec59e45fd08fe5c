"""Which GPU a rank takes, what DeepSpeed is told of it, and over which network the ranks meet."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch._C._distributed_c10d import HashStore

from atr_scale.config import RunConfig
from atr_scale.distributed import start
from atr_scale.distributed.start import Place, distributed
from atr_scale.distributed.world import World
from atr_scale.errors import UserError
from atr_scale.model import Retriever
from atr_scale.training.engine import Engine
from tests.tiny_run import tiny_config
from tools.ranks import run_ranks


def visible(monkeypatch: pytest.MonkeyPatch, gpus: int, uuids: str = "") -> list[torch.device]:
    """As if this process saw `gpus` GPUs with these ids. Returns the list of devices that are set."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuids[device.index]))
    return chosen


def test_a_rank_that_sees_one_gpu_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """srun --gpus-per-task=1: the fourth rank of a machine sees one GPU, number 0; so does DeepSpeed."""
    chosen = visible(monkeypatch, 1)
    join = dist.init_process_group
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **o: join("gloo", **{**o, "device_id": None}))
    for name, value in {"SLURM_PROCID": 0, "SLURM_NTASKS": 1, "SLURM_LOCALID": 3}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("RANK", raising=False)
    with distributed() as (_, device):
        assert chosen == [device] == [torch.device("cuda", 0)]
        with start.device_as_local_rank(device):
            assert os.environ["LOCAL_RANK"] == "0"
        assert os.environ["LOCAL_RANK"] == "3", "error files and checks of a machine's first rank read it"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 is not below WORLD_SIZE=2: unset both if they are left over"),
        ({"RANK": "-1", "WORLD_SIZE": "1"}, "RANK=-1 is not below WORLD_SIZE=1"),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "1"}, "SLURM_PROCID=1 is not below SLURM_NTASKS=1"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE=4: a launcher has started several processes"),
        ({"PMI_SIZE": "2", "RANK": "0"}, "PMI_SIZE=2: a launcher has started several processes"),
    ],
)
def test_ranks_that_do_not_fit(variables: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Place.find({"MASTER_ADDR": "127.0.0.1", **variables})


def test_one_process_of_mpi_is_a_world_of_one() -> None:
    assert Place.find({"OMPI_COMM_WORLD_SIZE": "1"}).world_size == 1
    given = {"OMPI_COMM_WORLD_SIZE": "4", "RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "a"}
    assert Place.find(given) == Place(3, 4, 0, "a", 29500)


def devices_that_deepspeed_sets(config: RunConfig) -> list[int]:
    given: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(get_accelerator()), "set_device", lambda self, index: given.append(index))
        patch.setenv("LOCAL_RANK", "3")
        Engine(Retriever(config.model, config.objective), config.train, World(), torch.device("cpu"))
    return given


@pytest.mark.slow
def test_deepspeed_sets_the_device_of_the_engine(tmp_path: Path) -> None:
    """In a process of its own: DeepSpeed keeps the process group of its first start."""
    (given,) = run_ranks(devices_that_deepspeed_sets, 1, tiny_config(tmp_path, tmp_path / "run"))
    assert given and set(given) == {0}


@pytest.mark.parametrize(
    ("gpus", "seen", "sharing"),
    [
        (8, ["abcdefgh"] * 8, None),  # all of the machine
        (1, list("abcdefgh"), None),  # --gpus-per-task=1
        (2, ["ab", "ab", "cd", "cd"], None),  # two tasks with two GPUs each
        (2, ["ab"] * 4, "ranks 0 and 2"),  # four ranks, two GPUs
        (1, ["a", "a"], "ranks 0 and 1"),  # CUDA_VISIBLE_DEVICES=0 for all
    ],
)
def test_two_ranks_with_one_gpu_are_one_line(
    monkeypatch: pytest.MonkeyPatch, gpus: int, seen: list[str], sharing: str | None
) -> None:
    store, errors = HashStore(), []
    for rank, uuids in enumerate(seen):
        visible(monkeypatch, gpus, uuids)
        place = Place(rank, len(seen), rank, "a", 1)
        try:
            start._claim(start._device(place), place, store)
        except UserError as error:
            errors.append(str(error))
    assert bool(errors) == bool(sharing) and (not sharing or sharing in errors[0])
    assert all("CUDA_VISIBLE_DEVICES" in line and "\n" not in line for line in errors)


@pytest.mark.parametrize(
    ("own", "expected"), [("10.0.0.7", "eth1"), ("127.0.0.1", None), ("10.9.9.9", None), (None, None)]
)
def test_gloo_takes_the_interface_that_leads_to_the_first_rank(
    monkeypatch: pytest.MonkeyPatch, own: str | None, expected: str | None
) -> None:
    """Not the one of the machine's own name, which is often written down as 127.0.1.1."""

    class Probe:
        def __init__(self, *kind: Any) -> None: ...
        def __enter__(self) -> Probe:
            return self

        def __exit__(self, *error: object) -> None: ...

        def connect(self, address: tuple[str, int]) -> None:
            if own is None:
                raise OSError("no route")

        def getsockname(self) -> tuple[str, int]:
            return own or "", 9

    addresses = {"lo": "127.0.0.1", "eth0": "192.168.0.7", "eth1": "10.0.0.7"}
    monkeypatch.setattr(socket, "socket", Probe)
    found = {name: [SimpleNamespace(address=address)] for name, address in addresses.items()}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: found)
    assert start._interface_towards("10.0.0.1") == expected


@pytest.mark.parametrize(("rank", "whom"), [("0", "ranks 1, 2"), ("1", "rank 0")])
def test_left_over_variables_are_one_line_that_names_the_missing_ranks(
    rank: str, whom: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    left_over = {"RANK": rank, "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in left_over.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(start, "JOIN_TIMEOUT_ALONE", timedelta(seconds=1))
    monkeypatch.setattr(start, "SAY_S", 0.5)
    with (
        pytest.raises(UserError, match=rf"rank {rank} of 3 has waited 1 s at .* for {whom}: .* unset RANK"),
        distributed(),
    ):
        pass
    assert f"rank {rank} waits for {whom}" in caplog.text


def test_every_group_has_the_timeout_of_the_run() -> None:
    """A group that DeepSpeed makes would wait 10 minutes with NCCL, less than a declared wait may take."""
    usual = dist.distributed_c10d.default_pg_timeout
    with distributed(timeout_s=4000.0):
        groups: list[Any] = [dist.group.WORLD, dist.new_group()]
        found = [group._get_backend(torch.device("cpu")).options._timeout for group in groups]
    assert found == [timedelta(seconds=4000)] * 2
    assert dist.distributed_c10d.default_pg_timeout == usual
