"""Distillation from tables and their writing: several ranks against one process."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from atr_scale import score_block as blocks
from atr_scale.batch import Batch
from atr_scale.config import RunConfig
from atr_scale.distributed.world import World
from atr_scale.errors import UserError
from atr_scale.losses import dense
from atr_scale.model import Retriever, StepContext
from atr_scale.teachers.comparison import TeacherComparison
from atr_scale.teachers.ensemble import TeacherEnsemble
from atr_scale.teachers.estimate import write_teacher_tables
from atr_scale.teachers.tables import TeacherTable
from tests.distributed.test_evaluation import write_split
from tests.losses import unit
from tests.tiny_run import save_run, tiny_config
from tools.ranks import run_ranks

B, CLIPS, EACH = 6, 4, 3  # clips of the batch are drawn twice: positives and equal teachers across ranks
KINDS = ("vectors", "mixed")


def tables(kind: str) -> list[TeacherTable]:
    """Two members in float64 over CLIPS clips with EACH captions."""
    ids = torch.arange(CLIPS) * 1_000_003 + 5
    keys = ids, ids.repeat_interleave(EACH), torch.arange(EACH).repeat(CLIPS)
    text, audio = unit(CLIPS * EACH, 7, 11), unit(CLIPS, 7, 12)
    second = {"text": unit(CLIPS * EACH, 5, 13), "audio": unit(CLIPS, 5, 14)}
    if kind == "mixed":
        second = {"scores": second["text"] @ second["audio"].T}
    return [TeacherTable("one", *keys, {"text": text, "audio": audio}), TeacherTable("two", *keys, second)]


def global_batch() -> tuple[Batch, Tensor, Tensor]:
    """The batch, the table rows of its captions and of its clips."""
    generator = torch.Generator().manual_seed(3)
    clips, index = torch.tensor([0, 1, 2, 3, 0, 2]), torch.tensor([0, 2, 1, 0, 1, 1])
    words = torch.randint(5, 20, (B, 7), generator=generator)
    batch = Batch(
        waveform=0.1 * torch.randn(B, 8000, generator=generator, dtype=torch.float64),
        lengths=torch.full((B,), 8000),
        input_ids=words,
        attention_mask=torch.ones_like(words),
        clip_ids=tables("vectors")[0].clip_ids[clips],
        caption_ids=torch.arange(B),
        caption_index=index,
        stored_ids=torch.arange(B),
    )
    return batch, clips * EACH + index, clips


def part_of(batch: Batch, world: World) -> Batch:
    share = B // world.size
    return batch._map(lambda x: x[world.rank * share : (world.rank + 1) * share])


def student(config: RunConfig) -> Retriever:
    config = config.model_copy(deep=True)
    config.objective.distillation.weight = 1.0
    config.objective.nt_xent.weight = 0.0
    torch.manual_seed(0)
    return Retriever(config.model, config.objective).double().eval()


def distilled(config: RunConfig) -> dict[str, Any]:
    """The recipe of training: world size times the global loss, gradients averaged over ranks."""
    blocks.STRIPE_COLUMNS = 2
    world, found = World.current(), {}
    for kind in KINDS:
        model = student(config)
        context = StepContext(teacher=TeacherEnsemble.of(*tables(kind)).labels)
        loss = model(part_of(global_batch()[0], world), context)["loss"]
        (world.size * loss).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        for gradient in gradients.values():
            if world.size > 1:
                dist.all_reduce(gradient)
                gradient /= world.size
        found[kind] = loss.item(), {name: gradient.numpy() for name, gradient in gradients.items()}
    return found


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("tiny")
    return tiny_config(folder, folder / "run")


@pytest.fixture(scope="module")
def alone(config: RunConfig) -> dict[str, Any]:
    return distilled(config)


def test_one_process_equals_the_formula(config: RunConfig, alone: dict[str, Any]) -> None:
    batch, captions, clips = global_batch()
    for kind in KINDS:
        model = student(config)
        text = model.encode_text(batch.input_ids, batch.attention_mask)
        scores = model.scorer.scores(text, model.encode_audio(batch.waveform, batch.lengths))
        one, other = (table.scores(captions, clips) for table in tables(kind))
        teacher = (one + other) / 2
        loss = dense.distillation(scores, teacher, model.temperature())
        loss.backward()
        want, gradients = alone[kind]
        assert abs(want - loss.item()) < 1e-12
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                assert np.abs(gradients[name] - parameter.grad.numpy()).max() < 1e-12, name


def surprised() -> str:
    """The last rank alone draws a caption that no table knows."""
    world = World.current()
    batch = part_of(global_batch()[0], world)
    if world.rank == world.size - 1:
        batch = replace(batch, caption_index=batch.caption_index + EACH)
    with pytest.raises(UserError) as error:
        TeacherEnsemble.of(*tables("vectors")).labels(batch)
    return str(error.value)


def on_rank(config: RunConfig) -> tuple[dict[str, Any], str]:
    return distilled(config), surprised()


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_equal_one_process(config: RunConfig, alone: dict[str, Any], size: int) -> None:
    """Loss and gradients; and all ranks stop where one draws an unknown caption, which that one names."""
    ranks = run_ranks(on_rank, size, config)
    for found, _ in ranks:
        for kind in KINDS:
            assert abs(found[kind][0] - alone[kind][0]) < 1e-12
            for name, gradient in alone[kind][1].items():
                assert np.abs(found[kind][1][name] - gradient).max() < 1e-12, (kind, name)
    *others, last = [said for _, said in ranks]
    assert re.match(r"caption [34] of clip \d+ is not", last) and "run `atr-scale estimate`" in last
    assert {said.split(":")[0] for said in others} == {
        "a caption of another rank is not in the teacher tables (one, two)"
    }


def written(runs: list[Path], shards: Path, out: Path, top_k: int | None) -> TeacherComparison | None:
    return write_teacher_tables(
        [str(run) for run in runs],
        shards=[str(shards)],
        out=out,
        batch_size=4,
        top_k=top_k,
        world=World.current(),
        device=torch.device("cpu"),
    )


@pytest.mark.slow
@pytest.mark.parametrize("top_k", [None, 5])
def test_tables_written_by_several_ranks_are_the_same_to_the_last_bit(
    config: RunConfig, tmp_path: Path, top_k: int | None
) -> None:
    """11 clips in batches of 4 with one to three captions each, by a scorer of vectors and by one of pairs."""
    write_split(tmp_path / "sounds", labelled=False)
    shards = tmp_path / "sounds" / "shards"
    runs = [save_run(config, tmp_path / "mean", 1, "mean"), save_run(config, tmp_path / "tap", 2, "tap")]
    want = written(runs, shards, tmp_path / "alone", top_k)
    first, second = run_ranks(written, 2, runs, shards, tmp_path / "together", top_k)
    assert want and np.allclose(first.correlation, want.correlation, atol=1e-6) and second is None
    for name in ("mean", "tap"):
        one, two = (TeacherTable.read(tmp_path / place / f"{name}.safetensors") for place in ("alone", "together"))
        assert one.metadata == two.metadata and one.is_dual_encoder == (name == "mean")
        for key in ("clip_ids", "caption_clip", "caption_index"):
            assert torch.equal(getattr(one, key), getattr(two, key))
        assert one.values.keys() == two.values.keys()
        assert all(torch.equal(value, two.values[key]) for key, value in one.values.items())
    table = TeacherTable.read(tmp_path / "together" / "mean.safetensors")
    assert len(table.clip_ids) == 11 and len(table.caption_clip) == 21
    counts = [(table.caption_clip == clip).sum().item() for clip in table.clip_ids]
    assert table.caption_index.tolist() == [index for count in counts for index in range(count)]
