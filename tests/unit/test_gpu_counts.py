"""Counts of an update on CUDA tensors without values: what counts, budgets of all cases, and skipping with a reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from atr_scale.encoders.audio_encoders import AUDIO_ENCODERS
from atr_scale.losses.terms import LOSS_TERMS
from atr_scale.scorers import SCORERS
from atr_scale.sections import class_of
from tests.commands import ROOT
from tools.gpu_counts import budgets, guard
from tools.gpu_counts.__main__ import parse

pytestmark = pytest.mark.slow  # most tests read one count, which takes a quarter of a minute


def counted(cases: str, file: Path) -> dict[str, Any]:
    """What a process of its own counts: the guard must be loaded before torch is imported."""
    command = [sys.executable, "-m", "tests.gpu_counts", cases, str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "FakeTensor" not in done.stderr, "a user takes it for a fault of the count"
    found: dict[str, Any] = json.loads(file.read_text())
    if "skipped" in found:
        pytest.skip(found["skipped"])
    return found


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return counted("small", tmp_path_factory.mktemp("counts") / "small.json")


def test_small_cases_keep_their_budgets(small: dict[str, Any]) -> None:
    found = budgets.complaints(small["cases"], budgets.read())
    assert not found, "\n".join(found)


def test_real_cases_keep_their_budgets(tmp_path: Path) -> None:
    found = budgets.complaints(counted("real", tmp_path / "real.json")["cases"], budgets.read())
    assert not found, "\n".join(found)


def test_every_encoder_scorer_and_loss_has_a_case(small: dict[str, Any]) -> None:
    names = set(small["cases"])
    assert names >= {f"scorer {name}" for name in SCORERS}
    assert names >= {f"loss {name}" for name in LOSS_TERMS}
    every = names | set(budgets.read())
    assert every >= {f"loss {name}, dense" for name in LOSS_TERMS}
    kinds = {class_of(AUDIO_ENCODERS[name]).__name__ for name in AUDIO_ENCODERS if f"audio {name}" in every}
    in_full = {"ResNet38", "CLAP"}  # of the real sizes
    assert kinds | in_full == {class_of(build).__name__ for build in AUDIO_ENCODERS.values()}
    assert {f"{name}, 64 x 10 s" for name in in_full} <= every


def test_no_tensor_of_the_host_is_in_an_operation_of_the_device(small: dict[str, Any]) -> None:
    assert not [name for name, case in small["cases"].items() if case["device_mismatches"]]


WAITS = {
    "item": "item",
    "tolist": "tolist",
    "bool": "bool",
    "int": "item",
    "nonzero": "nonzero",
    "index by a mask": "index by a mask",
    "unique": "unique2",
    "bincount": "bincount",
    "repeat_interleave": "repeat_interleave without output_size",
    "torch.tensor": "blocking copy to device",
    "cpu": "blocking copy to host",
    "copy from pinned, blocking": "blocking copy to device",
    "copy from unpinned": "copy to device from memory that is not pinned",
    "synchronize": "torch.cuda.synchronize",
    "event": "Event.synchronize",
}
NO_WAITS = (
    "repeat_interleave with output_size",
    "copy to pinned",
    "copy from pinned",
    "stream",
    "record_stream",
    "views",
    "product",
    "all_reduce",
)


def test_what_makes_the_host_wait(small: dict[str, Any]) -> None:
    found = {name: [p["kind"] for p in case["places"]] for name, case in small["operations"].items()}
    assert {name: found[name] for name in WAITS} == {name: [kind] for name, kind in WAITS.items()}
    assert {name: found[name] for name in NO_WAITS} == {name: [] for name in NO_WAITS}
    copies = {name for name, case in small["operations"].items() if case["blocking_copies"]}
    assert copies == {"torch.tensor", "cpu", "copy from pinned, blocking", "copy from unpinned"}


def test_places_are_lines_of_the_caller(small: dict[str, Any]) -> None:
    (place,) = small["operations"]["item"]["places"]
    file, line = place["place"].split(" ")[0].split(":")
    assert file == "tests/gpu_counts.py" and ".item()" in (ROOT / file).read_text().splitlines()[int(line) - 1]


def test_a_tensor_of_the_host_among_those_of_the_device_is_found(small: dict[str, Any]) -> None:
    case = small["operations"]["CPU tensor"]
    assert (case["device_mismatches"], case["host_syncs"]) == (1, 0)
    assert case["places"][0]["kind"] == "CPU tensor in aten::where"


def test_launches_are_operations_that_move_data(small: dict[str, Any]) -> None:
    found = {name: case["launches"] for name, case in small["operations"].items()}
    assert found["views"] == found["stream"] == found["record_stream"] == 0
    assert found["add to a slice"] == 1, "the copy of a tensor onto itself starts no kernel"
    assert found["copy from pinned"] == found["all_reduce"] == 1 and found["all_reduce on the host"] == 0


def test_flops_of_both_directions(small: dict[str, Any]) -> None:
    found = {name: case["flops"] for name, case in small["operations"].items()}
    assert found["product"] == {"fp32": 3 * 2 * 4 * 8 * 4}
    assert sum(found["grouped convolution"].values()) == 3 * 2 * 2 * 6 * 3 * 8
    products = 2 * 2 * 4 * 16 * 16 * 32  # one of [2, 4, 16, 32] with its transpose
    assert found["attention"] == {"bf16": (2 + 5) * products}, "forward 2, backward 5"
    assert found["attention computed again"] == {"bf16": (2 + 2 + 5) * products}


def test_collectives_have_dtype_bytes_and_device(small: dict[str, Any]) -> None:
    for name, device, nbytes in (("all_reduce", "cuda", 4 * 32), ("all_reduce on the host", "cpu", 4 * 8)):
        (each,) = small["operations"][name]["collectives"]
        assert (each["name"], each["dtype"], each["device"]) == ("allreduce", "float32", device)
        assert (each["bytes"], each["times"]) == (nbytes, 1)


def test_a_new_read_of_the_device_fails_by_its_place(small: dict[str, Any]) -> None:
    name = "scorer pooled"
    assert not budgets.complaints({name: small["cases"][name]}, budgets.read())
    found = "\n".join(budgets.complaints({name: small["injected"]}, budgets.read()))
    assert f"{name}: " in found and "host_syncs are more than the budget" in found
    assert "x item at tests/gpu_counts.py:" in found and " reading (score and loss)" in found


def test_phases_add_up_to_the_update(small: dict[str, Any]) -> None:
    update = small["cases"]["update"]
    assert list(update["phases"]) == [
        "to device", "encode text", "encode audio", "score and loss", "backward", "optimizer"
    ]  # fmt: skip
    for key in ("launches", "bytes", "host_syncs", "deepspeed_syncs", "blocking_copies"):
        assert sum(phase[key] for phase in update["phases"].values()) == update[key]
    assert all(phase["launches"] for phase in update["phases"].values())
    assert {each["device"] for each in update["collectives"]} >= {"cuda"}


def test_a_missing_configuration_is_one_line(small: dict[str, Any]) -> None:
    assert small["bad"].startswith("error: ") and "configs/none.yaml" in small["bad"] and "\n" not in small["bad"]


def test_a_torch_in_which_the_tensors_do_not_run_is_a_reason(small: dict[str, Any]) -> None:
    assert small["unfit"] == f"torch {torch.__version__} does not run CUDA tensors without values: no kernel"


def test_budgets_have_headroom_in_volume_only() -> None:
    budget: dict[str, Any] = {
        "launches": 100,
        "bytes": 1000,
        "host_syncs": 2,
        "deepspeed_syncs": 0,
        "blocking_copies": 0,
    }
    budget |= {"device_mismatches": 0, "flops": {"fp32": 100}}
    place = {"times": 3, "kind": "item", "place": "atr_scale/model.py:7 forward", "phase": "backward"}

    def complaints(**changes: Any) -> list[str]:
        case: dict[str, Any] = {**budget, **changes, "places": [place]}
        return budgets.complaints({"a": case}, {"a": budget})

    assert complaints(launches=105, bytes=951) == []
    (more,) = complaints(launches=106)
    assert more == "a: 106 launches are more than the budget of 100"
    (less,) = complaints(bytes=900)
    assert less == f"a: 900 bytes: lower the budget of 1,000 with {budgets.WRITE}"
    (waits,) = complaints(host_syncs=3)
    assert waits.splitlines()[1] == "    3 x item at atr_scale/model.py:7 forward (backward)"
    (fewer,) = complaints(host_syncs=1)
    assert "lower the budget of 2" in fewer
    rounded = "\n".join(complaints(flops={"tf32": 100}))
    assert "100 tf32 FLOPs are more than the budget of 0" in rounded and "0 fp32 FLOPs: lower" in rounded
    assert budgets.complaints({"b": {}}, {}) == [f"b has no budget: {budgets.WRITE}"]


def test_budgets_and_their_table_are_of_one_count(tmp_path: Path) -> None:
    """docs/performance.md shows what budgets.json says."""
    page = tmp_path / "performance.md"
    page.write_text(budgets.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    budgets.write_table(budgets.read(), budgets.read(budgets.BEFORE), page)
    assert page.read_text(encoding="utf-8") == budgets.PAGE.read_text(encoding="utf-8")
    budgets.write(budgets.read(), tmp_path / "budgets.json")
    assert budgets.read(tmp_path / "budgets.json") == budgets.read()


def test_without_a_compiler_the_command_says_so(tmp_path: Path) -> None:
    environment = {**os.environ, "CXX": "no-such-compiler", "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "tools.gpu_counts", "--json", str(tmp_path / "counts.json")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    if any((Path(torch.__file__).parent / "lib").glob("libtorch_cuda.*")):
        pytest.skip("this torch is built for CUDA")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "skipped: no C++ compiler: install g++, or name one in CXX\n"
    assert json.loads((tmp_path / "counts.json").read_text()) == {"skipped": done.stdout.strip()[9:]}


def test_a_torch_that_the_guard_does_not_fit_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho 'guard.cpp:7: error: no type named DeviceGuard' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(guard.Unavailable, match=r"does not compile with torch .*: guard.cpp:7: error: no type"):
        guard.built(Path(torch.__file__).parent)
    assert not list((tmp_path / "cache").rglob("*.so"))
    compiler.write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(guard, "BUILD_S", 0.1)
    with pytest.raises(guard.Unavailable, match=r"does not compile in 0\.1 s"):
        guard.built(Path(torch.__file__).parent)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(guard.Unavailable, match=r"cannot write .*: set XDG_CACHE_HOME to another folder"):
        guard.built(Path(torch.__file__).parent)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "0"], "'0' is no number of at least 1"),
        (["--global-batch", "-8"], "'-8' is no number of at least 1"),
        (["a.yaml", "--cases", "small"], "give one or the other"),
        (["--json", "/no/such/folder/counts.json"], "no folder /no/such/folder for --json: make it first"),
    ],
)
def test_wrong_arguments_end_before_anything_is_counted(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
