"""The learning rate as a function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math


def learning_rate(step: int, *, peak: float, warmup_steps: int, steps: int, floor: float) -> float:
    """Rate of update `step` (0-based) of `steps`: linear warm-up to `peak`, cosine down to `floor` * `peak`."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, steps - 1 - warmup_steps))
    return peak * (floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2)
