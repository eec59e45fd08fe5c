"""The flag that a signal sets, and evaluations that are abandoned for it."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from torch._C._distributed_c10d import HashStore

from atr_scale.distributed.lifeline import STOP_SIGNALS
from atr_scale.distributed.world import World
from atr_scale.evaluation.parallel import Abandoned, Parallel
from atr_scale.run_files import PREEMPTED, read_json_lines
from atr_scale.training.attempts import Attempt, attempted
from atr_scale.training.preemption import PreemptionFlag, preemptible
from atr_scale.training.record import Progress


@pytest.fixture(autouse=True)
def no_timers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that leaves before training is ended by a timer, which must not be this one."""
    monkeypatch.setattr(threading, "Timer", lambda *_: threading.Thread(target=lambda: None))


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_sets_the_flag_and_another_changes_nothing(number: int) -> None:
    before = [signal.getsignal(each) for each in STOP_SIGNALS]
    with PreemptionFlag() as flag:
        flag.begin()
        assert not flag.is_up()
        assert not flag.agree()
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        assert flag.received == signal.Signals(number).name
        assert flag.is_up()
        assert flag.agree()
    assert [signal.getsignal(each) for each in STOP_SIGNALS] == before


def test_before_training_the_process_leaves_at_once(tmp_path: Path) -> None:
    with (
        pytest.raises(SystemExit) as left,
        attempted(tmp_path, World()) as attempt,
        preemptible(tmp_path, World(), attempt),
    ):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal was not seen")
    assert left.value.code == 0
    assert (tmp_path / PREEMPTED).read_text() == "SIGTERM\n"
    end = read_json_lines(attempt.run / "attempts.jsonl")[-1]
    assert (end["event"], end["reason"], end["rc"]) == ("end", "preempted", 0)


def test_a_rank_sees_that_another_one_was_told() -> None:
    store = HashStore()
    told, other = (PreemptionFlag(World(rank, 2, store=store)) for rank in range(2))
    assert not other.is_up()
    told.received = "SIGUSR1"
    assert told.is_up()
    assert other.is_up()


def test_an_attempt_that_leaves_before_its_last_evaluation_is_not_done(tmp_path: Path) -> None:
    for unevaluated, reason in ((True, "preempted"), (False, "done")):
        attempt = Attempt(tmp_path, World())
        attempt.follow(Progress(step=6), 6)
        (tmp_path / PREEMPTED).write_text("SIGTERM") if unevaluated else (tmp_path / PREEMPTED).unlink()
        attempt.finish()
        assert read_json_lines(tmp_path / "attempts.jsonl")[-1]["reason"] == reason


class Told(World):
    """Two processes of which the other one is asked to stop, or not."""

    def max_int(self, value: int) -> int:
        return max(value, int(self.store))


@pytest.mark.parametrize("lockstep", [True, False])
def test_the_items_of_an_evaluation_end_early(lockstep: bool) -> None:
    """In the process that was asked, and in lockstep in the others too; all of them raise the same at the end."""
    for own, other in ((False, False), (True, False), (False, True)):
        seen: list[int] = []
        stops = lambda own=own, seen=seen: own and len(seen) == 2  # noqa: E731
        parallel = Parallel(Told(0, 2, store=other), torch.device("cpu"), lockstep=lockstep, stops=stops)

        def read(parallel: Parallel = parallel, seen: list[int] = seen) -> None:
            for item in parallel.each(range(5)):
                seen.append(item)

        if own or other:
            with pytest.raises(Abandoned):
                read()
        else:
            read()
        assert seen == list(range(2 if own else 0 if other and lockstep else 5))
