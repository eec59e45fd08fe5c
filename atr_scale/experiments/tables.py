"""A comparison as Markdown, CSV, LaTeX and a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from atr_scale import plots
from atr_scale.data.storage import make_folder
from atr_scale.evaluation.example_tables import table_cell
from atr_scale.experiments.compare import ALL, DIRECTIONS, ComparedRuns, Measured
from atr_scale.experiments.evaluated import Experiment

TITLES = {"t2a": "text → audio", "a2t": "audio → text"}
IN_PAPERS = ("R@1", "R@5", "R@10", "mAP@10")  # columns of the LaTeX table
PICTURED = ("t2a/mAP@10", "a2t/mAP@10")
BY_BIN = ("R@1", "mAP@10")
LATEX = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
}
COLUMNS = ("experiment", "runs", "by", "bin", "queries", "metric", "mean", "deviation", "difference", "low", "high")


def write_comparison(comparison: ComparedRuns, folder: Path) -> list[Path]:
    """Write compare.md, compare.csv, compare.tex and compare.png into the folder; returns their paths."""
    make_folder(str(folder))
    picture = folder / "compare.png"
    plot(comparison).savefig(picture)
    texts = {
        "compare.md": f"{markdown(comparison)}\n![results and differences]({picture.name})\n",
        "compare.csv": as_csv(comparison),
        "compare.tex": latex(comparison),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [*(folder / name for name in texts), picture]


def markdown(comparison: ComparedRuns) -> str:
    """Configuration, results, differences to the first experiment, and results by bin."""
    experiments, first = comparison.experiments, comparison.experiments[0]
    counts = first.runs[0].entry["counts"]
    parts = [f"# {comparison.split}: {counts['clips']} clips, {counts['captions']} captions"]
    rows = [[one.name, _seeds([run.config["run"]["seed"] for run in one.runs]), _steps(one)] for one in experiments]
    values = list(comparison.differing.values())
    rows = [[*row, *(column[number] for column in values)] for number, row in enumerate(rows)]
    parts += ["## What differs", _table(["experiment", "seeds", "step", *comparison.differing], rows)]
    for direction in DIRECTIONS:
        keys = [key for key in comparison.metrics if key.startswith(direction)]
        columns = [key.removeprefix(f"{direction}/").replace("_", " ") for key in keys]
        cells = [comparison.measured[ALL][key] for key in keys]
        rows = [
            [one.name, *(_show(cell[number], key) for cell, key in zip(cells, keys, strict=True))]
            for number, one in enumerate(experiments)
        ]
        parts += [f"## Results, {TITLES[direction]}", _table(["experiment", *columns], rows, "%")]
    parts.append("Mean and, after ±, standard deviation over the seeds.")
    if len(experiments) > 1:
        parts += [f"## Differences to {table_cell(first.name)}, points", *_differences(comparison)]
    if comparison.by is not None:
        parts += [f"## By {table_cell(comparison.by)}", *_by_bin(comparison, comparison.by)]
    return "\n\n".join(parts) + "\n"


def _differences(comparison: ComparedRuns) -> Iterator[str]:
    experiments = comparison.experiments
    for direction in DIRECTIONS:
        keys = [key for key in comparison.metrics if key.startswith(direction) and not key.endswith("median_rank")]
        rows = [
            [one.name, *(_show_difference(comparison.measured[ALL][key][number]) for key in keys)]
            for number, one in list(enumerate(experiments))[1:]
        ]
        yield _table([TITLES[direction], *(key.removeprefix(f"{direction}/") for key in keys)], rows)
    yield (
        "In brackets: 95 % intervals of a paired bootstrap over clips; bold if the interval leaves out 0. "
        "The intervals hold for these trained models; the standard deviation above says how much training varies."
    )


def _by_bin(comparison: ComparedRuns, by: str) -> Iterator[str]:
    bins = [name for name in comparison.measured if name != ALL]
    for direction in DIRECTIONS:
        filled = [name for name in bins if comparison.queries[name][direction]]
        for metric in BY_BIN:
            key = f"{direction}/{metric}"
            rows = [
                [name, f"{comparison.queries[name][direction]}"]
                + [_show(cell, key) for cell in comparison.measured[name][key]]
                for name in filled
            ]
            names = [one.name for one in comparison.experiments]
            yield _table([f"{key} by {by}", "queries", *names], rows, "%")


def as_csv(comparison: ComparedRuns) -> str:
    """A row for each experiment, metric and bin; fractions, not percent."""
    file = io.StringIO()
    table = csv.writer(file, lineterminator="\n")
    table.writerow(COLUMNS)
    for name, measured in comparison.measured.items():
        for key, cells in measured.items():
            for one, cell in zip(comparison.experiments, cells, strict=True):
                numbers = (cell.mean, cell.deviation, cell.difference, cell.low, cell.high)
                shown = ["" if number is None else f"{number:.6g}" for number in numbers]
                queries = comparison.queries[name][key.partition("/")[0]]
                if queries == 0:
                    continue
                table.writerow([one.name, len(one.runs), comparison.by or "", name, queries, key, *shown])
    return file.getvalue()


def latex(comparison: ComparedRuns) -> str:
    """A tabular for booktabs, in percent: mean and deviation over the seeds, the best of a column bold."""
    columns = [f"{direction}/{metric}" for direction in DIRECTIONS for metric in IN_PAPERS]
    cells = [comparison.measured[ALL][key] for key in columns]
    best = [max(cell.mean for cell in column) for column in cells]
    width = len(IN_PAPERS)
    counts = comparison.experiments[0].runs[0].entry["counts"]
    lines = [
        f"% {comparison.split}: {counts['clips']} clips, {counts['captions']} captions; needs \\usepackage{{booktabs}}",
        f"\\begin{{tabular}}{{l{'r' * len(columns)}}}",
        "\\toprule",
        f"& \\multicolumn{{{width}}}{{c}}{{text to audio}} & \\multicolumn{{{width}}}{{c}}{{audio to text}} \\\\",
        f"\\cmidrule(lr){{2-{width + 1}}} \\cmidrule(lr){{{width + 2}-{2 * width + 1}}}",
        f"experiment & {' & '.join(key.partition('/')[2] for key in columns)} \\\\",
        "\\midrule",
    ]
    for number, one in enumerate(comparison.experiments):
        shown = []
        for column, top in zip(cells, best, strict=True):
            cell = column[number]
            text = f"{100 * cell.mean:.1f}"
            text = f"\\textbf{{{text}}}" if cell.mean == top and len(column) > 1 else text
            shown.append(text if cell.deviation is None else f"{text} {{\\scriptsize$\\pm${100 * cell.deviation:.1f}}}")
        lines.append(f"{_latex(one.name)} & {' & '.join(shown)} \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


def plot(comparison: ComparedRuns) -> Figure:
    """mAP@10 of every run and its differences; with bins, also by bin."""
    whole = comparison.measured[ALL]
    binned = {name: measured for name, measured in comparison.measured.items() if name != ALL}
    bins = {
        key: {
            name: [cell.mean for cell in measured[key]]
            for name, measured in binned.items()
            if comparison.queries[name][key.partition("/")[0]]
        }
        for key in PICTURED
        if binned
    }
    return plots.comparison(
        [one.name for one in comparison.experiments],
        {key: [cell.each for cell in whole[key]] for key in PICTURED},
        {
            key: [(cell.difference or 0.0, cell.low or 0.0, cell.high or 0.0) for cell in whole[key][1:]]
            for key in PICTURED
        },
        bins,
        comparison.by or "",
    )


def _steps(experiment: Experiment) -> str:
    return ", ".join(dict.fromkeys(str(run.entry["step"]) for run in experiment.runs))


def _seeds(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, sorted(seeds)))


def _show(cell: Measured, key: str) -> str:
    scale, form = (1, "{:.3g}") if key.endswith("median_rank") else (100, "{:.1f}")
    text = form.format(scale * cell.mean)
    return text if cell.deviation is None else f"{text} ± {form.format(scale * cell.deviation)}"


def _show_difference(cell: Measured) -> str:
    assert cell.difference is not None and cell.low is not None and cell.high is not None
    text = f"{100 * cell.difference:+.1f} [{100 * cell.low:.1f}, {100 * cell.high:.1f}]"
    return f"**{text}**" if cell.low > 0 or cell.high < 0 else text


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], unit: str = "") -> str:
    """A Markdown table, whose first column is text; unit: what stands after the first heading."""
    head = [f"{header[0]}, {unit}" if unit else header[0], *header[1:]]
    written = [
        f"| {' | '.join(cell if cell.startswith('**') else table_cell(cell) for cell in line)} |"
        for line in [head, *rows]
    ]
    return "\n".join([written[0], "|:-|" + "-:|" * (len(head) - 1), *written[1:]])


def _latex(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in text)
