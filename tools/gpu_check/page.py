"""The report of a run: gpu_check.json, and the page gpu_check.md with its figure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from tools.bench.table import machine
from tools.gpu_check.rows import Row, read_lines

EXACT_ENOUGH = 1e-4  # largest relative gradient error of a default for train.head_products
PRODUCTS = ("ieee", "tf32", "bf16x3")
HEAD = (
    "| | ms | reference, ms | TFLOP/s | GB/s | share | launches | syncs | MiB | error | bound | |",
    "|-|-|-|-|-|-|-|-|-|-|-|-|",
)


def write_report(lines: Path, out: Path, quick: bool) -> None:
    """From the rows of the file `lines`, all that were found so far. quick: of small sizes."""
    rows = read_lines(lines)
    report = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "quick": quick,
        "rows": [row.as_json() for row in rows],
    }
    (out / "gpu_check.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    picture = _draw(rows, out / "gpu_check.png")
    (out / "gpu_check.md").write_text("\n".join(_page(rows, picture)) + "\n", encoding="utf-8")


def _page(rows: Sequence[Row], picture: str) -> Iterable[str]:
    failed, skipped = ([r for r in rows if r.passed is state] for state in (False, None))
    yield from ("# GPU check", "", machine(), "")
    yield f"{len(rows) - len(failed) - len(skipped)} rows passed, {len(failed)} failed, {len(skipped)} were skipped."
    if failed:
        yield from ("", "## Failed", "")
        for row in failed:
            bound = "" if row.bound is None else f", more than {row.bound:g}"
            yield f"- {row.part}: {row.name}: {row.error}{bound} {row.note}".rstrip()
    yield from ("", "## train.head_products", "", _default(rows))
    yield from ("", picture)
    for part in dict.fromkeys(row.part for row in rows):
        yield from ("", f"## {part}", "", *HEAD)
        yield from (_line(row) for row in rows if row.part == part)


def _line(row: Row) -> str:
    reference = "; ".join(f"{name} {ms:.4g}" for name, ms in row.reference.items())
    numbers = (row.tflops, row.gb_per_s, row.share, row.launches, row.syncs, row.peak_mib, row.error, row.bound)
    state = f"skipped: {row.skipped}" if row.skipped is not None else "passed" if row.passed else "FAILED"
    cells = (row.name, _text(row.ms), reference, *map(_text, numbers), f"{state} {row.note}".strip())
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _text(value: float | str | None) -> str:
    return "" if value is None else value if isinstance(value, str) else f"{value:.4g}"


def by_products(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """Rows whose names end with a kind of product: name without it -> kind -> row."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        name, _, kind = row.name.rpartition(", ")
        if kind in PRODUCTS and row.passed is not None:
            found.setdefault(f"{row.part}: {name}", {})[kind] = row
    return found


def _default(rows: Sequence[Row]) -> str:
    """One sentence: time and error of each kind, and the fastest one whose gradients are exact enough."""
    cases = by_products(rows).values()
    timed = [case for case in cases if all(kind in case and case[kind].ms is not None for kind in PRODUCTS)]
    errors = {
        kind: [case[kind].error for case in cases if kind in case and isinstance(case[kind].error, float)]
        for kind in PRODUCTS
    }
    if not timed or not all(errors.values()):
        return "Not measured here: a kind of product needs times and errors of losses and heads on a GPU."
    times = {kind: sum(case[kind].ms or 0 for case in timed) for kind in PRODUCTS}
    worst = {kind: max(float(error or 0) for error in errors[kind]) for kind in PRODUCTS}
    fit = [kind for kind in PRODUCTS if worst[kind] <= EXACT_ENOUGH] or ["ieee"]
    best = min(fit, key=times.__getitem__)
    told = "; ".join(f"{kind} {times[kind]:.4g} ms, error {worst[kind]:.1e}" for kind in PRODUCTS)
    return f"{told}. The fastest one with an error of at most {EXACT_ENOUGH:g} is **{best}**."


def _draw(rows: Sequence[Row], path: Path) -> str:
    """Each timed row with a reference: its time over that of each reference. Returns what the page says of it."""
    try:
        from matplotlib.figure import Figure

        from atr_scale.plots import BLUE, GREY
    except ModuleNotFoundError as error:
        return f"No figure: it needs the package {error.name}."
    bars = [
        (f"{row.name} / {name}", row.ms / ms)
        for row in rows
        for name, ms in row.reference.items()
        if row.ms and ms and row.passed
    ]
    if not bars:
        return "No figure: no row has a time and a reference."
    figure = Figure(figsize=(9.6, 0.24 * len(bars) + 1.2), dpi=110, layout="constrained")
    ax = figure.subplots()
    places = range(len(bars))
    ax.barh(places, [ratio for _, ratio in bars], color=BLUE, height=0.6)
    ax.axvline(1, color=GREY, linewidth=0.8, linestyle=":")
    ax.set_yticks(places, [name for name, _ in bars], fontsize=7)
    ax.set_ylim(len(bars) - 0.4, -0.6)
    ax.set_xscale("log")
    ax.set_xlabel("time / time of the reference")
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    figure.savefig(path)
    return f"![Times over those of their references]({path.name})"
