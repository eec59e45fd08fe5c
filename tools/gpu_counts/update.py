"""Runs one update, or a part of it, on CUDA tensors without values, and counts it by phase."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor

from atr_scale.batch import Batch, TokenSequence
from atr_scale.config import RunConfig
from atr_scale.distributed.world import World
from atr_scale.errors import UserError
from atr_scale.model import Encoded, Retriever, StepContext
from atr_scale.planner.architecture import become_fake, build_without_weights
from atr_scale.planner.measure import Teachers, random_teacher
from atr_scale.planner.planner import UNCUT_TOKENS, teacher_widths
from atr_scale.precision import AUTOCAST, encoder_products
from atr_scale.training.engine import Engine
from atr_scale.training.schedule import seeds
from tools.gpu_counts.counter import CUDA, Counts
from tools.gpu_counts.fake_cuda import counted

Part = Literal["update", "optimizer", "heads", "audio", "text"]
GROUPS = ("audio", "text", "heads")
REST = "optimizer"  # what no other phase holds: reduction and norm of the gradient, and the step


@dataclass(frozen=True)
class Workload:
    """One rank's share of an update.

    rows: pairs of the rank. frames: audio tokens that the heads get, if they are counted alone. mixed: lengths of clips
    as in WavCaps instead of one.
    """

    ranks: int
    rows: int
    seconds: float
    words: int
    frames: int = 32
    mixed: bool = False

    @staticmethod
    def of(config: RunConfig, ranks: int, global_batch: int | None = None, **changes: Any) -> Workload:
        """That of a configuration. Raises UserError if the batch does not divide among the ranks."""
        size = global_batch or config.train.global_batch_size
        if size % ranks:
            raise UserError(
                f"a global batch of {size} does not divide among {ranks} ranks: give other --ranks or --global-batch"
            )
        words = config.data.captions.max_tokens or UNCUT_TOKENS
        return Workload(ranks, size // ranks, **{"seconds": config.data.crop_seconds, "words": words, **changes})


def count_update(config: RunConfig, load: Workload, part: Part = "update") -> Counts:
    """Counts of one update, of its phase "optimizer", or of both directions of score and loss or of an encoder."""
    model = build_without_weights(config, augmentation=True)
    widths = teacher_widths(config, model)
    batch = _batch(load, model.sample_rate)
    with counted(load.ranks) as (counts, mode), _phases(counts), encoder_products(config.train.tf32):
        become_fake(model, mode, "cuda")
        model.to = lambda *args, **kwargs: model  # type: ignore[method-assign]  # it is there
        context = StepContext()
        if widths:
            teacher = random_teacher(Teachers(widths, config.objective.distillation.ensemble), load.rows)
            context = StepContext(teacher=teacher.labels)
        if part == "update" or part == "optimizer":
            _run_update(model, config, batch, load, context, counts)
            if part == REST:
                counts.keep(REST)
        elif part == "heads":
            _run_heads(model, batch, load, context)
        else:
            _run_encoder(model, batch, part)
    return counts


def _run_update(
    model: Retriever, config: RunConfig, batch: Batch, load: Workload, context: StepContext, counts: Counts
) -> None:
    size = load.rows * load.ranks
    train = config.train.model_copy(update={"global_batch_size": size})
    engine = Engine(model, train, World.current(), CUDA)
    if not engine.optimizer.state:  # without ZeRO it is made by the first step
        _make_state(engine.optimizer)
    counts.clear()
    batches = [batch] * train.accum_steps
    with counts.phase(REST):
        result = engine.update(batches, dict.fromkeys(GROUPS, 1e-4), seeds(0, 0, train.accum_steps, 0), context)
        _ = result.applied  # training reads it of every update


def _make_state(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def _run_heads(model: Retriever, batch: Batch, load: Workload, context: StepContext) -> None:
    dtype, width = AUTOCAST.get(model.precision, torch.float32), model.audio_projection.dim

    def encoded(tokens: int, read: bool) -> TokenSequence:
        count = tokens if read else 0
        return TokenSequence(
            torch.empty(load.rows, count, width, dtype=dtype, device=CUDA, requires_grad=True),
            torch.empty(load.rows, count, dtype=torch.bool, device=CUDA),
            torch.empty(load.rows, width, dtype=dtype, device=CUDA, requires_grad=True),
        )

    sides = Encoded(encoded(load.words, model.reads_text_tokens), encoded(load.frames, model.reads_audio_tokens))
    terms = model(batch.to(CUDA), context, encoded=sides)
    terms["loss"].backward()


def _run_encoder(model: Retriever, batch: Batch, part: Literal["audio", "text"]) -> None:
    moved = batch.to(CUDA)
    if part == "audio":
        encoded = model.encode_audio(moved.waveform, moved.lengths)
    else:
        encoded = model.encode_text(moved.input_ids, moved.attention_mask)
    outputs = [x for x in (encoded.tokens, encoded.pooled) if x.requires_grad]
    torch.autograd.backward(outputs, [torch.empty_like(x) for x in outputs])


@contextmanager
def _phases(counts: Counts) -> Iterator[None]:
    """Count under the name of a phase whatever the function does that begins it."""

    def within(name: str, function: Any) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            with counts.phase(name):
                return function(*args, **kwargs)

        return called

    places: tuple[tuple[Any, str, str], ...] = (
        (Batch, "to", "to device"),
        (Retriever, "encode_text", "encode text"),
        (Retriever, "encode_audio", "encode audio"),
        (Retriever, "forward", "score and loss"),
        (Tensor, "backward", "backward"),
        (torch.autograd, "backward", "backward"),
        (torch.autograd, "grad", "backward"),
    )
    with ExitStack() as stack:
        for owner, attribute, name in places:
            stack.enter_context(mock.patch.object(owner, attribute, within(name, getattr(owner, attribute))))
        yield


def _batch(load: Workload, sample_rate: int) -> Batch:
    """The local batch in pinned memory, as the loader gives it."""
    rows, samples = load.rows, round(load.seconds * sample_rate)
    lengths = torch.full((rows,), samples)
    if load.mixed:
        lengths = torch.tensor([round(seconds * sample_rate) for seconds in mixed_lengths(rows, load.seconds)])
    words, ids = torch.ones(rows, load.words, dtype=torch.int64), torch.arange(rows)
    return Batch(
        waveform=torch.empty(rows, int(lengths.max()), dtype=torch.int16),
        lengths=lengths,
        input_ids=words,
        attention_mask=words,
        clip_ids=ids,
        caption_ids=ids,
        caption_index=ids,
        stored_ids=ids,
    ).pin_memory()


def mixed_lengths(rows: int, longest: float) -> list[float]:
    """Seconds as in WavCaps, in steps of half a second: 45 % the longest, 25 % of ten seconds, the rest between."""
    draw = random.Random(0)
    found = []
    for _ in range(rows):
        kind = draw.random()
        seconds = longest if kind < 0.45 else 10.0 if kind < 0.70 else draw.uniform(1, longest)
        found.append(int(min(seconds, longest) / 0.5) * 0.5)
    return found
