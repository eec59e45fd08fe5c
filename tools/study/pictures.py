"""Pictures of the study, one a table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from atr_scale.figures import BLUE, GREEN, ORANGE, PURPLE
from tools.study.corpora import TESTS
from tools.study.negatives import KINDS
from tools.study.recipes import EXPERIMENTS, Recipe

if TYPE_CHECKING:
    from tools.study.report import Found

COLOURS = (BLUE, ORANGE, GREEN, PURPLE)


def draw(found: Found, folder: Path) -> list[str]:
    """Writes study-<letter>.png for every experiment with runs; returns the letters."""
    from tools.study.report import scorers

    figures: dict[str, Figure | None] = {
        letter: _values(found, experiment.rows, {name: f"{name}/t2a/mAP@10" for name in TESTS}, "t2a mAP@10, percent")
        for letter, experiment in EXPERIMENTS.items()
    }
    rows = scorers(found)
    hard = {kind: f"audiocaps/hard/{kind}" for kind in KINDS}
    figures["e"] = _values(found, rows, hard, "true caption preferred, AudioCaps format, percent", middle=50)
    figures["j"] = _cost(found, rows)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {letter: figure for letter, figure in figures.items() if figure is not None}
    for letter, figure in drawn.items():
        figure.savefig(folder / f"study-{letter}.png")
    return list(drawn)


def _values(
    found: Found, rows: Mapping[str, Recipe], keys: Mapping[str, str], label: str, middle: float | None = None
) -> Figure | None:
    """Mean and spread of some metrics, a line for each row."""
    names = [name for name, recipe in rows.items() if found.runs(recipe)]
    if not names:
        return None
    figure, ax = _axes(0.32 * len(names) + 1.2, label)
    for k, ((title, key), colour) in enumerate(zip(keys.items(), COLOURS, strict=False)):
        shift = (k - (len(keys) - 1) / 2) * 0.14
        points = [(y, value) for y, name in enumerate(names) if (value := found.value(rows[name], key)) is not None]
        ax.errorbar(
            [100 * mean for _, (mean, _, _) in points],
            [y + shift for y, _ in points],
            xerr=[100 * deviation for _, (_, deviation, _) in points],
            fmt="o", markersize=4, capsize=2, color=colour, label=title,
        )  # fmt: skip
    if middle is not None:
        ax.axvline(middle, color="#8a8a8a", linewidth=0.8)
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.invert_yaxis()
    ax.legend(frameon=False, fontsize=8)
    return figure


def _cost(found: Found, rows: Mapping[str, Recipe]) -> Figure | None:
    """Retrieval over the CPU time of a pair."""
    figure, ax = _axes(4.2, "CPU milliseconds a step and pair of the batch")
    drawn = False
    for name, recipe in rows.items():
        seconds = found.value(recipe, "cpu_seconds_per_step", part="cost")
        value = found.value(recipe, "audiocaps/t2a/mAP@10")
        if seconds is None or value is None:
            continue
        drawn = True
        x, y = 1000 * seconds[0] / recipe.batch, 100 * value[0]
        ax.plot(x, y, "o", color=BLUE if recipe.batch == 64 else ORANGE, markersize=5)
        ax.annotate(name, (x, y), textcoords="offset points", xytext=(4, 3), fontsize=7)
    ax.set_xscale("log")
    ax.set_ylabel("t2a mAP@10, AudioCaps format, percent")
    return figure if drawn else None


def _axes(height: float, xlabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.6, height), dpi=130, layout="constrained")
    ax = figure.subplots()
    ax.set_xlabel(xlabel)
    ax.grid(True, color="#e4e4e4", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    return figure, ax
