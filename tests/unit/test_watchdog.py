"""Which rank hangs, as judged from what the ranks publish, with clocks that a test moves."""

from __future__ import annotations

from dataclasses import dataclass, replace

from atr_scale.distributed.watchdog import Awake, Judge, Pulse, describe_hang

LIMIT, WAIT = 60.0, 3600.0


@dataclass
class Rank:
    """What a training thread does."""

    step: int = 7
    batches_read: int = 1
    signs: int = 1
    doing: str = "training"
    limit: float = LIMIT
    hang_limit: float = LIMIT


def pulse(rank: int = 1, **values: object) -> Pulse:
    mine = {
        "limit": LIMIT,
        "hang_limit": LIMIT,
        "step": 7,
        "batches_read": 1,
        "doing": "training",
        "age": LIMIT + 2,
        **values,
    }
    return Pulse(rank, "node", 100 + rank, 1, **mine)  # type: ignore[arg-type]


def test_the_rank_that_is_behind_hangs_not_those_that_wait_for_it() -> None:
    judge = Judge(0, Rank())
    reading = pulse(1, batches_read=0, doing="reading a batch")
    assert judge.behind([reading, pulse(2)], LIMIT + 1) == [reading]
    late = pulse(1, step=6)
    assert judge.behind([late, pulse(2)], LIMIT + 1) == [late]


def test_a_rank_that_has_just_made_progress_does_not_hang() -> None:
    assert Judge(0, Rank()).behind([pulse(1, batches_read=0, age=5.0)], LIMIT + 1) == []


def test_ranks_that_wait_for_one_in_a_declared_wait_wait_on() -> None:
    judge = Judge(0, Rank())
    outage = pulse(1, batches_read=0, doing="outage", limit=WAIT)
    assert judge.behind([outage], 5 * LIMIT) == []
    stuck = replace(outage, age=WAIT + 1)
    assert judge.behind([stuck], WAIT + 2) == [stuck]


def test_a_declared_wait_of_some_ranks_does_not_hide_one_that_has_not_come_to_it() -> None:
    saving = Rank(doing="saving", limit=WAIT)
    blocked = pulse(1)
    assert Judge(0, saving).behind([blocked], LIMIT + 1) == [blocked]


def test_those_that_waited_for_a_declared_wait_are_not_late_when_it_ends() -> None:
    """Rank 1 has read its batch after a long outage, and the step of both is under way."""
    judge = Judge(0, Rank())
    assert judge.behind([pulse(1, age=1.0)], 5 * LIMIT) == []
    assert judge.behind([pulse(1, age=LIMIT + 1)], 6 * LIMIT + 1) != []


def test_ranks_that_have_ended_are_not_behind() -> None:
    judge = Judge(0, Rank())
    assert [each.rank for each in judge.behind([pulse(1, step=3, ended=True)], LIMIT + 1)] == [0]


def test_progress_and_only_progress_starts_the_time_anew() -> None:
    rank = Rank()
    judge = Judge(0, rank)
    assert judge.own(50.0).age == 50.0
    rank.signs += 1
    assert judge.own(51.0).age == 0.0
    assert not judge.stalled(51.0 + LIMIT)
    assert judge.stalled(52.0 + LIMIT)


def test_a_neighbour_that_stops_publishing_is_gone_whatever_it_waits_for() -> None:
    judge = Judge(0, Rank(doing="saving", limit=WAIT))
    neighbour = pulse(1, doing="saving", limit=WAIT)
    judge.hear(neighbour, 5.0)
    assert not judge.silent_neighbour(neighbour, 4.0 + LIMIT)
    judge.hear(replace(neighbour, number=2), 4.0 + LIMIT)  # blocked, but alive
    assert not judge.silent_neighbour(neighbour, 3.0 + 2 * LIMIT)
    assert judge.silent_neighbour(neighbour, 5.0 + 2 * LIMIT)
    assert not judge.silent_neighbour(replace(neighbour, ended=True), 5.0 + 2 * LIMIT)


def test_a_neighbour_or_a_store_that_is_silent_does_not_end_a_run_that_goes_on() -> None:
    rank = Rank()
    judge = Judge(0, rank)
    judge.hear(pulse(1), 1.0)
    assert judge.silent_store(2.0 + LIMIT)
    assert judge.silent_neighbour(pulse(1), 2.0 + LIMIT)
    rank.signs += 1
    assert not judge.silent_store(3.0 + LIMIT)
    assert not judge.silent_neighbour(pulse(1), 3.0 + LIMIT)


def test_a_store_that_answers_is_not_silent() -> None:
    judge = Judge(0, Rank())
    judge.hear(pulse(1), 50.0)
    assert not judge.silent_store(49.0 + LIMIT)


def test_the_time_in_which_a_process_was_suspended_does_not_count() -> None:
    times = iter([0.0, 5.0, 10.0, 5000.0, 5005.0])
    awake = Awake(lambda: next(times))
    assert [awake(5.0) for _ in range(4)] == [5.0, 10.0, 20.0, 25.0]


def test_the_line_names_the_rank_that_hangs() -> None:
    reading, others = pulse(3, doing="reading a batch"), [pulse(rank) for rank in range(8)]
    assert describe_hang([reading], others) == (
        "no progress for 62 s: rank 3 (pid 103 on node, last seen at step 7, reading a batch) hangs, and the other "
        "ranks wait"
    )
    everybody = describe_hang(others, others)
    assert everybody.startswith("no progress for 62 s, and no rank is behind the others: rank 0 (")
    assert everybody.endswith(" and 5 more")
    assert describe_hang([reading], []) == "no progress for 62 s: reading a batch after step 7"


def test_the_line_names_a_rank_that_has_ended_while_the_others_wait() -> None:
    ended = pulse(1, ended=True)
    assert (
        describe_hang([pulse(0)], [pulse(0), ended]) == f"no progress for 62 s: {ended} ended, and the other ranks wait"
    )
