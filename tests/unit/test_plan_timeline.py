"""The time of a planned step: what the network hides beside the GPU's work, rates of a real card, and advice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atr_scale.config import RunConfig
from atr_scale.errors import UserError
from atr_scale.planner.advice import advise, with_train
from atr_scale.planner.costs import Costs
from atr_scale.planner.estimate import StepEstimate, estimate_step
from atr_scale.planner.gpus import GPU, find_gpu
from atr_scale.planner.planner import measure_costs
from atr_scale.planner.timeline import Cluster, Work, network, reduction_tail
from atr_scale.planner.transfer import Transfer
from tests.tiny_run import tiny_config

TEN = np.arange(1.0, 11.0)  # an operation a second, each of which completes 1 byte of gradients


@pytest.fixture(scope="module")
def costs(tmp_path_factory: pytest.TempPathFactory) -> Costs:
    folder = tmp_path_factory.mktemp("tiny")
    config: RunConfig = tiny_config(folder, folder / "run")
    return measure_costs(config, 1.0, 8, gpu=False)[0]


@pytest.mark.parametrize(
    ("frozen", "stage", "first"),
    [("lr_text", 0, "audio"), ("lr_audio", 0, "text"), ("lr_audio", 3, "audio"), ("both", 0, "audio")],
)
def test_the_planned_order_of_the_backward_pass_is_that_of_training(
    tmp_path: Path, frozen: str, stage: int, first: str
) -> None:
    rates = dict.fromkeys(("lr_text", "lr_audio") if frozen == "both" else (frozen,), 0.0)
    config = tiny_config(tmp_path, tmp_path / "run")
    train = config.train.model_copy(update={**rates, "zero_stage": stage})
    costs, _ = measure_costs(config.model_copy(update={"train": train}), 1.0, 8, gpu=False)
    assert costs.encoders.phases[2] == f"{first} backward"


def slow_network(gbit: float = 1.0) -> GPU:
    return find_gpu("H100").with_network(gbit)


def step(costs: Costs, gpu: GPU, size: int = 16, batch: int = 2048, workers: int = 1000) -> StepEstimate:
    return estimate_step(costs, Cluster(gpu, size, 8, 1e-6, workers), batch)


@pytest.mark.parametrize(
    ("buckets", "seconds", "in_flight", "tail"),
    [
        (1, 3.0, None, 3.0),  # at the end: nothing is hidden
        (10, 3.0, None, 0.3),  # a fast network: the last bucket
        (5, 5.0, None, 1.0),
        (10, 20.0, None, 11.0),  # a slow one: it starts when the first bucket is full
        (10, 20.0, 10, 11.0),
        (10, 20.0, 1, 11.0),  # the pass waits for the network, and its end with it
    ],
)
def test_tail_of_a_reduction_by_hand(buckets: int, seconds: float, in_flight: int | None, tail: float) -> None:
    assert reduction_tail(TEN, TEN, buckets, seconds, in_flight) == pytest.approx(tail)


def test_a_pass_that_waits_for_its_buckets_computes_later() -> None:
    """Gradients at 1, 2 and 3 s, then computation to 10 s: with one bucket in flight it begins 4 s later."""
    ready, gradients = np.array([1.0, 2.0, 3.0, 10.0]), np.array([1.0, 2.0, 3.0, 3.0])
    assert reduction_tail(ready, gradients, 3, 9.0) == 0.0
    assert reduction_tail(ready, gradients, 3, 9.0, in_flight=1) == pytest.approx(4.0)
    late = np.array([1.0, 2.0, 3.0, 4.0])  # a fourth bucket at 10 + 4 s
    assert reduction_tail(ready, late, 4, 12.0, in_flight=1) == pytest.approx(7.0)


def test_what_waits_and_what_does_not() -> None:
    cluster = Cluster(slow_network(10.0), 2, 1, 0.0, 1)  # 1 GB/s
    work = Work({}, {"audio forward": 1.0}, TEN, TEN)
    sent = {
        "texts": Transfer("texts", "all_gather", 1_500_000_000, 1, "audio forward"),
        "gradients": Transfer("gradients", "all_reduce", 1_000_000_000, 10, "buckets"),
        "parameters": Transfer("parameters", "all_gather", 1_000_000_000),
    }
    exposed = {name: network([one], work, cluster, None).exposed for name, one in sent.items()}
    assert exposed == pytest.approx({"texts": 0.5, "gradients": 0.1, "parameters": 1.0}, rel=1e-3)
    found = network(list(sent.values()), work, cluster, None)
    assert found.busy == pytest.approx(3.5, rel=1e-3) and found.hidden == pytest.approx(found.busy - 1.6, rel=1e-3)


def test_fewer_bytes_and_no_parameters_to_gather(costs: Costs) -> None:
    """Stage 1 reduces half the bytes of stage 0, but then gathers parameters, which nothing hides."""
    gpu = slow_network()
    steps = {
        (stage, dtype): step(with_train(costs, zero_stage=stage, gradient_dtype=dtype), gpu)
        for stage in (0, 1)
        for dtype in ("fp32", "bf16")
    }

    def sent(key: tuple[int, str], kind: str) -> float:
        return sum(t.sent(16) for t in steps[key].transfers if t.kind == kind)

    whole = sent((0, "fp32"), "gradients")
    assert sent((1, "fp32"), "gradients") == pytest.approx(whole / 2)
    assert sent((0, "bf16"), "gradients") == pytest.approx(whole / 2)
    assert sent((1, "bf16"), "parameters") == pytest.approx(whole / 2, rel=1e-3)
    for one in steps.values():
        assert 0 < one.network.exposed < one.network.busy
        work = sum(value for name, value in one.seconds.items() if name not in ("network", "loader"))
        assert one.step == pytest.approx(work + one.network.exposed)
        assert sum(one.phases.values()) == pytest.approx(work)


def test_the_bound_is_named(costs: Costs) -> None:
    fast = find_gpu("H100").with_network(1e6)
    assert step(costs, slow_network(0.1)).bound == "network"
    assert step(costs, fast, workers=0, batch=2048).seconds["loader"] > 0
    assert estimate_step(costs, Cluster(fast, 16, 8, 1.0, 1), 2048).bound == "loader"
    tiny = replace(fast, rates=replace(fast.rates, low=1e6, tf32=1e6, full=1e6))
    assert step(costs, tiny).bound == "matrix products"
    assert step(costs, replace(fast, rates=replace(fast.rates, memory=1e6))).bound == "memory bandwidth"
    assert step(costs, replace(fast, rates=replace(fast.rates, launch=1.0))).bound == "launches"
    assert step(costs, fast).seconds["second forwards"] == 0
    assert estimate_step(costs, Cluster(fast, 16, 8, 1e-6, 1), 2048, 32).seconds["second forwards"] > 0


@pytest.mark.parametrize("gbit", [0.0, -1.0, float("nan")])
def test_a_network_lets_something_through(gbit: float) -> None:
    with pytest.raises(UserError, match=r"--network .*: give the Gbit/s between nodes, more than 0"):
        find_gpu("H100").with_network(gbit)


def test_advice_names_the_largest_gain_first(costs: Costs) -> None:
    """A slow network: fewer bytes. A slow loader: workers. Each gain is that of the plan with the setting."""
    costs = with_train(costs, zero_stage=1, gradient_dtype="fp32")
    slow = Cluster(slow_network(0.5), 16, 8, 1e-6, 1000)
    planned = estimate_step(costs, slow, 2048)
    found = advise(costs, slow, planned)
    assert found[0].setting == "train.gradient_dtype=bf16"
    best = estimate_step(with_train(costs, gradient_dtype="bf16"), slow, 2048)
    assert found[0].gain == pytest.approx(best.rate / planned.rate - 1) and found[0].planned.step == best.step
    assert [one.planned.step for one in found] == sorted((one.planned.step for one in found), reverse=True)
    loading = Cluster(find_gpu("H100"), 8, 8, 1e-3, 2)
    (first, *_) = advise(costs, loading, estimate_step(costs, loading, 2048))
    assert first.setting.startswith("data.workers=") and first.planned.bound != "loader"


def report(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "gpu_check.json"
    path.write_text(json.dumps({"device": "NVIDIA H100 80GB HBM3", "torch": "2.13", "quick": False, "rows": rows}))
    return path


def test_rates_of_a_card_replace_assumed_ones(costs: Costs, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"part": "ceilings", "name": "gemm bf16", "tflops": 700.0},
        {"part": "ceilings", "name": "copy", "gb_per_s": 2500.0},
        {"part": "ceilings", "name": "launch", "ms": 0.004},
        {"part": "ceilings", "name": "gemm tf32", "tflops": None, "skipped": "too slow"},
        {"part": "losses", "name": "gemm fp32", "tflops": 1.0},
    ]
    gpu = find_gpu("H100")
    measured = gpu.with_measured(report(tmp_path, rows))
    assert measured.rates == replace(
        gpu.rates,
        low=700e12,
        memory=2500e9,
        launch=4e-6,
        measured_on="NVIDIA H100 80GB HBM3",
        measured=("low", "memory", "launch"),
    )
    assert gpu.with_measured(None) is gpu
    assert step(costs, measured).step != step(costs, gpu).step


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read"),
        ("{", "is no report of tools.gpu_check"),
        ('{"device": "x"}', "is no report of tools.gpu_check"),
        (
            '{"device": "x", "quick": false, "rows": [{"part": "ceilings", "name": "copy", "gb_per_s": null}]}',
            "no ceilings",
        ),
        (
            '{"device": "x", "quick": false, "rows": [{"part": "ceilings", "name": "copy", "gb_per_s": "a"}]}',
            "no report",
        ),
        ('{"device": "cpu", "quick": false, "rows": []}', "figures of a CPU"),
        ('{"device": "x", "quick": true, "rows": []}', "of small sizes"),
    ],
)
def test_a_report_that_has_no_rates(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "gpu_check.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message) as raised:
        find_gpu("H100").with_measured(path)
    assert "python -m tools.gpu_check" in str(raised.value) and "\n" not in str(raised.value)
