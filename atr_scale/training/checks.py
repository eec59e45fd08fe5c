"""What a run is made of, from its configuration; shared by the run itself and by its dry run."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from atr_scale.checkpoint import build_retriever, check_checksums, find_checkpoint
from atr_scale.config import RunConfig
from atr_scale.data.shard_reader import ShardSet
from atr_scale.data.stream import TrainingStream
from atr_scale.data.tokenizer import CaptionTokenizer
from atr_scale.distributed.world import World
from atr_scale.errors import UserError
from atr_scale.model import Retriever
from atr_scale.teachers.tables import TeacherEnsemble

# What may differ when a run is resumed; everything else would make it another run.
FREE_TO_CHANGE = (
    "run.dir", "data.workers", "data.validation", "data.test", "data.max_drop_rate", "evaluation.",
    "train.micro_batch_size", "train.kept_chunks", "train.evaluate_every", "train.checkpoint_every",
    "train.keep_checkpoints", "train.log_every", "train.max_bad_steps", "train.initial_checkpoint",
)  # fmt: skip


def check_batch_size(config: RunConfig, world_size: int) -> None:
    """UserError where the global batch does not divide into the ranks' forwards, or must not."""
    train = config.train
    if train.global_batch_size % world_size:
        raise UserError(
            f"train.global_batch_size = {train.global_batch_size} does not divide among {world_size} ranks: "
            f"set it to a multiple, for example {-(-train.global_batch_size // world_size) * world_size}"
        )
    share = train.global_batch_size // world_size
    micro = train.micro_batch_size or share
    if share % micro:
        raise UserError(
            f"train.micro_batch_size = {micro} does not divide a rank's share of train.global_batch_size, {share} on "
            f"{world_size} ranks: set it to {_largest_divisor(share, micro)}, or to null for one forward"
        )
    if micro < share and config.model.audio.batch_norm == "local":
        raise UserError(
            f"model.audio.batch_norm is local, but train.micro_batch_size = {micro} cuts a rank's {share} pairs into "
            "chunks with statistics of their own: set it to frozen, or train.micro_batch_size to null"
        )


def _largest_divisor(number: int, limit: int) -> int:
    return next(divisor for divisor in range(min(number, limit), 0, -1) if number % divisor == 0)


def check_run_folder(folder: Path) -> None:
    """Make the run folder. UserError where it cannot be made or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the run folder {folder} cannot be made ({error.strerror}): give another run.dir") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"the run folder {folder} is not writable: give another run.dir")


def new_model(config: RunConfig, world: World, resume_from: Path | None = None) -> Retriever:
    """The model of a run as its updates need it, with its first weights: those of the checkpoint it goes on from, else
    those of train.initial_checkpoint, else pretrained and new ones. Raises UserError if they are another model's."""
    start = resume_from
    if start is None and config.train.initial_checkpoint:
        start = find_checkpoint(config.train.initial_checkpoint)
        check_checksums(start)
    # ZeRO 3 gathers parameters inside every forward: all ranks must make equally many.
    rounds = world.max_int if config.train.zero_stage == 3 else None
    options: dict[str, Any] = {"precision": config.train.precision, "equal_rounds": rounds}
    if start is None:
        return Retriever(config.model, config.objective, **options)
    return build_retriever(config, start, **options)


def training_stream(config: RunConfig, tokenizer: CaptionTokenizer, sample_rate: int, world: World) -> TrainingStream:
    return TrainingStream(
        config.data,
        tokenizer=tokenizer,
        sample_rate=sample_rate,
        global_batch_size=config.train.global_batch_size,
        seed=config.run.seed,
        world=world,
    )


def read_teacher(config: RunConfig, sources: Sequence[ShardSet]) -> TeacherEnsemble | None:
    """The tables of objective.distillation where it has a weight. UserError where they are not about `sources`."""
    section = config.objective.distillation
    if section.weight == 0:
        return None
    teacher = TeacherEnsemble.read(section.tables)
    for shards in sources:
        teacher.check(shards)
    return teacher


def num_steps(config: RunConfig, stream: TrainingStream) -> tuple[int, int]:
    """(updates in all, updates of the warm-up)."""
    train = config.train
    steps = train.steps
    if steps is None:
        assert train.epochs is not None
        steps = max(1, math.ceil(train.epochs * stream.order.epoch_batches / train.accum_steps))
    return steps, round(0.05 * steps) if train.warmup_steps is None else train.warmup_steps


def differences(saved: dict[str, Any], current: dict[str, Any], prefix: str = "") -> list[str]:
    """Keys whose values differ between two configurations, with both values, but for those free to change."""
    found = []
    for key in sorted({*saved, *current}):
        name, old, new = f"{prefix}{key}", saved.get(key), current.get(key)
        if name.startswith(FREE_TO_CHANGE):
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{name}.")
        elif old != new:
            found.append(f"{name} was {old}, now {new}")
    return found
