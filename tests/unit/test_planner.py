"""The planner: what it counts of operations, what ZeRO keeps and sends, what the verb prints."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from atr_scale import cli
from atr_scale.config import RunConfig
from atr_scale.config_train import InitialCheckpoint
from atr_scale.errors import UserError
from atr_scale.losses import build_objective
from atr_scale.losses.terms import DistillationSection, TeacherTableSection
from atr_scale.planner import measure as measuring
from atr_scale.planner import zero_memory
from atr_scale.planner.architecture import build_without_weights
from atr_scale.planner.costs import BatchSplit, Costs
from atr_scale.planner.dry_run import dry_run
from atr_scale.planner.estimate import estimate_step, fitting_micro_batch, largest_local_batch
from atr_scale.planner.gpus import find_gpu
from atr_scale.planner.ops import Recorder
from atr_scale.planner.planner import measure_costs, teacher_widths
from atr_scale.planner.timeline import Cluster
from atr_scale.planner.traffic import transfers
from atr_scale.planner.transfer import Transfer
from atr_scale.planner.zero_memory import Parameters
from tests.tiny_run import tiny_config
from tools.bench.measure import peak_mib

SECONDS, TOKENS = 1.0, 8


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("tiny")
    return tiny_config(folder, folder / "run")


@pytest.fixture(scope="module")
def costs(config: RunConfig) -> Costs:
    return measure_costs(config, SECONDS, TOKENS, gpu=False)[0]


def cluster(size: int, gpu: str = "H100") -> Cluster:
    return Cluster(find_gpu(gpu), size, 8, 1e-6, 2)


def test_flops_of_both_directions_and_of_groups() -> None:
    linear, grouped = nn.Linear(8, 16, bias=False), nn.Conv1d(6, 6, 3, groups=6, bias=False)
    for module, x, forward in (
        (linear, torch.randn(4, 8, requires_grad=True), 2 * 4 * 8 * 16),
        (grouped, torch.randn(2, 6, 10, requires_grad=True), 2 * 2 * 6 * 3 * 8),
    ):
        with Recorder([x, *module.parameters()]) as recorder:
            module(x).sum().backward()
        assert recorder.table().flops.sum() == 3 * forward


def test_products_added_in_place_count() -> None:
    total, left, right = torch.zeros(4, 6), torch.randn(4, 5), torch.randn(5, 6)
    with Recorder([total, left, right]) as recorder:
        total.addmm_(left, right)
    assert recorder.table().flops.tolist() == [2 * 4 * 5 * 6]


def test_live_bytes_are_those_of_the_allocator() -> None:
    model = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(256, 256), nn.ReLU())))
    x = torch.randn(64, 256)

    def step() -> None:
        model(x).square().mean().backward()

    model.zero_grad()
    measured = peak_mib(step) * 2**20
    model.zero_grad()
    with Recorder([x, *model.parameters()]) as recorder:
        handles = recorder.watch_gradients(model)
        step()
    table = recorder.table()
    assert (table.live + table.gradients).max() == pytest.approx(measured, rel=0.02)
    assert recorder.gradients == sum(4 * p.numel() for p in model.parameters())
    assert recorder.live < 0.05 * recorder.gradients, "finished gradients count as live no longer"
    assert len(handles) == 8


def test_costs_are_linear_in_the_rows(config: RunConfig, costs: Costs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "ROWS", (13, 14))
    model = build_without_weights(config)
    direct = measuring.measure_encoders(model, SECONDS, TOKENS, gpu=False, text_first=False).at(13)
    planned = costs.encoders.at(13)
    assert planned.names == direct.names
    for column in ("flops", "nbytes", "gradients"):
        np.testing.assert_allclose(getattr(planned, column), getattr(direct, column), rtol=1e-12)
    np.testing.assert_allclose(planned.live.max(), direct.live.max(), rtol=1e-3)


def test_a_real_update_of_the_encoders_takes_the_planned_memory(config: RunConfig, costs: Costs) -> None:
    model = build_real(config)
    rows = 16
    batch = torch.randn(rows, round(SECONDS * model.sample_rate)), torch.ones(rows, TOKENS, dtype=torch.int64)

    def step() -> None:
        text = model.encode_text(batch[1], torch.ones_like(batch[1]))
        audio = model.encode_audio(batch[0], None)
        audio_outputs = [audio.tokens, audio.pooled]
        torch.autograd.backward(audio_outputs, [torch.empty_like(x) for x in audio_outputs])
        text.pooled.backward(torch.empty_like(text.pooled))

    step()
    model.zero_grad()
    measured = peak_mib(step) * 2**20
    table = costs.encoders.at(rows)
    planned = (table.live + table.gradients).max() - sum(x.nbytes for x in batch)  # the plan holds the batch, too
    model.zero_grad()
    with Recorder([*batch, *model.parameters(), *model.buffers()]) as recorder:
        handles = recorder.watch_gradients(model)
        step()
    real = recorder.table()
    assert planned == pytest.approx((real.live + real.gradients).max(), rel=0.01) and handles
    # What convolutions allocate inside is not seen: much of so small a network.
    assert planned == pytest.approx(measured, rel=0.12)


def build_real(config: RunConfig):  # type: ignore[no-untyped-def]
    from atr_scale.model import Retriever

    return Retriever(config.model, config.objective).train()


def test_activation_checkpointing_keeps_less(config: RunConfig) -> None:
    section = config.model.text.model_copy(update={"activation_checkpointing": True})
    checkpointed = config.model_copy(update={"model": config.model.model_copy(update={"text": section})})
    kept = []
    for one in (config, checkpointed):
        costs = measuring.measure_encoders(build_without_weights(one), SECONDS, 64)
        kept.append(costs.at(64).live[costs.ends[0] - 1])
    assert kept[1] < 0.5 * kept[0]


@pytest.mark.parametrize("way", ["tiled", "dense"])
def test_heads_at_other_sizes(config: RunConfig, way: str) -> None:
    """FLOPs and collectives of a rank follow from its rows, from all, and from the pairs of both; with every term that
    needs no teacher."""
    config = config.model_copy(deep=True)
    for name in ("pmr", "cmsc", "intra_modal"):
        config.objective.terms[name].weight = 0.5
    budget = {"tiled": measuring.NEVER_DENSE, "dense": measuring.ALWAYS_DENSE}[way]
    model, objective = build_without_weights(config), build_objective(config.objective.terms, budget)
    outputs = measuring.measure_encoders(build_without_weights(config), SECONDS, TOKENS, gpu=False).outputs
    heads = measuring.measure_heads(model, objective, outputs, measuring.Teachers([]))
    values, collectives, _ = measuring._run_heads(model, objective, outputs, measuring.Teachers([]), 5, 7)
    assert heads.at("flops", 35, 5) == pytest.approx(values["flops"], rel=1e-9)
    assert heads.at("kept", 35, 5) == pytest.approx(values["kept"], rel=1e-9)
    assert heads.terms["peak"][4] == (0 if way == "tiled" else pytest.approx(2 * heads.terms["kept"][4]))
    for (name, dtype, coefficients), one in zip(heads.collectives, collectives, strict=True):
        assert (name, dtype) == (one.name, one.dtype)
        assert coefficients @ measuring.features(35, 5) == pytest.approx(one.nbytes, rel=1e-9)


def test_losses_of_small_batches_are_planned_dense(costs: Costs) -> None:
    """Up to 1,024 pairs scores travel, above statistics do."""
    small, large = ({t.kind for t in transfers(costs, BatchSplit(2, batch, batch // 2))} for batch in (1024, 1026))
    assert small - large == {"scores", "gradients of scores"} and large - small == {"statistics"}
    assert costs.pairs_at_once(1024, 1024) == 1024**2 and costs.pairs_at_once(1026, 1026) == 1026 * 512


def test_teachers_are_unit_vectors_as_in_tables(config: RunConfig, costs: Costs) -> None:
    """The maxima of rows, in fp32, are asked of other ranks for scores spread wider than those of real tables."""
    config = config.model_copy(deep=True)
    config.objective.distillation.weight, config.objective.distillation.temperature = 1.0, 0.05
    model = build_without_weights(config)
    objective = build_objective(config.objective.terms, measuring.NEVER_DENSE)
    two = [measuring.Teachers([768, 768], ensemble) for ensemble in ("cosines", "probabilities")]
    one, several = (measuring.measure_heads(model, objective, costs.encoders.outputs, teachers) for teachers in two)
    reduced = {dtype for name, dtype, _ in one.collectives if name == "allreduce"}
    assert reduced == {torch.float64}
    assert several.terms["flops"][3] > one.terms["flops"][3], "a loss for each teacher"


def test_targets_without_tables_are_planned(config: RunConfig) -> None:
    for targets, widths in (("random", [64]), ("uniform", [1])):
        distillation = DistillationSection(weight=1.0, targets=targets)
        objective = config.objective.model_copy(update={"distillation": distillation})
        planned = config.model_copy(update={"objective": objective})
        assert teacher_widths(planned, build_without_weights(config)) == widths


@pytest.mark.slow
def test_draws_that_need_values_are_left_out(config: RunConfig) -> None:
    changed = config.model_copy(deep=True)
    changed.model.audio.name = "mn04"
    plain = build_without_weights(changed)
    changed.model.audio.fmin_aug_range, changed.model.audio.fmax_aug_range = 10, 2000
    jittered = build_without_weights(changed)
    one, other = (measuring.measure_encoders(model, SECONDS, TOKENS) for model in (plain, jittered))
    assert one.base.names == other.base.names


def test_what_each_stage_keeps() -> None:
    sizes = Parameters([[300_000, 1000], [501]], frozen=[200_000])
    learned, world = 301_501, 4
    assert sizes.states(0, world) == {"parameters": 4 * (learned + 200_000), "optimizer": 8 * learned}
    for stage in (1, 2):  # groups are padded to a multiple of twice the ranks
        assert sizes.states(stage, world)["optimizer"] == 12 * (301_000 + 504) // world
    third = sizes.states(3, world)
    assert third["optimizer"] == 12 * (75_000 + 250 + 126)
    assert third["parameters"] == 4 * (75_000 + 250 + 126 + 50_000 + 1000 + 501)
    assert sizes.gathered(3) == 4 * 500_000 and sizes.gathered(2) == 0


def test_copies_of_a_checkpoint() -> None:
    """Weights on rank 0, on each rank its part of the two moments of what is learned and, of stage 3, its shards."""
    sizes = Parameters([[100, 50]], [30])
    assert sizes.copies(1, 1) == (4 * 180 + 8 * 150, 8 * 150)
    assert sizes.copies(2, 4) == (4 * 180 + 8 * 38, 8 * 38)
    assert sizes.copies(3, 4) == (4 * 180 + 8 * 38, 8 * 38 + 4 * (25 + 13 + 8))


def test_gradients_that_wait_and_reduced_ones() -> None:
    sizes, world = Parameters([[200_000_000, 1000]]), 4
    whole, own, bucket = 4 * 200_001_000, 200_001_000, 32 * 2**20
    assert sizes.gradients(0, world, several_passes=False) == sizes.gradients(0, world, True) == (whole, 0)
    assert sizes.gradients(1, world, several_passes=False) == sizes.gradients(1, world, True) == (whole, own)
    assert sizes.gradients(2, world, several_passes=False) == (8 * bucket, own)
    assert sizes.gradients(2, world, several_passes=True) == (whole, own)
    assert sizes.buffers(2, world)[0] == 800_000_000, "a parameter larger than a bucket has its own"


def test_the_constants_are_those_of_deepspeed() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    defaults = DeepSpeedZeroConfig(stage=3)
    assert defaults.reduce_bucket_size == zero_memory.BUCKET
    assert defaults.param_persistence_threshold == zero_memory.PERSISTENT
    assert defaults.max_reuse_distance == zero_memory.REUSE_DISTANCE


def test_bytes_of_a_ring() -> None:
    assert Transfer("", "all_gather", 100).sent(5) == 400
    assert Transfer("", "reduce_scatter", 100).sent(5) == 400
    assert Transfer("", "all_reduce", 500).sent(5) == 800
    assert Transfer("", "all_reduce", 500).sent(1) == 0


def test_more_gpus_and_smaller_forwards_need_less(costs: Costs) -> None:
    batch = 2**15  # activations outweigh DeepSpeed's bucket
    whole, halves = (estimate_step(costs, cluster(4), batch, micro) for micro in (None, 32))
    assert halves.peak < whole.peak and halves.step > whole.step
    assert estimate_step(costs, cluster(8), batch).peak < whole.peak
    assert {t.kind: t.nbytes for t in halves.transfers} == {t.kind: t.nbytes for t in whole.transfers}


def test_the_largest_batch_just_fits(costs: Costs) -> None:
    tight = cluster(2)
    tight = replace(tight, gpu=replace(tight.gpu, memory=3 * 2**30))
    for micro in (None, 8):
        most = largest_local_batch(costs, tight, micro)
        room = 0.94 * tight.gpu.memory
        step = micro or 1
        assert estimate_step(costs, tight, 2 * most, micro).peak <= room
        assert estimate_step(costs, tight, 2 * (most + step), micro).peak > room
    local = 2 * largest_local_batch(costs, tight)
    assert fitting_micro_batch(costs, tight, 2 * local) in range(1, local)
    assert fitting_micro_batch(costs, replace(tight, gpu=replace(tight.gpu, memory=1e6)), 2) is None


def test_gpus_by_name() -> None:
    assert find_gpu("a100 80").name == "A100-80"
    assert find_gpu("L4").with_price(9.0).price == 9.0
    with pytest.raises(UserError, match="unknown GPU 'P4': known are H200, H100"):
        find_gpu("P4")


def test_the_verb(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No shards are read; text to stdout, JSON and picture to a folder; a mistake is one line and code 2."""
    path = tmp_path / "run.yaml"
    path.write_text(config.to_yaml())
    overrides = ["data.train=[{shards: nowhere}]", "train.global_batch_size=1024", "data.captions.max_tokens=null"]
    command = ["atr-scale", "plan", str(path), *overrides]
    monkeypatch.setattr(sys, "argv", [*command, "--gpu", "L4", "--price", "2", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as left:
        cli.main()
    printed = capsys.readouterr().out
    assert left.value.code == 0
    lengths = "all clips 0.5 s and all captions 64 tokens long"
    for word in ("memory", "network", "time", "phases", "faster", "run", "largest", lengths):
        assert word in printed
    assert "captions of 64 tokens" in printed, "of captions that nothing cuts"
    written = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert [row["gpus"] for row in written["sizes"]] == [2**k for k in range(11)]
    chosen = written["chosen"]
    assert chosen["cost_usd"] == pytest.approx(2 * 8 * chosen["hours"])
    assert sum(v for k, v in chosen["memory_bytes"].items() if k != "peak") == chosen["memory_bytes"]["peak"]
    assert (tmp_path / "out" / "plan.png").stat().st_size > 10_000
    for extra, message in (
        (["--gpus-per-node", "7"], "does not divide among 1 x 7 GPUs: set it to a multiple, for example 1029"),
        (["--gpu", "B9"], "unknown GPU 'B9'"),
        (["model.text.name=./nowhere"], "no config.json of the text encoder './nowhere'"),
    ):
        monkeypatch.setattr(sys, "argv", [*command, *extra])
        with pytest.raises(SystemExit) as left:
            cli.main()
        error = capsys.readouterr().err.strip()
        assert left.value.code == 2 and message in error and len(error.splitlines()) == 1


def test_a_dry_run_reads_what_the_job_starts_from(config: RunConfig) -> None:
    train = config.train.model_copy(
        update={"initial_checkpoint": InitialCheckpoint.model_validate({"from": "nowhere"})}
    )
    with pytest.raises(UserError, match="no checkpoint at nowhere"):
        dry_run(config.model_copy(update={"train": train}), 1)
    objective = config.objective.model_copy(deep=True)
    objective.distillation.weight = 1.0
    objective.distillation.tables = [TeacherTableSection(path="missing.safetensors")]
    with pytest.raises(UserError, match="no teacher table at missing"):
        dry_run(config.model_copy(update={"objective": objective}), 1)
