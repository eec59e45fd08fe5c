"""RUN/attempts.jsonl says how every start of training went."""

from __future__ import annotations

import copy
import json
import resource
from pathlib import Path

import pytest

from atr_scale.distributed.world import World
from atr_scale.errors import Failure, UserError
from atr_scale.run_files import ATTEMPTS, METRICS, append_json_lines, last_logged_step, rank_file, read_json_lines
from atr_scale.training.attempts import Attempt, attempted
from atr_scale.training.record import Progress


def ends(run: Path) -> list[tuple[int, str, int | None, int | None]]:
    lines = [line for line in read_json_lines(run / ATTEMPTS) if line["event"] == "end"]
    return [(line["attempt"], line["reason"], line["step"], line["rc"]) for line in lines]


def test_attempts_are_numbered_and_say_how_far_they_came(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with attempted(run, World()) as attempt:
        progress = Progress(step=0)
        attempt.follow(progress, 10)
        progress.step = 4
    with attempted(run, World()) as attempt:
        progress = Progress(step=4)
        attempt.follow(progress, 10)
        progress.step = 10
    assert ends(run) == [(1, "preempted", 4, 0), (2, "done", 10, 0)]


def test_the_next_attempt_says_how_far_a_killed_one_came(tmp_path: Path) -> None:
    Attempt(tmp_path, World()).follow(Progress(step=2), 10)
    append_json_lines(tmp_path / METRICS, [{"kind": "train", "step": 7}])
    Attempt(tmp_path, World())
    assert ends(tmp_path) == [(1, "killed", 7, None)]
    beat = {"rank": 0, "attempt": 2, "step": 9, "written": 1e9, "reason": "the disk melted"}
    rank_file(tmp_path, 0).parent.mkdir()
    rank_file(tmp_path, 0).write_text(json.dumps(beat))
    Attempt(tmp_path, World())
    assert ends(tmp_path)[1] == (2, "the disk melted", 9, None)


def test_the_next_attempt_names_the_rank_that_was_killed(tmp_path: Path) -> None:
    """Its peer knew only of a connection that was closed, and the ranks' files of that attempt are overwritten now."""
    with pytest.raises(RuntimeError), attempted(tmp_path, World()):
        raise RuntimeError("connection closed")
    rank_file(tmp_path, 0).parent.mkdir()
    for rank, state in enumerate(["ended", "training"]):
        beat = {"rank": rank, "host": "gpu01", "attempt": 1, "step": 9, "written": 1e9, "state": state}
        rank_file(tmp_path, rank).write_text(json.dumps(beat))
    Attempt(tmp_path, World())
    first, second = ends(tmp_path)
    assert first == (1, "RuntimeError: connection closed", None, 1)
    assert second[1].startswith("rank 1 on gpu01 left no word") and second[1].endswith(first[1])
    Attempt(tmp_path, World())
    assert [number for number, *_ in ends(tmp_path)] == [1, 1, 2]


@pytest.mark.parametrize(
    ("error", "reason", "rc"),
    [
        (UserError("the mistake"), "the mistake", 2),
        (Failure("the store could not be reached"), "the store could not be reached", 1),
        (RuntimeError("it broke\nin two lines"), "RuntimeError: it broke in two lines", 1),
        (KeyboardInterrupt(), "interrupted from the keyboard", 130),
        (ValueError("secret_key=abcdefghijkl"), "ValueError: secret_key=[redacted]", 1),
    ],
)
def test_an_error_is_the_reason_of_the_end(tmp_path: Path, error: BaseException, reason: str, rc: int) -> None:
    with pytest.raises(type(error)), attempted(tmp_path, World()):
        raise error
    assert ends(tmp_path) == [(1, reason, None, rc)]


def test_a_lost_connection_to_another_rank_is_one_line_and_not_the_cause(tmp_path: Path) -> None:
    said = "[/src/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.2]:51. This is typically"
    with pytest.raises(Failure, match="the connection to another rank failed"), attempted(tmp_path, World()):
        raise RuntimeError(f"{said} caused by a remote worker crashing.")
    (line,) = (line for line in read_json_lines(tmp_path / ATTEMPTS) if line["event"] == "end")
    assert "failed (Connection closed by peer [10.0.0.2]:51): its process" in line["reason"] and line["known"] is False


def test_the_rank_that_fails_first_says_why(tmp_path: Path) -> None:
    main = Attempt(tmp_path, World())
    other = copy.copy(main)
    other.world = World(rank=3, size=4)
    other.end("the cause", 1)
    main.end("connection closed by peer", 1)
    assert ends(tmp_path) == [(1, "the cause", None, 1)]


def test_a_line_that_a_full_disk_has_cut_damages_no_other(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    path.write_text('{"kind": "train", "step": 1}\n{"kind": "train", "st')
    append_json_lines(path, [{"step": 2}, {"step": 3, "key": "caf\u00e9"}])
    assert read_json_lines(path) == [{"kind": "train", "step": 1}, {"step": 2}, {"step": 3, "key": "caf\u00e9"}]
    assert last_logged_step(tmp_path) == 3


def test_a_line_of_which_only_a_part_fits_is_an_error(tmp_path: Path) -> None:
    """So its writer knows that it is not on the disk, and adds it again."""
    path = tmp_path / METRICS
    append_json_lines(path, [{"step": 1}])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            append_json_lines(path, [{"step": 2}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    append_json_lines(path, [{"step": 2}])
    assert read_json_lines(path) == [{"step": 1}, {"step": 2}]


def test_a_folder_that_cannot_be_written_to_ends_no_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with attempted(tmp_path / "file", World()) as attempt:
        attempt.follow(Progress(), 5)
    assert attempt.number == 1
