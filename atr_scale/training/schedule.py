"""The learning rate and the random seeds as functions of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np


def learning_rate(step: int, *, peak: float, warmup_steps: int, steps: int, floor: float) -> float:
    """Rate of update `step` (0-based) of `steps`: linear warm-up to `peak`, cosine down to `floor` * `peak`."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, steps - 1 - warmup_steps))
    return peak * (floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2)


class Seeds(NamedTuple):
    """What fixes one loss' random draws: dropout's differ between ranks, those of augmentation are equal on all."""

    dropout: int
    augmentation: int


def seeds(run_seed: int, step: int, num_losses: int, rank: int) -> list[Seeds]:
    """One pair for each loss of update `step`."""
    dropout, augmentation = (
        np.random.SeedSequence(key).generate_state(num_losses, np.uint64) >> 1
        for key in ([run_seed, 3, step, rank], [run_seed, 4, step])
    )
    return [Seeds(int(one), int(other)) for one, other in zip(dropout, augmentation, strict=True)]
