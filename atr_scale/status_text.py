"""The status of runs as text: a page for one run, a table for several."""

from __future__ import annotations

import time
from collections.abc import Sequence

from atr_scale.errors import one_line
from atr_scale.status import AttemptFacts, RunStatus

MOST_ATTEMPTS, MOST_RANKS = 8, 8  # that the page names
HEADS = "run", "state", "step", "of", "samples/s", "ETA", "checkpoint", "attempts", "lost", "dropped", "why"


def duration(seconds: float) -> str:
    """For people: "42 s", "7 min", "3 h 20 min", "2 d 4 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"


def status_page(status: RunStatus) -> str:
    """All facts about one run, a line each."""
    of = f" of {status.steps:,} ({100 * status.step / status.steps:.0f} %)" if status.steps else ""
    lines = [f"{status.run}: {status.state}, step {status.step:,}{of}"]
    rows = [
        ("why", status.reason or ""),
        ("rate", _rate(status)),
        ("checkpoint", _checkpoint(status)),
        ("attempts", _attempts(status)),
        *(("", _attempt(attempt)) for attempt in status.attempts[-MOST_ATTEMPTS:]),
        ("dropped", _counts(status.dropped, "samples, named in dropped.jsonl")),
        ("skipped", _counts(_skipped(status), "steps")),
        ("retries", f"{_many(status.retries, 'request')} to the store in this attempt" if status.retries else ""),
        ("ranks", _ranks(status)),
    ]
    return "\n".join(lines + [f"  {head:<12}{row}" for head, row in rows if row])


def status_table(runs: Sequence[RunStatus]) -> str:
    """One line for each run."""
    cells = [HEADS, *(_cells(run) for run in runs)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(HEADS))]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)


def _cells(run: RunStatus) -> tuple[str, ...]:
    return (
        str(run.run),
        run.state,
        f"{run.step:,}",
        f"{run.steps:,}" if run.steps else "?",
        f"{run.samples_per_s:.4g}" if run.samples_per_s is not None and run.running else "",
        duration(run.eta_s) if run.eta_s is not None else "",
        "none" if run.checkpoint_step is None else f"{run.checkpoint_step:,}, {_ago(run.checkpoint_age_s)}",
        str(len(run.attempts)) if run.attempts else "?",
        duration(run.lost_s),
        f"{sum(run.dropped.values()):,}",
        one_line(run.reason or "", 80),
    )


def _many(count: int | None, of_what: str) -> str:
    return f"{'?' if count is None else f'{count:,}'} {of_what}{'' if count == 1 else 's'}"


def _ago(seconds: float | None) -> str:
    return "of unknown age" if seconds is None else f"{duration(seconds)} ago"


def _clock(seconds: float) -> str:
    try:
        return time.strftime("%b %d %H:%M", time.localtime(seconds))
    except (OverflowError, ValueError, OSError):  # of a damaged file
        return "?"


def _rate(status: RunStatus) -> str:
    parts = []
    if status.samples_per_s is not None:
        parts.append(f"{status.samples_per_s:.4g} samples/s")
    if status.step_seconds:
        parts.append(f"{status.step_seconds:.3g} s a step")
    if status.eta_s is not None:
        parts.append(f"ETA {duration(status.eta_s)} ({_clock(time.time() + status.eta_s)})")
    return ", ".join(parts) if status.running else ", ".join([*parts, "when it last trained"]) if parts else ""


def _checkpoint(status: RunStatus) -> str:
    failed = f"; failed since: {_many(status.failed_saves, 'save')}" if status.failed_saves else ""
    if status.checkpoint_step is None:
        return f"none{' yet' if status.running else ''}{failed}"
    found = f"step {status.checkpoint_step:,}, {_ago(status.checkpoint_age_s)}{failed}"
    if status.best_step is not None:
        found += f"; best: step {status.best_step:,}"
        if status.best_value is not None:  # without a metric: the default of evaluation.select
            found += f" ({status.best_metric or 'validation score'} {status.best_value:.4g})"
    return found


def _attempts(status: RunStatus) -> str:
    if not status.attempts:
        return ""
    lost = f"; lost {duration(status.lost_s)}" if status.lost_s >= 1 else ""
    lost += f", {_many(status.repeated_steps, 'step')} repeated" if status.repeated_steps else ""
    left_out = len(status.attempts) - MOST_ATTEMPTS
    return f"{len(status.attempts)}{lost}" + (f"; the last {MOST_ATTEMPTS}:" if left_out > 0 else "")


def _attempt(attempt: AttemptFacts) -> str:
    where = f"{_many(attempt.world_size, 'rank')} on {attempt.host or '?'}"
    where += f", job {attempt.job}" if attempt.job else ""
    steps = "no step" if attempt.first_step is None else f"steps {attempt.first_step:,} to "
    if attempt.first_step is not None:
        steps += "?" if attempt.last_step is None else f"{attempt.last_step:,}"
    took = "" if attempt.ended is None else f" in {duration(max(0.0, attempt.ended - attempt.started))}"
    end = one_line(attempt.reason, 100) if attempt.reason else ("" if attempt.ended is None else "killed")
    rc = f" (exit code {attempt.rc})" if attempt.rc else ""
    return f"{attempt.attempt}: {_clock(attempt.started)}, {where}, {steps}{took}" + (f": {end}{rc}" if end else "")


def _counts(counts: dict[str, int], of_what: str) -> str:
    parts = ", ".join(f"{count:,} {name}" for name, count in sorted(counts.items(), key=lambda item: -item[1]) if count)
    return f"{parts} ({of_what})" if parts else ""


def _skipped(status: RunStatus) -> dict[str, int]:
    return {"non-finite": status.skipped_steps, "fp16 overflow": status.fp16_overflows}


def _ranks(status: RunStatus) -> str:
    if not status.running or not status.world_size:
        return ""
    silent = status.silent_ranks
    hosts = {sign.rank: f" on {sign.host}" for sign in status.ranks}
    found = f"{status.world_size - len(silent)} of {status.world_size} give signs of life"
    if silent:
        names = ", ".join(f"{rank}{hosts.get(rank, '')}" for rank in silent[:MOST_RANKS])
        found += f", not {names}" + (f" and {len(silent) - MOST_RANKS} more" if len(silent) > MOST_RANKS else "")
    if slowest := status.slowest:
        found += f"; last in line: rank {slowest.rank} on {slowest.host}, step {slowest.step:,}, "
        found += f"progress {_ago(slowest.idle_s)}"
    return found
