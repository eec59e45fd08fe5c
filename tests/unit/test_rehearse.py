"""The schedule of a rehearsal, and what it finds in records of jobs."""

from __future__ import annotations

import pytest

from tools.rehearse.checks import Cost, costs
from tools.rehearse.schedule import KINDS, Fault, schedule
from tools.rehearse.watch import Hit, Record, Sight, stalls

KIND = KINDS["rank killed"]


def test_a_seed_gives_a_schedule_in_which_every_kind_comes_before_one_comes_again() -> None:
    faults = schedule(3, 40, 480)
    assert faults == schedule(3, 40, 480) != schedule(4, 40, 480)
    names = [fault.kind.name for fault in faults]
    turns = [names[first : first + len(KINDS)] for first in range(0, 40, len(KINDS))]
    assert set(turns[0]) == set(KINDS) and all(len(set(turn)) == len(turn) for turn in turns)
    assert [fault.step for fault in faults] == sorted(fault.step for fault in faults)
    assert faults[0].step > 0 and faults[-1].step < 480 and faults[0].after_s is None
    assert {fault.after_s is None for fault in faults} == {True, False}
    assert all(fault.kind.least <= fault.lasts_s <= fault.kind.most for fault in faults)


def sights(*seen: tuple[float, int, str, str, int]) -> Record:
    return Record(sights=[Sight(*each) for each in seen])


def test_a_stall_is_time_without_a_step_that_nobody_has_declared() -> None:
    training, waiting = ("RUNNING", "training", 1), ("RUNNING", "waiting", 1)
    still = sights((0, 5, *training), (10, 6, *training), (20, 6, *training), (50, 6, *training), (60, 7, *training))
    assert list(stalls(still)) == [(10, 40)]
    told = sights((0, 5, *training), (10, 5, *waiting), (90, 5, *waiting), (95, 6, *training))
    assert list(stalls(told)) == []
    queued = sights((0, 5, *training), (90, 5, "PENDING", "killed", 1), (95, 5, "RUNNING", "killed", 2))
    assert list(stalls(queued)) == []


@pytest.mark.parametrize("second_at", [None, 20.0])
def test_the_cost_of_a_fault_is_the_longest_time_without_a_new_step(second_at: float | None) -> None:
    """The step that was begun just after the fault is not the end of its cost."""
    fault = Fault(1, KIND, 3, None, 0.0, 0.5)
    record = sights((0, 0, "RUNNING", "training", 1), (5, 3, "RUNNING", "training", 1), (60, 9, "COMPLETED", "done", 2))
    record.begun = [(1, 1, 3), (2, 2, 3), (4, 3, 3), (6, 4, 3), (30, 3, 3), (31, 4, 3), (32, 5, 3), (33, 6, 3)]
    record.hits = [Hit(fault, "rank 0", 5.0, 3)]
    if second_at:
        record.hits.append(Hit(fault, "rank 1", second_at, 4))
        assert costs(record) == [Cost(14, True, 0, 0), Cost(12, False, 2, 1)]
    else:
        assert costs(record) == [Cost(26, False, 2, 1)]
