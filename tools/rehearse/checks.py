"""What must hold after a rehearsal, against the undisturbed run, and what each fault has cost."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

from atr_scale.run_files import METRICS, read_json_lines
from tests.faults.audit import Row, read_audit
from tools.rehearse.box import HANG_S, RANKS
from tools.rehearse.watch import Hit, Record, stalls

LOSSES_APART = 1e-5  # nats, if the number of ranks has changed
STALL_S = HANG_S + 60


class Check(NamedTuple):
    """What must hold, whether it does, and what was found."""

    what: str
    holds: bool
    found: str


class Cost(NamedTuple):
    """What a fault has cost, up to the next one.

    seconds: the longest time in which the run began no step that it had not begun before. open: it was not over when
    the next fault came. repeated: steps. starts: of the job.
    """

    seconds: float
    open: bool
    repeated: int
    starts: int


class Finished(NamedTuple):
    """A run that has ended: its local folder, what its ranks were given, and what was seen of its job."""

    run: Path
    audit: Path
    record: Record


def compare(found: Finished, reference: Finished, text_encoder: Path, steps: int, planned: int) -> list[Check]:
    """All checks of a run of `steps` steps in which `planned` faults were to happen."""
    changed = first_change(found.record, steps)
    return [
        Check("the job completes", found.record.state == "COMPLETED", found.record.state),
        Check("all faults happen", len(found.record.hits) == planned, f"{len(found.record.hits)} of {planned}"),
        _samples(read_audit(found.audit, text_encoder), read_audit(reference.audit, text_encoder), steps),
        _weights(found.run, reference.run, changed),
        *_losses(found.run, reference.run, steps, changed),
        _stalls(found.record),
    ]


def first_change(record: Record, steps: int) -> int:
    """The last step before the number of ranks was another one for the first time."""
    return min((step for _, step, ranks in record.begun if ranks != RANKS), default=steps + 1) - 1


def _samples(found: Sequence[Row], reference: Sequence[Row], steps: int) -> Check:
    """Every step had the samples of the undisturbed run, in order, each with its own caption."""
    here, there = (
        {step: [row.key for row in rows] for step, rows in groupby(rows, key=lambda row: row.step)}
        for rows in (found, reference)
    )
    wrong = [step for step in range(1, steps + 1) if here.get(step) != there.get(step)]
    mispaired = sum(row.tone != row.caption for row in found)
    text = f"{len(found)} samples in {steps} steps"
    if wrong or mispaired:
        text = f"{len(wrong)} steps with other samples, from step {wrong[:1]} on; {mispaired} wrong pairs"
    return Check("no sample is lost, seen twice, or paired wrongly", not wrong and not mispaired and bool(found), text)


def _weights(found: Path, reference: Path, changed: int) -> Check:
    what = f"weights are equal to the bit while there are {RANKS} ranks"
    both = [step for step in sorted(_saved(found) & _saved(reference)) if step <= changed]
    wrong = [step for step in both if not _same(_weights_of(found, step), _weights_of(reference, step))]
    text = f"those of {len(both)} checkpoints, up to step {max(both, default=0)}"
    return Check(what, bool(both) and not wrong, f"other weights at step {wrong[0]}" if wrong else text)


def _saved(run: Path) -> set[int]:
    return {int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*")}


def _weights_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step}" / "model.safetensors")


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _losses(found: Path, reference: Path, steps: int, changed: int) -> Iterator[Check]:
    here, there = losses(found), losses(reference)
    missing = [step for step in range(1, steps + 1) if step not in here or step not in there]
    before = [step for step in here if step <= changed and here[step] != there.get(step)]
    text = f"those of {min(changed, steps)} steps"
    if missing or before:
        text = f"no loss of step {missing[0]}" if missing else f"another loss at step {before[0]}"
    yield Check(f"losses are equal to the bit while there are {RANKS} ranks", not missing and not before, text)
    if changed < steps:
        apart = max(abs(here[step] - there[step]) for step in here if step in there)
        what = f"losses are equal to {LOSSES_APART:g} with other numbers of ranks"
        yield Check(what, apart <= LOSSES_APART, f"at most {apart:.1e} apart, from step {changed + 1} on")


def losses(run: Path) -> dict[int, Any]:
    """The loss of every step that the run has logged."""
    return {line["step"]: line["loss"] for line in read_json_lines(run / METRICS) if line.get("kind") == "train"}


def _stalls(record: Record) -> Check:
    longest = max((seconds for _, seconds in stalls(record)), default=0.0)
    what = f"no stall of more than {STALL_S} s is undeclared"
    return Check(what, longest <= STALL_S, f"the longest took {longest:.0f} s")


def costs(record: Record) -> list[Cost]:
    """The cost of every fault, in order."""
    return [_cost(record, hit, after.began if after else None) for hit, after in pairwise([*record.hits, None]) if hit]


def _cost(record: Record, hit: Hit, until: float | None) -> Cost:
    """until: the next fault."""
    repeated, highest, marks, end = 0, 0, [hit.began], math.inf if until is None else until
    for time, step, _ in record.begun:
        if hit.began <= time < end:
            repeated += step <= highest
            marks += [time] if step > highest else []
        highest = max(highest, step)
    marks += [] if until is None else [until]
    gaps = [after - before for before, after in pairwise(marks)] or [0.0]
    starts = [sight.starts for sight in record.sights if sight.time <= hit.began][-1:] or [1]
    after = max((sight.starts for sight in record.sights if sight.time <= end), default=1)
    return Cost(max(gaps), until is not None and gaps[-1] == max(gaps), repeated, after - starts[0])
