"""Figures of the study, one per table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from atr_scale.plots import BLUE, GREY, ORANGE
from tools.study.found import TITLES, Found, scorers
from tools.study.negatives import KINDS
from tools.study.recipes import EXPERIMENTS, Recipe

COLOURS = (BLUE, ORANGE)


def draw(found: Found, folder: Path) -> list[str]:
    """Write study-<letter>.png for every experiment with finished runs. Returns the letters."""
    precision = {title: {"": f"{name}/t2a/mAP@10"} for name, title in TITLES.items()}
    figures: dict[str, Figure | None] = {
        letter: _values(found, experiment.rows, precision, "t2a mAP@10, percent")
        for letter, experiment in EXPERIMENTS.items()
    }
    rows = scorers(found)
    hard = {kind: {title: f"{name}/hard/{kind}" for name, title in TITLES.items()} for kind in KINDS}
    figures["e"] = _values(found, rows, hard, "true caption preferred, percent", chance=50)
    figures["j"] = _cost(found, rows)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {letter: figure for letter, figure in figures.items() if figure is not None}
    for letter, figure in drawn.items():
        figure.savefig(folder / f"study-{letter}.png")
    return list(drawn)


def _values(
    found: Found,
    rows: Mapping[str, Recipe],
    panels: Mapping[str, Mapping[str, str]],
    label: str,
    chance: float | None = None,
) -> Figure | None:
    """Mean and standard deviation, one line per row. panels: title -> metrics by their names in the legend."""
    names = [name for name, recipe in rows.items() if found.runs(recipe)]
    if not names:
        return None
    figure = Figure(figsize=(9.6, 0.3 * len(names) + 1.4), dpi=130, layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for ax, (title, keys) in zip(axes, panels.items(), strict=True):
        _dress(ax, label if ax is axes[0] else "")
        ax.set_title(title, fontsize=10, loc="left", fontweight="bold")
        for k, ((series, key), colour) in enumerate(zip(keys.items(), COLOURS, strict=False)):
            shift = 0.2 * (k - (len(keys) - 1) / 2)
            points = [(y, value) for y, name in enumerate(names) if (value := found.value(rows[name], key)) is not None]
            ax.errorbar(
                [100 * mean for _, (mean, _, _) in points],
                [y + shift for y, _ in points],
                xerr=[100 * deviation for _, (_, deviation, _) in points],
                fmt="o", markersize=4, capsize=2, color=colour, label=series,
            )  # fmt: skip
        if chance is not None:
            ax.axvline(chance, color=GREY, linewidth=0.8)
    axes[0].set_yticks(range(len(names)), names, fontsize=8)
    axes[0].invert_yaxis()
    if len(next(iter(panels.values()))) > 1:
        figure.legend(
            *axes[-1].get_legend_handles_labels(), loc="outside lower right", ncols=2, frameon=False, fontsize=8
        )
    return figure


def _cost(found: Found, rows: Mapping[str, Recipe]) -> Figure | None:
    """Retrieval over the CPU time of an optimizer step per clip."""
    figure = Figure(figsize=(7.6, 4.4), dpi=130, layout="constrained")
    ax = figure.subplots()
    _dress(ax, "CPU milliseconds of a step, per clip of the batch")
    ax.set_ylabel("t2a mAP@10, AudioCaps format, percent")
    ax.set_xscale("log")
    by_batch: dict[int, list[tuple[str, float, float]]] = {}
    for name, recipe in rows.items():
        seconds = found.value(recipe, "cpu_seconds_per_step", part="cost")
        value = found.value(recipe, "audiocaps/t2a/mAP@10")
        if seconds is not None and value is not None:
            point = (name.removesuffix(" (d)"), 1000 * seconds[0] / recipe.batch, 100 * value[0])
            by_batch.setdefault(recipe.batch, []).append(point)
    for (batch, points), colour in zip(by_batch.items(), COLOURS, strict=False):
        _, x, y = zip(*points, strict=True)
        ax.plot(x, y, "o", color=colour, markersize=5, label=f"batch {batch}")
        for name, *place in points:
            ax.annotate(name, (place[0], place[1]), textcoords="offset points", xytext=(4, 3), fontsize=7)
    if not by_batch:
        return None
    ax.legend(frameon=False, fontsize=8)
    return figure


def _dress(ax: Axes, xlabel: str) -> None:
    ax.set_xlabel(xlabel)
    ax.grid(True, color="#e4e4e4", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
