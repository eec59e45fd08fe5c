"""What would make a planned step faster, by the plan's own figures."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from atr_scale.planner.costs import Costs
from atr_scale.planner.estimate import StepEstimate, estimate_step, fitting_micro_batch
from atr_scale.planner.timeline import Cluster

ROUNDS = 3
LEAST_GAIN = 0.01  # of the rate
# What is tried in the section `train`. Stage 3 sends more than the others: it is no way to be faster.
OTHERS: tuple[tuple[str, Any], ...] = (
    ("zero_stage", 0),
    ("zero_stage", 1),
    ("zero_stage", 2),
    ("gradient_dtype", "bf16"),
    ("tf32", True),
    ("head_products", "tf32"),
    ("head_products", "bf16x3"),
)


@dataclass(frozen=True)
class Advice:
    """A change of one setting, and the step with it and with those before it. gain: by which the rate grows with it."""

    setting: str
    planned: StepEstimate
    gain: float


@dataclass(frozen=True)
class _Choice:
    setting: str
    costs: Costs
    cluster: Cluster
    micro_batch: int


def advise(costs: Costs, cluster: Cluster, planned: StepEstimate) -> list[Advice]:
    """The changes that help most, one after the other: the best one, then the best one beside it, and so on."""
    found: list[Advice] = []
    now = _Choice("", costs, cluster, planned.split.micro_batch)
    for _ in range(ROUNDS):
        steps = [(choice, _estimate(choice, planned)) for choice in _choices(now, planned)]
        if not steps:
            break
        now, best = max(steps, key=lambda pair: pair[1].rate)
        before = found[-1].planned if found else planned
        gain = best.rate / before.rate - 1
        if gain < LEAST_GAIN:
            break
        found.append(Advice(now.setting, best, gain))
    return found


def _estimate(choice: _Choice, planned: StepEstimate) -> StepEstimate:
    return estimate_step(choice.costs, choice.cluster, planned.split.global_batch, choice.micro_batch)


def _choices(now: _Choice, planned: StepEstimate) -> Iterator[_Choice]:
    """Other values of one setting each, that fit."""
    split, step, train = planned.split, _estimate(now, planned), now.costs.config.train
    if step.bound == "loader":
        rest = sum(step.seconds.values()) - step.seconds["loader"]
        workers = math.ceil(now.cluster.workers * step.seconds["loader"] / rest)
        yield replace(now, setting=f"data.workers={workers}", cluster=replace(now.cluster, workers=workers))
    for key, value in OTHERS:
        if getattr(train, key) == value or (key == "gradient_dtype" and train.zero_stage == 3):
            continue
        costs = with_train(now.costs, **{key: value})
        most = fitting_micro_batch(costs, now.cluster, split.global_batch)
        if most is not None and most >= now.micro_batch:
            yield replace(now, setting=f"train.{key}={str(value).lower()}", costs=costs)
    most = fitting_micro_batch(now.costs, now.cluster, split.global_batch)
    if most is not None and most > now.micro_batch:
        value = "null" if most == split.local_batch else most
        yield replace(now, setting=f"train.micro_batch_size={value}", micro_batch=most)


def with_train(costs: Costs, **train: Any) -> Costs:
    """The same measured costs under other values in the section `train`."""
    config = costs.config
    return replace(costs, config=config.model_copy(update={"train": config.train.model_copy(update=train)}))
