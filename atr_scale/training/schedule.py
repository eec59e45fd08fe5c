"""The learning rate and the random seeds as functions of the step: a checkpoint need not hold them."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np


def learning_rate(step: int, *, peak: float, warmup_steps: int, steps: int, floor: float) -> float:
    """Rate of optimizer step `step` (0-based) of `steps`: linear warm-up to `peak`, then a cosine to `floor * peak`."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, steps - 1 - warmup_steps))
    return peak * (floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2)


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
