"""Budgets of the counts: what an update of each case may take, and the table of them in docs/performance.md."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
BUDGETS = FOLDER / "budgets.json"
BEFORE = FOLDER / "before.json"  # the real sizes at version 0.3, for the table
PAGE = FOLDER.parents[1] / "docs" / "performance.md"
BEGIN, END = "<!-- counts: written by tools.gpu_counts --write-budgets -->", "<!-- counts: end -->"
WRITE = "python -m tools.gpu_counts --write-budgets"
HEADROOM = (
    0.05  # of launches, bytes and FLOPs, which differ a little between versions of torch; waits of the host have none
)
VOLUMES = ("launches", "bytes")
WAITS = ("host_syncs", "deepspeed_syncs", "blocking_copies", "device_mismatches")
Results = dict[str, dict[str, Any]]


def read(path: Path = BUDGETS) -> Results:
    found: Results = json.loads(path.read_text(encoding="utf-8"))
    return found


def write(found: Results, path: Path = BUDGETS) -> None:
    """The counts of all cases, one a line, as their budgets."""
    kept = (*VOLUMES, *WAITS, "flops")
    lines = [f"{json.dumps(name)}: {json.dumps({key: case[key] for key in kept})}" for name, case in found.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def complaints(found: Results, budgets: Results) -> list[str]:
    """What is above its budget, with the places, and what is so far below that the budget must be lowered."""
    lines = []
    for name, case in found.items():
        if name not in budgets:
            lines.append(f"{name} has no budget: {WRITE}")
            continue
        counts, limits = _numbers(case), _numbers(budgets[name])
        for key in counts | limits:
            counted, budget = counts.get(key, 0), limits.get(key, 0)
            headroom = 0 if key in WAITS else HEADROOM * budget
            if counted > budget + headroom:
                lines.append(f"{name}: {counted:,} {key} are more than the budget of {budget:,}{_places(case, key)}")
            elif counted < budget - headroom:
                lines.append(f"{name}: {counted:,} {key}: lower the budget of {budget:,} with {WRITE}")
    return lines


def _numbers(case: dict[str, Any]) -> dict[str, int]:
    """All that has a budget. FLOPs are by dtype: fp32 products that turn into TF32 take no more launches or bytes."""
    flops = {f"{dtype} FLOPs": number for dtype, number in case["flops"].items()}
    return {**{key: case[key] for key in (*VOLUMES, *WAITS)}, **flops}


def _places(case: dict[str, Any], key: str) -> str:
    if key not in WAITS:
        return ""
    return "".join(f"\n    {p['times']} x {p['kind']} at {p['place']} ({p['phase']})" for p in case["places"])


def write_table(budgets: Results, before: Results, page: Path = PAGE) -> None:
    """Replace what lies between the markers of the page by the real sizes, before and now."""
    lines = [
        "| forward and backward | launches | now | GB | now | TFLOP | now | host syncs | now | DeepSpeed's | now |",
        "|-|-|-|-|-|-|-|-|-|-|-|",
    ]
    for name, old in before.items():
        new = budgets[name]
        pairs = (
            *(f"{case['launches']:,}" for case in (old, new)),
            *(f"{case['bytes'] / 1e9:,.1f}" for case in (old, new)),
            *(_flops(case) for case in (old, new)),
            *(f"{case['host_syncs']}" for case in (old, new)),
            *(f"{case['deepspeed_syncs']}" for case in (old, new)),
        )
        lines.append(f"| {name} | {' | '.join(pairs)} |")
    text = page.read_text(encoding="utf-8")
    assert BEGIN in text and END in text, f"{page} has lost its markers"
    block = "\n".join([BEGIN, "", *lines, "", END])
    page.write_text(re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: block, text, flags=re.DOTALL), "utf-8")


def _flops(case: dict[str, Any]) -> str:
    """TFLOP by dtype, without those that round to nothing."""
    named = [f"{number / 1e12:.3g} {dtype}" for dtype, number in sorted(case["flops"].items()) if number >= 5e8]
    return ", ".join(named) or "0"
