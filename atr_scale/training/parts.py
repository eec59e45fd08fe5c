"""The parts of a run, opened from its configuration; shared by the run itself and by its dry run."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atr_scale.checkpoint import build_retriever
from atr_scale.config import RunConfig
from atr_scale.data.shard_reader import ShardSet, open_shards
from atr_scale.data.stream import TrainingStream, open_sources
from atr_scale.data.tokenizer import CaptionTokenizer, caption_tokenizer
from atr_scale.distributed.world import World
from atr_scale.evaluation.selection import check_labels, check_selection
from atr_scale.model import Retriever
from atr_scale.teachers.ensemble import TeacherEnsemble
from atr_scale.teachers.targets import Constructed, true_targets
from atr_scale.training.initial_weights import InitialWeights, start_from
from atr_scale.training.param_groups import freeze
from atr_scale.training.schedule import RunLength, check_schedule, objective_in_steps, run_length
from atr_scale.training.unlikely import unlikely_values

logger = logging.getLogger(__name__)

LONG_S = 3.0


@dataclass(frozen=True)
class RunParts:
    """All that a run reads, and the model that it trains (with its frozen layers), before DeepSpeed takes it over.

    initial: what the model has taken from train.initial_checkpoint, None if nothing.
    """

    model: Retriever
    initial: InitialWeights | None
    tokenizer: CaptionTokenizer
    stream: TrainingStream
    teacher: TeacherEnsemble | Constructed | None
    length: RunLength


def open_parts(config: RunConfig, world: World, resume_from: Path | None = None) -> RunParts:
    """Open the training data and build the model. Raises UserError if a part is missing or does not fit the others."""
    with announced("opening", f"training shards {', '.join(source.shards for source in config.data.train)}"):
        sources = open_sources(config.data)
        length = run_length(config, sources)
        check_schedule(config, length)
    config = objective_in_steps(config, length)
    text, audio = config.model.text.name, config.model.audio
    pretrained = resume_from is None and config.train.initial_checkpoint is None
    weights = f" from {audio.checkpoint}" if audio.checkpoint and pretrained else ""
    with announced("loading", f"text encoder {text} and audio encoder {audio.name}{weights}"):
        model, initial = new_model(config, world, resume_from)
    if initial:
        logger.info("initial weights %s", initial)
    for line in unlikely_values(config, sources, model.sample_rate) if world.is_main else ():
        logger.warning("%s", line)
    freeze(model, config.train)
    tokenizer = caption_tokenizer(model.text_encoder.tokenizer, config.data.captions)
    stream = training_stream(config, tokenizer, model.sample_rate, world, sources)
    return RunParts(model, initial, tokenizer, stream, read_teacher(config, sources), length)


@contextmanager
def announced(action: str, what: str) -> Iterator[None]:
    """Log a part of the start when it begins, and its seconds if it has taken longer than LONG_S."""
    logger.info("%s %s", action, what)
    start = time.perf_counter()
    yield
    seconds = time.perf_counter() - start
    if seconds > LONG_S:
        logger.info("%s took %.0f s", action, seconds)


def open_validation(config: RunConfig) -> dict[str, ShardSet]:
    """The sets of data.validation by name. UserError if one is missing, or if none can give evaluation.select."""
    if not config.data.validation_sets:
        return {}
    with announced("opening", f"validation shards {', '.join(config.data.validation_sets.values())}"):
        sets = {name: open_shards(place) for name, place in config.data.validation_sets.items()}
    check_selection(config.evaluation.select, list(sets))
    check_labels(config.evaluation.select, sets)
    return sets


def new_model(
    config: RunConfig, world: World, resume_from: Path | None = None
) -> tuple[Retriever, InitialWeights | None]:
    """The model of a run as its optimizer steps need it, with its first weights, and what is taken of another run.

    The weights are those of the checkpoint that the run continues, else those that train.initial_checkpoint names, else
    pretrained and new ones. Raises UserError if a checkpoint does not fit.
    """
    # ZeRO 3 gathers parameters inside every forward pass: all ranks must make equally many.
    rounds = world.max_int if config.train.zero_stage == 3 else None
    train = config.train
    options: dict[str, Any] = {
        "precision": train.precision,
        "tf32": train.tf32,
        "head_products": train.head_products,
        "equal_rounds": rounds,
    }
    if resume_from is not None:
        return build_retriever(config, resume_from, **options), None
    if config.train.initial_checkpoint is not None:
        return start_from(config.train.initial_checkpoint, config, **options)
    return Retriever(config.model, config.objective, **options), None


def training_stream(
    config: RunConfig,
    tokenizer: CaptionTokenizer,
    sample_rate: int,
    world: World,
    sources: Sequence[ShardSet] | None = None,
) -> TrainingStream:
    """This rank's stream of training batches at `sample_rate` Hz, from `sources`, by default those of `data.train`."""
    return TrainingStream(
        config.data,
        tokenizer=tokenizer,
        sample_rate=sample_rate,
        global_batch_size=config.train.global_batch_size,
        seed=config.run.seed,
        world=world,
        sources=sources,
    )


def read_teacher(config: RunConfig, sources: Sequence[ShardSet]) -> TeacherEnsemble | Constructed | None:
    """The teachers of objective.distillation, None if it has no weight.

    Raises UserError if they do not know the clips of `sources`.
    """
    section = config.objective.distillation
    if section.weight == 0:
        return None
    if section.targets in ("random", "uniform"):
        return Constructed(section.targets, config.run.seed)
    teacher = TeacherEnsemble.read(section) if section.targets == "estimated" else true_targets(section, sources)
    teacher.check(sources)
    return teacher
