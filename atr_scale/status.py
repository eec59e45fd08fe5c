"""How a run goes, from the files of its folder alone: while it runs or after its end, on any machine that sees them.

Every file may be missing or damaged: what it would have said is then unknown.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from atr_scale.errors import UserError
from atr_scale.rank_signs import (
    QUIET_S,
    RankSign,
    cause_of,
    counts_in,
    float_in,
    int_in,
    name_ranks,
    process_lives,
    read_signs,
    text_in,
)
from atr_scale.run_checkpoints import read_score
from atr_scale.run_files import (
    ATTEMPTS,
    METRICS,
    OF_A_RUN,
    PREEMPTED,
    TAIL,
    last_logged_step,
    read_json_lines,
    read_json_object,
)

JSON_SCHEMA = 1
STEPS_OF_A_PACE = 5  # of an attempt, from which on its pace is meaningful
RUNNING = "starting", "training", "waiting", "evaluating", "saving", "hung"


@dataclass(frozen=True)
class AttemptFacts:
    """A start of training and its end. Times are seconds since the epoch, None is unknown.

    trained_from: when the first step began. first_step, last_step: between which it trained. rc: exit code.
    repeated_steps: that the attempt before had trained already. lost_s: seconds for these, for starting again, and
    since the end of the attempt before.
    """

    attempt: int
    started: float
    trained_from: float | None
    ended: float | None
    first_step: int | None
    last_step: int | None
    world_size: int | None
    host: str | None
    pid: int | None
    job: str | None
    reason: str | None
    rc: int | None
    repeated_steps: int = 0
    lost_s: float = 0.0

    @property
    def step_seconds(self) -> float | None:
        """Seconds of a step, evaluations and saves included; None if it has made none."""
        if self.ended is None or self.trained_from is None or self.first_step is None or self.last_step is None:
            return None
        steps = self.last_step - self.first_step
        return max(0.0, self.ended - self.trained_from) / steps if steps > 0 else None


@dataclass(frozen=True)
class RunStatus:
    """What `atr-scale status` tells of a run; docs/operations.md explains it. None is unknown."""

    run: Path | str  # an address on S3 is a str
    state: str
    reason: str | None
    step: int
    steps: int | None
    samples_seen: int | None
    samples_per_s: float | None
    step_seconds: float | None
    eta_s: float | None
    checkpoint_step: int | None
    checkpoint_age_s: float | None
    best_step: int | None
    best_metric: str | None
    best_value: float | None
    attempts: list[AttemptFacts]
    dropped: dict[str, int]
    skipped_steps: int
    fp16_overflows: int
    retries: int
    failed_saves: int
    world_size: int | None
    ranks: list[RankSign]
    silent_ranks: list[int]

    @property
    def running(self) -> bool:
        return self.state in RUNNING

    @property
    def lost_s(self) -> float:
        return sum(attempt.lost_s for attempt in self.attempts)

    @property
    def repeated_steps(self) -> int:
        return sum(attempt.repeated_steps for attempt in self.attempts)

    @property
    def slowest(self) -> RankSign | None:
        """The rank that is furthest behind the others, None if there is only one."""
        ranks = [rank for rank in self.ranks if rank.state != "ended"]
        return min(ranks, key=lambda rank: (rank.step, -rank.idle_s)) if len(ranks) > 1 else None

    def as_json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        skipped = ("limit_s", "dropped", "skipped_steps", "fp16_overflows", "steps", "samples_seen", "written")
        ranks = [{key: value for key, value in asdict(rank).items() if key not in skipped} for rank in self.ranks]
        values = {**asdict(self), "run": str(self.run), "ranks": ranks}
        slowest = self.slowest.rank if self.slowest else None
        totals = {"lost_s": self.lost_s, "repeated_steps": self.repeated_steps, "slowest_rank": slowest}
        return {"schema": JSON_SCHEMA, **values, **totals}


def is_run(folder: Path) -> bool:
    """Whether training has written to this folder."""
    return any((folder / name).exists() for name in OF_A_RUN)


def read_status(run: Path) -> RunStatus:
    """The status of the run in a folder. Raises UserError if it is none, or cannot be read."""
    try:
        if not run.is_dir():
            raise UserError(f"no run at {run}: there is no such folder; give the run.dir of a training")
        if not is_run(run):
            raise UserError(f"no run at {run}: the folder holds none of {', '.join(OF_A_RUN)}; give a run.dir")
        for name in OF_A_RUN:
            if (run / name).exists() and not os.access(run / name, os.R_OK):  # not the same as a missing file
                raise UserError(f"{run / name} cannot be read (permission denied): ask its owner for access")
        checkpoint = _newest_checkpoint(run)
        best = run / "best"
        best_step = _step_of(best.resolve()) if best.exists() else None
        score = read_score(best) if best.exists() else None
    except OSError as error:
        raise UserError(f"{run} cannot be read ({error.strerror}): ask its owner for access") from None
    now = time.time()
    lines = read_json_lines(run / ATTEMPTS)
    signs = _latest_attempt(read_signs(run), lines)
    attempts = _attempts(lines, signs)
    last, main = attempts[-1] if attempts else None, signs[0] if signs else None
    logged = _last_of_training(run)
    state, reason = _judge(run, last, signs, now)
    step = _step(run, last, signs, checkpoint, running=state in RUNNING)
    steps = (main and main.steps) or _in_lines(lines, "steps") or _steps_in_results(run)
    if state == "unknown" and steps and step >= steps:
        state, reason = "done", None
    saved = (checkpoint and read_json_object(checkpoint / "state.json")) or {}
    world_size = (last and last.world_size) or len(signs) or None
    answering = {sign.rank for sign in signs if sign.alive and sign.quiet_s <= QUIET_S}
    moving = state in RUNNING and state != "hung"
    return RunStatus(
        run=run,
        state=state,
        reason=reason,
        step=step,
        steps=steps,
        samples_seen=main.samples_seen if main and main.samples_seen else int_in(saved, "samples_seen"),
        samples_per_s=float_in(logged, "samples_per_s"),
        step_seconds=main.step_seconds if main else None,
        eta_s=_eta(main, last, steps, now) if moving else None,
        checkpoint_step=_step_of(checkpoint) if checkpoint else None,
        checkpoint_age_s=_age(checkpoint, now) if checkpoint else None,
        best_step=best_step,
        # Of version 0.4 and older the state of a checkpoint alone tells the best value.
        best_metric=score.metric if score else text_in(saved, "best_metric"),
        best_value=score.value if score and math.isfinite(score.value) else float_in(saved, "best"),
        attempts=attempts,
        dropped=_dropped(main, logged),
        skipped_steps=_count("skipped_steps", main, logged),
        fp16_overflows=_count("fp16_overflows", main, logged),
        retries=sum(sign.retries for sign in signs),
        failed_saves=max((sign.failed_saves for sign in signs), default=0),
        world_size=world_size,
        ranks=signs,
        silent_ranks=[rank for rank in range(world_size or 0) if rank not in answering] if state in RUNNING else [],
    )


def _latest_attempt(signs: list[RankSign], lines: Sequence[Mapping[str, Any]]) -> list[RankSign]:
    """The signs of the latest attempt: other ranks may not have written since the one before."""
    numbers = [*(int_in(line, "attempt") or 0 for line in lines), *(sign.attempt or 0 for sign in signs)]
    return [sign for sign in signs if (sign.attempt or 0) == max(numbers, default=0)]


def _judge(run: Path, last: AttemptFacts | None, signs: list[RankSign], now: float) -> tuple[str, str | None]:
    """(state, reason) of a run by its last attempt and that one's ranks."""
    if last and last.reason:
        if last.reason == "preempted":
            return "preempted", _told(run, "it has saved" if last.first_step is not None else "it had not yet trained")
        return ("done", None) if last.reason == "done" else ("failed", last.reason)
    living = [sign for sign in signs if sign.alive and sign.state != "ended"]
    if not living:
        if failed := [sign for sign in signs if sign.reason]:
            return "failed", f"rank {failed[0].rank} on {failed[0].host}: {failed[0].reason}"
        if signs or last:
            if not signs and last and process_lives(last.host or "", last.pid, last.started, now - last.started):
                return "starting", None
            return "killed", "its processes are gone and left no word: killed, out of memory, or the machine went down"
        return (
            ("preempted", _told(run, "it has saved"))
            if (run / PREEMPTED).exists()
            else ("unknown", "it has left no attempts.jsonl")
        )
    gone = [sign for sign in signs if not sign.alive]
    if gone:
        return "hung", f"{name_ranks(gone)} left no word, the others wait"
    stuck = [sign for sign in living if sign.hangs]
    if stuck:
        first = min(stuck, key=lambda sign: (sign.quiet_s <= QUIET_S, sign.step, -sign.idle_s))
        return "hung", f"{name_ranks([first])} at step {first.step}: no progress for {first.idle_s:.0f} s"
    waiting = next((sign for sign in living if sign.state == "waiting"), None)
    return ("waiting", waiting.wait) if waiting else (living[0].state, None)


def _told(run: Path, then: str) -> str:
    try:
        signal = (run / PREEMPTED).read_text(errors="replace", encoding="utf-8")[:100].strip()
    except OSError:
        signal = ""
    return f"told to stop ({signal or 'by a signal'}), and {then}"


def _attempts(lines: Sequence[Mapping[str, Any]], signs: Sequence[RankSign]) -> list[AttemptFacts]:
    """All attempts in order, with what each has cost; signs: of the last one's ranks."""
    found: list[AttemptFacts] = []
    for number in sorted({each for line in lines if (each := int_in(line, "attempt"))}):
        own = [line for line in lines if line.get("attempt") == number]
        by_event = {str(line.get("event")): line for line in own}
        start, training, end = (by_event.get(event, {}) for event in ("start", "training", "end"))
        times = [seconds for line in own if (seconds := float_in(line, "time")) is not None]
        if not times:
            continue
        first_step, last_step, ended = int_in(training, "step"), int_in(end, "step"), float_in(end, "time")
        ranks = [sign for sign in signs if sign.attempt == number]
        if ranks and not end:
            last_step = max(first_step or 0, *(sign.step for sign in ranks))
            if not any(sign.alive for sign in ranks):
                ended = max(sign.written for sign in ranks)
        found.append(
            AttemptFacts(
                attempt=number,
                started=float_in(start, "time") or times[0],
                trained_from=float_in(training, "time"),
                ended=ended,
                first_step=first_step,
                last_step=last_step,
                world_size=int_in(start, "world_size"),
                host=text_in(start, "host"),
                pid=int_in(start, "pid"),
                job=text_in(start, "job"),
                reason=cause_of(end, [sign for sign in ranks if not sign.alive]),
                rc=int_in(end, "rc"),
            )
        )
    return [_with_loss(each, found[place - 1] if place else None) for place, each in enumerate(found)]


def _with_loss(attempt: AttemptFacts, before: AttemptFacts | None) -> AttemptFacts:
    """The attempt with the steps that it repeats of the one before, and the time that the restart has cost."""
    if before is None:
        return attempt
    lost, repeated = (attempt.trained_from or attempt.started) - attempt.started, 0
    if before.ended is not None and before.reason != "done":  # a finished run that is prolonged has lost nothing
        lost += max(0.0, attempt.started - before.ended)
    if attempt.first_step is not None and before.last_step is not None:
        repeated = max(0, before.last_step - attempt.first_step)
        lost += repeated * (before.step_seconds or 0.0)
    return replace(attempt, repeated_steps=repeated, lost_s=lost)


def _step(
    run: Path, last: AttemptFacts | None, signs: Sequence[RankSign], checkpoint: Path | None, *, running: bool
) -> int:
    if running and signs and last and last.first_step is not None:
        return max(last.first_step, *(sign.step for sign in signs))  # an attempt before may have logged later ones
    if last and last.last_step is not None:
        return last.last_step
    return max(last_logged_step(run), _step_of(checkpoint) or 0 if checkpoint else 0, *(sign.step for sign in signs))


def _eta(main: RankSign | None, last: AttemptFacts | None, steps: int | None, now: float) -> float | None:
    """Seconds until the last step, at the pace of this attempt, evaluations and saves included."""
    if main is None or steps is None:
        return None
    pace = main.step_seconds
    if last and last.trained_from is not None and last.first_step is not None:
        done = main.step - last.first_step
        if done >= STEPS_OF_A_PACE:
            pace = max(0.0, now - main.quiet_s - last.trained_from) / done
    return None if pace is None else max(0, steps - main.step) * pace


def _newest_checkpoint(run: Path) -> Path | None:
    found = [path for path in run.glob("checkpoints/step-*") if _step_of(path) is not None]
    return max(found, key=lambda path: _step_of(path) or 0, default=None)


def _step_of(checkpoint: Path) -> int | None:
    match = re.fullmatch(r"step-(\d{1,15})", checkpoint.name)
    return int(match[1]) if match else None


def _age(checkpoint: Path, now: float) -> float | None:
    for path in (checkpoint / "manifest.json", checkpoint):
        try:
            return max(0.0, now - path.stat().st_mtime)
        except OSError:
            continue
    return None


def _last_of_training(run: Path) -> dict[str, Any]:
    lines = [line for line in read_json_lines(run / METRICS, TAIL) if line.get("kind") == "train"]
    return lines[-1] if lines else {}


def _in_lines(lines: Sequence[Mapping[str, Any]], key: str) -> int | None:
    return next((found for line in reversed(lines) if (found := int_in(line, key))), None)


def _steps_in_results(run: Path) -> int | None:
    """Of a run of a version before attempts.jsonl."""
    training = (read_json_object(run / "results.json") or {}).get("training")
    return int_in(training, "steps") if isinstance(training, dict) else None


def _dropped(main: RankSign | None, logged: Mapping[str, Any]) -> dict[str, int]:
    """By reason, over all attempts."""
    if main and main.dropped:
        return main.dropped
    return counts_in({key.partition("/")[2]: value for key, value in logged.items() if key.startswith("dropped/")})


def _count(key: str, main: RankSign | None, logged: Mapping[str, Any]) -> int:
    return (main and int(getattr(main, key) or 0)) or int(float_in(logged, key) or 0)
