"""The lengths of a run, and the learning rate and the random seeds as functions of the step.

A checkpoint need not hold any of them: they follow from the configuration, the shards and the step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal, NamedTuple

import numpy as np

from atr_scale.config import RunConfig
from atr_scale.data.shard_reader import ShardSet
from atr_scale.errors import UserError
from atr_scale.losses.terms import CMSCSection

PARTS = ("train.warmup", "train.decay", "train.cooldown", "objective.cmsc.beta_warmup")  # each _steps or _epochs


def learning_rate(
    step: int,
    *,
    peak: float,
    warmup_steps: int,
    steps: int,
    floor: float,
    schedule: Literal["cosine", "constant"] = "cosine",
    decay_steps: int | None = None,
    cooldown_steps: int = 0,
) -> float:
    """Rate of optimizer step `step` (0-based) of `steps`: linear warm-up to `peak`, then the schedule.

    cosine: to `floor * peak` at step `decay_steps - 1`, by default the last one, and flat from there on. constant: at
    `peak`, and over the last `cooldown_steps` linearly to `floor * peak`. Beyond the run it stays at its last rate.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        cooled = min(max(0, step + 1 - (steps - cooldown_steps)), cooldown_steps)
        return peak * (1 - (1 - floor) * cooled / max(1, cooldown_steps))
    end = steps if decay_steps is None else decay_steps
    progress = 1.0 if step >= end else (step - warmup_steps) / max(1, end - 1 - warmup_steps)
    return peak * (floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2)


@dataclass(frozen=True)
class RunLength:
    """What the keys of a run's length and schedule mean on its shards.

    steps, warmup_steps, decay_steps, cooldown_steps, beta_warmup_steps: in optimizer steps. epoch_steps: those of an
    epoch, a fraction, because an epoch's tail opens the next one. epoch_visits: visits to clips in an epoch, as many as
    the training data has clips or captions (train.epoch_of). captions: None if they are not counted.
    """

    steps: int
    warmup_steps: int
    decay_steps: int
    cooldown_steps: int
    beta_warmup_steps: int
    epoch_steps: float
    epoch_visits: int
    clips: int
    captions: int | None


def run_length(config: RunConfig, sources: Sequence[ShardSet]) -> RunLength:
    """The lengths of a run on the shards of its mixture.

    An epoch of captions counts captions and does not order them: it has as many visits as the mixture has captions, and
    each visit draws one caption of its clip. Its tail opens the next epoch. Published code drops that tail, the last
    incomplete batch: 20 epochs on Clotho in batches of 64 are 5,980 steps there, with 299 of warm-up, and 5,999 here.
    """
    train, cmsc = config.train, config.objective.cmsc
    clips = sum(map(len, sources))
    captions = _captions(sources, count=train.epoch_of == "captions")
    visits = captions if train.epoch_of == "captions" and captions else clips
    batches = visits / train.global_batch_size
    steps = train.steps
    if steps is None:
        assert train.epochs is not None
        steps = max(1, math.ceil(train.epochs * batches / train.accum_steps))
    epoch_steps = batches / train.accum_steps

    def in_steps(given: int | None, epochs: float | None, default: int) -> int:
        """Whole steps in `epochs`, so that parts that make up all epochs of a run fit into it."""
        return math.floor(epochs * epoch_steps + 1e-9) if epochs is not None else default if given is None else given

    soft = isinstance(cmsc, CMSCSection) and cmsc.weight > 0
    return RunLength(
        steps=steps,
        warmup_steps=in_steps(train.warmup_steps, train.warmup_epochs, round(0.05 * steps)),
        decay_steps=in_steps(train.decay_steps, train.decay_epochs, steps),
        cooldown_steps=in_steps(train.cooldown_steps, train.cooldown_epochs, 0),
        beta_warmup_steps=in_steps(cmsc.beta_warmup_steps, cmsc.beta_warmup_epochs, 0) if soft else 0,
        epoch_steps=epoch_steps,
        epoch_visits=visits,
        clips=clips,
        captions=captions,
    )


def _captions(sources: Sequence[ShardSet], count: bool) -> int | None:
    """Captions of all sources. None if some are not known and shall not be counted."""
    numbers = [shards.count_captions() if count else shards.num_captions for shards in sources]
    return sum(number for number in numbers if number is not None) if None not in numbers else None


def check_schedule(config: RunConfig, length: RunLength) -> None:
    """UserError if a part of the schedule is longer than the run, or if parts overlap."""
    key = "epochs" if config.train.steps is None else "steps"
    run = f"longer than the run of {length.steps} optimizer steps (train.{key} = {getattr(config.train, key)})"
    for part in PARTS:
        if getattr(length, f"{part.rpartition('.')[2]}_steps") > length.steps:
            raise UserError(f"{_given(config, length, part)} is {run}: shorten it, or lengthen the run")
    warmup = _given(config, length, "train.warmup")
    if length.decay_steps < length.warmup_steps:
        decay = _given(config, length, "train.decay")
        raise UserError(f"{decay} ends before the warm-up, {warmup}: end the decay later, or shorten the warm-up")
    if length.warmup_steps + length.cooldown_steps > length.steps:
        both = f"{warmup} and {_given(config, length, 'train.cooldown')}"
        raise UserError(f"{both} are together {run}: shorten them, or lengthen the run")


def _given(config: RunConfig, length: RunLength, part: str) -> str:
    """The key that gives a part of the schedule, with its value and, if that is in epochs, its optimizer steps."""
    *sections, name = part.split(".")
    section, steps = reduce(getattr, sections, config), getattr(length, f"{name}_steps")
    epochs = getattr(section, f"{name}_epochs")
    if epochs is not None:
        return f"{part}_epochs = {epochs} ({steps} optimizer steps)"
    return f"{part}_steps = {steps}" + ("" if getattr(section, f"{name}_steps") is not None else " (the default)")


def objective_in_steps(config: RunConfig, length: RunLength) -> RunConfig:
    """The configuration with every length of a loss term in optimizer steps: terms do not know what an epoch is."""
    cmsc = config.objective.cmsc
    if not isinstance(cmsc, CMSCSection) or cmsc.beta_warmup_epochs is None:
        return config
    changed = cmsc.model_copy(update={"beta_warmup_steps": length.beta_warmup_steps, "beta_warmup_epochs": None})
    return config.model_copy(update={"objective": config.objective.model_copy(update={"cmsc": changed})})


def describe_length(config: RunConfig, length: RunLength) -> tuple[str, str]:
    """(optimizer steps and schedule, visits to clips and captions) of the run and of an epoch, a line each."""
    train, unit = config.train, config.train.epoch_of
    parts = [f"{length.warmup_steps} of them warm-up"]
    if train.schedule == "constant":
        parts.append(f"then constant, {length.cooldown_steps} of cool-down at the end")
    else:
        flat = f", then flat for {length.steps - length.decay_steps}" if length.decay_steps < length.steps else ""
        parts.append(f"then cosine to step {length.decay_steps}{flat}")
    if length.beta_warmup_steps:
        parts.append(f"beta rises over {length.beta_warmup_steps}")
    visits = length.steps * train.accum_steps * train.global_batch_size
    each = [f"{visits / length.clips:.1f} to each of {length.clips:,} clips"]
    if length.captions:
        each.append(f"{visits / length.captions:.1f} to each of {length.captions:,} captions")
    return (
        f"{length.steps} optimizer steps, {', '.join(parts)}; an epoch of {unit} is {length.epoch_steps:.1f} steps",
        f"{visits:,}, on average {' and '.join(each)}; an epoch of {unit} is {length.epoch_visits:,} visits",
    )


class Seeds(NamedTuple):
    """Seeds of the random draws of one loss: dropout's differ between ranks, augmentation's are the same on all."""

    dropout: int
    augmentation: int


def seeds(run_seed: int, step: int, num_losses: int, rank: int) -> list[Seeds]:
    """One pair for each loss of optimizer step `step`."""
    dropout, augmentation = (
        np.random.SeedSequence(key).generate_state(num_losses, np.uint64) >> 1
        for key in ([run_seed, 3, step, rank], [run_seed, 4, step])
    )
    return [Seeds(int(one), int(other)) for one, other in zip(dropout, augmentation, strict=True)]
