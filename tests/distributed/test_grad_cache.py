"""GradCache: the gradient of the whole batch from chunks of it, on any number of ranks and at every ZeRO stage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from atr_scale.config import RunConfig, SpecAugmentSection
from atr_scale.data.batch import Batch
from atr_scale.data.stream import read_batches
from atr_scale.data.text import caption_tokenizer
from atr_scale.model import Retriever
from atr_scale.parallel.world import World
from atr_scale.training.grad_cache import GradCache
from atr_scale.training.setup import training_stream
from tests.tiny_run import tiny_config

CPU = torch.device("cpu")
SEED = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpus and text encoder, built once."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_config(folder, folder / "run")
    return folder


def whole(config: RunConfig) -> Batch:
    """A batch whose clips have two lengths, in no order."""
    model = Retriever(config.model, config.objective)
    stream = training_stream(config, caption_tokenizer(config), model.sample_rate, World())
    batch = next(read_batches(stream.between(0, 1), 0))
    lengths = batch.lengths.clone()
    lengths[::3] //= 2
    keep = torch.arange(batch.waveform.shape[1]) < lengths.unsqueeze(1)
    return Batch(**{**vars(batch), "lengths": lengths, "waveform": batch.waveform.double() * keep})


def gradients(config: RunConfig, batch: Batch, chunk_size: int | None = None, kept: int = 0) -> dict[str, Tensor]:
    """In float64, of one process without DeepSpeed."""
    torch.manual_seed(0)
    model = Retriever(config.model, config.objective).double().train()
    model.audio_encoder.augment_seed = SEED
    if chunk_size is None:
        torch.manual_seed(SEED)
        model(batch)["loss"].mul(3.0).backward()
    else:
        GradCache(model, model, lambda loss: loss.backward(), CPU, chunk_size, kept).accumulate(batch, SEED, 3.0)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def differ(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference, as a share of the largest gradient."""
    assert found.keys() == expected.keys() and expected
    largest = max(g.abs().max() for g in expected.values())
    return float(max((found[n] - g).abs().max() for n, g in expected.items()) / largest)


@pytest.mark.parametrize("scorer", ["pooled", "meanmax", "netrvlad", "tap", "lgmm"])
def test_chunks_give_the_gradient_of_the_whole_batch(folder: Path, scorer: str) -> None:
    """With SpecAugment and all terms of the loss, kept graphs or none."""
    config = tiny_config(folder, folder / "run")
    config.model.scorer.name = scorer
    config.model.audio.spec_augment = SpecAugmentSection(time_drop_width=8, freq_drop_width=8)
    config.objective.pmr.weight = config.objective.cmsc.weight = config.objective.intra_modal.weight = 0.5
    batch = whole(config)
    expected = gradients(config, batch)
    for chunk_size, kept in ((4, 0), (4, 2), (3, 4), (1, 0), (12, 0)):
        assert differ(gradients(config, batch, chunk_size, kept), expected) < 1e-12, (chunk_size, kept)
