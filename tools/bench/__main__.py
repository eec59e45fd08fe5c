"""All benchmarks, one after the other, and their figures in docs/performance.md.

    OMP_NUM_THREADS=1 python -m tools.bench [NAME ...] [--out FOLDER]

Leave the machine alone meanwhile (about 40 minutes on two cores). Rows are kept in FOLDER/NAME.json, so that one
benchmark can be run again by itself; the page is written from all that are there.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from atr_scale.plots import BLUE, GREY, ORANGE
from tools.bench.table import HEAD, Row

NAMES = ("losses", "scorers", "gradcache", "loader", "step", "evaluation", "scaling", "overlap", "search", "saving")
PAGE = Path(__file__).parents[2] / "docs" / "performance.md"
PICTURE = Path("figures") / "performance.png"
BEGIN, END = "<!-- figures: written by tools.bench -->", "<!-- figures: end -->"
SMALLEST = 0.005  # ratio that is drawn
Results = dict[str, dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; default: all")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--page-only", action="store_true", help="run nothing, write the page from the rows there are")
    given = parser.parse_args()
    if unknown := sorted(set(given.names) - set(NAMES)):
        parser.error(f"no benchmark called {', '.join(unknown)}: choose from {', '.join(NAMES)}")
    given.out.mkdir(parents=True, exist_ok=True)
    for name in () if given.page_only else given.names or NAMES:
        print(f"\n## {name}\n", flush=True)
        command = [sys.executable, "-m", f"tools.bench.{name}", "--json", str(given.out / f"{name}.json")]
        subprocess.run(command, check=True)
    results = {
        name: json.loads(path.read_text(encoding="utf-8"))
        for name in NAMES
        if (path := given.out / f"{name}.json").exists()
    }
    write_page(results, PAGE)


def write_page(results: Results, page: Path) -> None:
    """Replaces what lies between the markers of `page`, and the picture beside it."""
    picture = page.parent / PICTURE
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw(results).savefig(picture)
    lines = [BEGIN, "", f"![Ratios and targets]({PICTURE})"]
    for name, found in results.items():
        lines += ["", f"### {name}", "", f"`python -m tools.bench.{name}`; {found['machine']}", ""]
        lines += [*HEAD, *(Row.from_json(row).as_markdown() for row in found["rows"])]
    block = "\n".join([*lines, "", END])
    text = page.read_text(encoding="utf-8")
    assert BEGIN in text and END in text, f"{page} has lost its markers"
    page.write_text(re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: block, text, flags=re.DOTALL), "utf-8")


def draw(results: Results) -> Figure:
    """Every row that has a target: its ratio, and the target as a mark."""
    rows = [
        row for found in results.values() for row in found["rows"] if row["target"] is not None and row["ratio"] > 0
    ]
    figure = Figure(figsize=(9.6, 0.26 * len(rows) + 1.2), dpi=130, layout="constrained")
    ax = figure.subplots()
    places = range(len(rows))
    ax.barh(places, [row["ratio"] for row in rows], color=[BLUE if row["met"] else ORANGE for row in rows], height=0.6)
    ax.plot([row["target"] for row in rows], places, "|", color="black", markersize=11, markeredgewidth=1.6)
    ax.axvline(1, color=GREY, linewidth=0.8, linestyle=":")
    ax.set_yticks(places, [_label(row) for row in rows], fontsize=7)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_xscale("log")
    ax.set_xlim(left=SMALLEST)
    ax.set_xlabel("ours / other; | is the target, orange misses it")
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    return figure


def _label(row: dict[str, Any]) -> str:
    unit = f" [{row['unit']}]" if row["unit"] else ""
    return f"{row['name']}{unit} / {row['other_name']}"


if __name__ == "__main__":
    main()
