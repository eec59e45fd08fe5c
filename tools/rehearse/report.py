"""The report of a rehearsal: what held, what each fault cost, and a picture of the run over time."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from atr_scale.plots import BLUE, GREY, ORANGE, RED
from tools.rehearse.checks import Check, Cost
from tools.rehearse.schedule import KINDS
from tools.rehearse.watch import Record, declared

PICTURE = Path("figures") / "rehearsal.png"


def write_report(page: Path, record: Record, checks: Sequence[Check], costs: Sequence[Cost], said: str) -> None:
    """Write the page, and the picture into a folder beside it. said: what was run, in a sentence."""
    picture = page.parent / PICTURE
    picture.parent.mkdir(parents=True, exist_ok=True)
    timeline(record, costs).savefig(picture)
    page.write_text("\n".join(_lines(record, checks, costs, said)) + "\n", encoding="utf-8")


def _lines(record: Record, checks: Sequence[Check], costs: Sequence[Cost], said: str) -> list[str]:
    took = record.sights[-1].time - record.sights[0].time
    lines = ["# A rehearsal of faults", "", said, ""]
    lines += ["| what must hold | | found |", "|-|-|-|"]
    lines += [f"| {check.what} | {'yes' if check.holds else '**no**'} | {check.found} |" for check in checks]
    lines += ["", f"![Steps and faults over time]({PICTURE})", ""]
    lines += ["Blue: the step that the ranks are in. Grey: the run or SLURM says that it does not train at the moment."]
    lines += ["Below, the faults: orange as long as they last, light blue as long as there was no new step.", ""]
    lines += ["## What each fault has cost", ""]
    lines += ["`no new step`: the longest time, up to the next fault, in which no step was begun that had not been"]
    lines += ["begun before. `+`: it went on when the next fault came, see there. `starts`: of the job.", ""]
    lines += ["| | at | fault | hit | lasted | no new step | steps repeated | starts |", "|-|-|-|-|-|-|-|-|"]
    begin = record.sights[0].time
    for hit, cost in zip(record.hits, costs, strict=True):
        lasted = f"{hit.fault.lasts_s:.0f} s" if hit.undo else ""
        seconds = f"{cost.seconds:.0f} s{' +' if cost.open else ''}"
        at = f"{_minutes(hit.began - begin)}, step {hit.step}"
        cells = hit.fault.number, at, hit.fault.kind.what, hit.place, lasted, seconds, cost.repeated, cost.starts
        lines += [f"| {' | '.join(map(str, cells))} |"]
    total = sum(cost.seconds for cost in costs), sum(cost.repeated for cost in costs), sum(c.starts for c in costs)
    lines += ["", f"In all: {_minutes(took)} minutes, of which {_minutes(total[0])} without a new step after faults; "
              f"{total[1]} steps repeated; {total[2]} starts after the first."]  # fmt: skip
    return lines


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def machine() -> str:
    """The machine in a few words."""
    return f"{os.cpu_count()} CPU cores, Python {platform.python_version()}"


def timeline(record: Record, costs: Sequence[Cost]) -> Figure:
    """Above: the step over time, and declared waits. Below: a row for each kind of fault."""
    begin = record.sights[0].time
    names = [name for name in KINDS if any(hit.fault.kind.name == name for hit in record.hits)]
    figure = Figure(figsize=(9.6, 3.2 + 0.24 * len(names)), dpi=130, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3.0, 0.3 + 0.24 * len(names)])
    times = [time - begin for time, _, _ in record.begun]
    above.plot(times, [step for _, step, _ in record.begun], ".", markersize=1.5, color=BLUE)
    for before, sight in zip(record.sights, record.sights[1:], strict=False):
        if declared(sight):
            above.axvspan(before.time - begin, sight.time - begin, color=GREY, alpha=0.18, linewidth=0)
    fewer = [(time - begin, step) for time, step, ranks in record.begun if ranks != record.begun[0][2]]
    if fewer:
        above.plot(*zip(*fewer, strict=True), ".", markersize=2.5, color=RED, label="other number of ranks")
        above.legend(frameon=False, fontsize=8, loc="upper left")
    above.set_ylabel("optimizer step")
    for hit, cost in zip(record.hits, costs, strict=True):
        row, start = names.index(hit.fault.kind.name), hit.began - begin
        below.barh(row, cost.seconds, left=start, height=0.5, color=BLUE, alpha=0.4)
        below.barh(row, max(hit.fault.lasts_s, 0.0), left=start, height=0.5, color=ORANGE, alpha=0.8)
        below.plot([start], [row], "|", color="black", markersize=8)
        above.axvline(start, color=ORANGE, linewidth=0.6, alpha=0.6)
    below.set_yticks(range(len(names)), names, fontsize=8)
    below.set_ylim(len(names) - 0.4, -0.6)
    below.set_xlabel("seconds since the submission")
    for axes in (above, below):
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    return figure
