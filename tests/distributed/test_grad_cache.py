"""GradCache: the gradient of the whole batch from chunks of it, on any number of ranks and at every ZeRO stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from atr_scale.batch import Batch, stable_id
from atr_scale.config import RunConfig
from atr_scale.data.shard_reader import open_shards
from atr_scale.data.stream import read_batches
from atr_scale.data.tokenizer import caption_tokenizer
from atr_scale.distributed.world import World
from atr_scale.encoders.spec_augment import SpecAugmentSection
from atr_scale.losses.terms import TeacherTableSection
from atr_scale.model import Retriever, StepContext
from atr_scale.teachers.tables import TeacherTable
from atr_scale.training.grad_cache import GradCache
from atr_scale.training.parts import training_stream
from atr_scale.training.schedule import seeds
from tests.losses import unit
from tests.tiny_run import tiny_config
from tools.parity import curves, start, with_train
from tools.ranks import run_ranks

CPU = torch.device("cpu")
SEED = 5
RATES = {"audio": 1e-3, "text": 1e-3, "heads": 1e-3}


def whole(config: RunConfig) -> Batch:
    """A batch whose clips have two lengths, in no order."""
    model = Retriever(config.model, config.objective)
    stream = training_stream(
        config, caption_tokenizer(model.text_encoder.tokenizer, config.data.captions), model.sample_rate, World()
    )
    batch = next(read_batches(stream.between(0, 1), 0))
    lengths = batch.lengths.clone()
    lengths[::3] //= 2
    keep = torch.arange(batch.waveform.shape[1]) < lengths.unsqueeze(1)
    return Batch(**{**vars(batch), "lengths": lengths, "waveform": batch.waveform.double() * keep})


def gradients(config: RunConfig, batch: Batch, chunk_size: int | None = None, kept: int = 0) -> dict[str, Tensor]:
    """In float64, of one process without DeepSpeed."""
    torch.manual_seed(0)
    model = Retriever(config.model, config.objective).double().train()
    context = StepContext(augment_seed=SEED)
    if chunk_size is None:
        torch.manual_seed(SEED)
        model(batch, context)["loss"].mul(3.0).backward()
    else:
        lasts: list[bool] = []

        def backward(loss: Tensor, last: bool) -> None:
            lasts.append(last)
            loss.backward()

        GradCache(model, backward, CPU, chunk_size, kept, model.encoders_learn).accumulate(batch, SEED, 3.0, context)
        assert lasts and lasts == [False] * (len(lasts) - 1) + [True]
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def differ(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference, as a share of the largest gradient."""
    assert found.keys() == expected.keys() and expected
    largest = max(g.abs().max() for g in expected.values())
    return float(max((found[n] - g).abs().max() for n, g in expected.items()) / largest)


@pytest.mark.parametrize(
    "scorer",
    ["pooled", "lgmm", *(pytest.param(name, marks=pytest.mark.slow) for name in ("meanmax", "netrvlad", "tap"))],
)
def test_chunks_give_the_gradient_of_the_whole_batch(folder: Path, scorer: str) -> None:
    """With SpecAugment and all terms of the loss, kept graphs or none."""
    config = tiny_config(folder, folder / "run")
    config.model.scorer.name = scorer
    config.model.audio.spec_augment = SpecAugmentSection(time_drop_width=8, freq_drop_width=8)
    config.objective.pmr.weight = config.objective.cmsc.weight = config.objective.intra_modal.weight = 0.5
    batch = whole(config)
    expected = gradients(config, batch)
    for chunk_size, kept in ((4, 0), (3, 2), (12, 0)):
        assert differ(gradients(config, batch, chunk_size, kept), expected) < 1e-12, (chunk_size, kept)


def test_both_forwards_of_a_chunk_draw_alike(folder: Path) -> None:
    """With dropout: a chunk encoded twice gives the gradient of one whose graph was kept."""
    config = tiny_config(folder, folder / "run")
    config.model.text.dropout = 0.3
    batch = whole(config)
    expected = gradients(config, batch, 4, kept=3)
    assert differ(gradients(config, batch, 4, kept=0), expected) < 1e-12
    assert differ(gradients(config, batch, 4, kept=1), expected) < 1e-12
    assert differ(gradients(config, batch), expected) > 1e-3  # draws of chunks are their own


def test_the_head_alone_learns_in_one_backward_pass(folder: Path) -> None:
    """No chunk is encoded twice, and the gradient is that of the whole batch."""
    config = tiny_config(folder, folder / "run")
    config.model.scorer.name = "tap"
    batch = whole(config)

    def found(chunk_size: int | None) -> dict[str, Tensor]:
        with pytest.MonkeyPatch.context() as patch:
            train = Retriever.train
            patch.setattr(Retriever, "train", lambda self: train(frozen(self)))
            return gradients(config, batch, chunk_size, kept=1)

    assert differ(found(4), found(None)) < 1e-12


@pytest.mark.parametrize("kept", [0, 1])
def test_a_loss_may_read_no_encoding(folder: Path, kept: int) -> None:
    """A term of a plug-in may begin to read the scores later in a run."""
    config = tiny_config(folder, folder)
    model = Retriever(config.model, config.objective).double()

    def forward(batch: Batch, context: StepContext, encoded: Any = None, encode_only: bool = False) -> Any:
        return model.encode(batch, context) if encode_only else {"loss": model.temperature().sum()}

    GradCache(forward, lambda loss, last: loss.backward(), CPU, 4, kept).accumulate(whole(config), SEED, 1.0)
    assert [name for name, p in model.named_parameters() if p.grad is not None] == [
        name for name, _ in model.named_parameters() if name.startswith("temperature.")
    ]


def frozen(model: Retriever) -> Retriever:
    for part in (model.audio_encoder, model.text_encoder, model.audio_projection, model.text_projection):
        part.requires_grad_(False)
    return model


def write_teacher(config: RunConfig, folder: Path) -> Path:
    """A table of random vectors for every caption and clip of the training shards."""
    shards = open_shards(config.data.train[0].shards)
    ids = torch.tensor([stable_id(shards.read_text(row)[0]) for row in range(len(shards))])
    values = {"text": unit(len(ids), 5, 1).half(), "audio": unit(len(ids), 5, 2).half()}
    return TeacherTable("teacher", ids, ids.clone(), torch.zeros_like(ids), values).save(folder)


@pytest.mark.slow
def test_ranks_and_zero_stages_agree_in_chunks(folder: Path, tmp_path: Path) -> None:
    """One process without ZeRO and without chunks against two with both: gradients, losses, norms, with all terms."""
    config = with_train(tiny_config(folder, folder / "run"), accum_steps=2)
    config.objective.distillation.tables = [TeacherTableSection(path=str(write_teacher(config, tmp_path)))]
    config.objective.cmsc.beta_warmup_steps = 2
    for term in config.objective.terms.values():
        term.weight = 0.5
    ((expected,),) = run_ranks(curves, 1, [with_train(config, zero_stage=0)], 2)
    cases = [(stage, kept) for stage in (0, 1, 2, 3) for kept in (0, 1)]
    configs = [with_train(config, zero_stage=stage, micro_batch_size=2, kept_chunks=kept) for stage, kept in cases]
    largest = max(np.abs(g).max() for g in expected["gradients"].values())
    for rank in run_ranks(curves, 2, configs, 2):
        for case, found in zip(cases, rank, strict=True):
            np.testing.assert_allclose(found["loss"], expected["loss"], rtol=2e-5, err_msg=str(case))
            np.testing.assert_allclose(found["norm"], expected["norm"], rtol=2e-4, err_msg=str(case))
            for name, gradient in expected["gradients"].items():
                np.testing.assert_allclose(
                    found["gradients"][name], gradient, rtol=1e-4, atol=2e-5 * largest, err_msg=f"{case} {name}"
                )


def uneven(configs: list[RunConfig]) -> list[tuple[float, float]]:
    """Loss and gradient norm of a batch whose chunks have unequal numbers of lengths on the ranks."""
    found = []
    for config in configs:
        engine, _ = start(config)
        world = engine.world
        lengths = torch.tensor([4, 4, 4, 4, 4, 4, 1, 2, 3, 4, 4, 2]) * 2000
        waveform = 0.1 * torch.randn(12, 8000, generator=torch.Generator().manual_seed(0))
        waveform *= torch.arange(8000) < lengths.unsqueeze(1)
        words, ids = torch.randint(5, 40, (12, 6), generator=torch.Generator().manual_seed(1)), torch.arange(12)
        rows = slice(world.rank * 12 // world.size, (world.rank + 1) * 12 // world.size)
        batch = Batch(
            waveform[rows],
            lengths[rows],
            words[rows],
            torch.ones_like(words[rows]),
            ids[rows],
            ids[rows],
            ids[rows],
            ids[rows],
        )
        result = engine.update([batch], RATES, seeds(0, 0, 1, world.rank))
        found.append((result.terms["loss"], result.gradient_norm))
    return found


@pytest.mark.slow
def test_unequal_lengths_over_ranks(folder: Path) -> None:
    """ZeRO 3 gathers parameters inside the forwards of all ranks, so no rank may make fewer."""
    config = tiny_config(folder, folder / "run")
    (expected,) = run_ranks(uneven, 1, [with_train(config, zero_stage=0)])[0]
    configs = [with_train(config, zero_stage=stage, micro_batch_size=3, kept_chunks=1) for stage in (1, 3)]
    for rank in run_ranks(uneven, 2, configs):
        np.testing.assert_allclose(rank, [expected] * 2, rtol=1e-4)
