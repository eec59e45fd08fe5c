"""Figures of a run. No function uses global state of matplotlib, so any thread and any process may draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle, pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

Line = Mapping[str, object]  # one line of metrics.jsonl

BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#2f6db5", "#d9772b", "#3d9950", "#c23b3b", "#7b58a8", "#8a8a8a"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, RED, GREY)
NAME = 48  # characters of a caption beside a heat map
SMOOTHING_POINTS = 40  # a curve with fewer points is drawn as it is


def series(lines: Sequence[Line], key: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(steps, values) of a key. Lines without a number for this key are left out."""
    pairs = [(line["step"], line[key]) for line in lines if isinstance(line.get(key), int | float)]
    table = np.asarray(pairs, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def keys_under(lines: Sequence[Line], prefix: str) -> list[str]:
    """All keys `<prefix>/...`, in order of appearance."""
    return list(dict.fromkeys(key for line in lines for key in line if key.startswith(prefix + "/")))


def loss(train: Sequence[Line]) -> Figure:
    """Training loss and its terms over optimizer steps; skipped steps are marked."""
    figure, ax = _figure("training loss", "optimizer step", "loss (nats)")
    steps, values = series(train, "loss")
    smooth = _smooth(values)
    ax.plot(steps, values, color=BLUE, alpha=1.0 if smooth is None else 0.3, linewidth=1, label="loss")
    if smooth is not None:
        ax.plot(steps, smooth, color=BLUE, linewidth=2, label="loss, smoothed")
    terms = [key for key in keys_under(train, "loss") if key.count("/") == 1]  # without their directions
    if len(terms) > 1:  # a single term is the loss itself
        for key, colour in zip(terms, cycle(COLOURS[1:]), strict=False):
            term_steps, term_values = series(train, key)
            ax.plot(term_steps, term_values, color=colour, linewidth=1, alpha=0.8, label=key.removeprefix("loss/"))
    skipped_steps, skipped = series(train, "skipped_steps")
    for number, index in enumerate(np.flatnonzero(np.diff(skipped, prepend=0) > 0)):
        ax.axvline(skipped_steps[index], color=RED, linewidth=0.8, label=None if number else "skipped step")
    ax.legend(frameon=False)
    return figure


def validation(evaluations: Sequence[Line], split: str) -> Figure:
    """Recall and mean average precision of a split over steps, both directions."""
    figure, axes = _figures(1, 2, (9.6, 3.8))
    names = (("t2a", "text → audio"), ("a2t", "audio → text"))
    for ax, (direction, title) in zip(axes, names, strict=True):
        _dress(ax, f"{title}, {split}", "optimizer step", "fraction of queries")
        for name, colour in (("R@10", GREEN), ("R@5", ORANGE), ("R@1", BLUE), ("mAP@10", GREY)):
            steps, values = series(evaluations, f"{direction}/{name}")
            style = "--" if name == "mAP@10" else "-"
            ax.plot(steps, values, style, color=colour, marker="o", markersize=3, label=name)
        _percent(ax)
        ax.set_ylim(bottom=0)
    steps, values = series(evaluations, "t2a/mAP@10")
    if len(values):
        best = int(np.argmax(values))
        axes[0].plot(
            steps[best], values[best], "*", color=RED, markersize=12, label=f"best mAP@10, step {steps[best]:.0f}"
        )
    low, high = 0.0, max(ax.get_ylim()[1] for ax in axes)
    for ax in axes:
        ax.set_ylim(low, high)
        ax.legend(frameon=False)
    return figure


def zero_shot(evaluations: Sequence[Line], split: str) -> Figure:
    """Classification and class retrieval of a labelled split over steps."""
    figure, ax = _figure(f"zero-shot, {split}", "optimizer step", "fraction")
    keys = ("zero_shot/accuracy", "zero_shot/R@5", "class/mAP")
    for key, colour in zip(keys, COLOURS, strict=False):
        ax.plot(*series(evaluations, key), color=colour, marker="o", markersize=3, label=key)
    _percent(ax)
    ax.set_ylim(0, 1)
    ax.legend(frameon=False)
    return figure


def schedule(train: Sequence[Line]) -> Figure:
    """Learning rates, temperature and gradient norm over steps."""
    figure, (left, middle, right) = _figures(1, 3, (11.4, 3.4))
    _dress(left, "learning rate", "optimizer step", "learning rate")
    for key, colour in zip(keys_under(train, "lr"), cycle(COLOURS), strict=False):
        left.plot(*series(train, key), color=colour, label=key.removeprefix("lr/"))
    left.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    if keys_under(train, "lr"):
        left.legend(frameon=False)
    _dress(middle, "temperature", "optimizer step", "temperature τ")
    middle.plot(*series(train, "temperature"), color=PURPLE)
    middle.ticklabel_format(axis="y", useOffset=False)
    _dress(right, "gradient norm before clipping", "optimizer step", "L2 norm")
    steps, values = series(train, "grad_norm")
    right.plot(steps, values, color=GREY, linewidth=1)
    if np.all(values > 0) and len(values):
        right.set_yscale("log")
    return figure


def speed(train: Sequence[Line]) -> Figure:
    """Throughput, fraction of the time spent waiting for data, memory."""
    figure, (left, middle, right) = _figures(1, 3, (11.4, 3.2))
    _dress(left, "throughput", "optimizer step", "samples / s")
    left.plot(*series(train, "samples_per_s"), color=BLUE)
    left.set_ylim(bottom=0)
    _dress(middle, "waiting for data", "optimizer step", "fraction of the step")
    middle.plot(*series(train, "data_wait"), color=ORANGE)
    _percent(middle)
    middle.set_ylim(0, 1)
    _dress(right, "peak memory of a rank", "optimizer step", "GB")
    right.plot(*series(train, "memory_gb"), color=GREEN)
    right.set_ylim(bottom=0)
    return figure


def recall_and_ranks(t2a: NDArray[np.int64], a2t: NDArray[np.int64], num_clips: int, num_texts: int) -> Figure:
    """Recall at every k, and the distribution of ranks.

    t2a [texts]: rank of each text's clip. a2t [captioned clips]: rank of the best ranked caption of each clip.
    """
    figure, (left, right) = _figures(1, 2, (9.6, 3.8))
    _dress(left, "recall at k", "k (length of the list)", "queries whose match is in the list")
    directions = (("text → audio", t2a, num_clips, BLUE), ("audio → text", a2t, num_texts, ORANGE))
    for name, rank, candidates, colour in directions:
        k = np.unique(np.geomspace(1, candidates, 200).round().astype(np.int64))
        left.plot(k, np.searchsorted(np.sort(rank), k, side="right") / len(rank), color=colour, label=name)
    k = np.arange(1, num_clips + 1)
    left.plot(k, k / num_clips, "--", color=GREY, linewidth=1, label="chance, text → audio")
    left.set_xscale("log")
    left.set_ylim(0, 1.02)
    for at in (1, 5, 10):
        left.axvline(at, color=GREY, linewidth=0.6, linestyle=":")
    left.set_xticks([at for at in (1, 5, 10, 100, 1000, 10000) if at <= max(num_clips, num_texts)])
    left.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    _percent(left)
    left.legend(frameon=False, loc="lower right")
    _dress(right, "where the match is found", "rank of the match", "fraction of queries")
    edges = _rank_bins(max(num_clips, num_texts))
    place = np.arange(len(edges) - 1)
    for (name, rank, _, colour), shift in zip(directions, (-0.2, 0.2), strict=True):
        share = np.histogram(rank, edges)[0] / len(rank)
        right.bar(place + shift, share, width=0.4, color=colour, label=name)
    labels = [f"{a}" if b == a + 1 else f"{a}–{b - 1}" for a, b in pairwise(edges)]
    right.set_xticks(place, labels, rotation=30, ha="right")
    _percent(right)
    right.legend(frameon=False)
    return figure


def heatmap(
    scores: NDArray[np.float32],
    title: str = "similarity",
    rows: str = "caption",
    columns: str = "clip",
    names: Sequence[str] = (),
) -> Figure:
    """Score matrix [texts, audios] as an image, with the right pairs on the diagonal; names [texts] label the rows."""
    height = max(5.0, 0.15 * len(scores) + 1)
    figure, ax = _figure(title, columns, rows, (1.1 * height + (2.4 if len(names) else 0.6), height))
    image = ax.imshow(scores, cmap="magma", aspect="auto", interpolation="nearest")
    figure.colorbar(image, ax=ax, label="score")
    ax.grid(False)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(names):
        shown = [_short(name) for name in names]
        # Captions are arbitrary text: a dollar sign must not start a formula.
        ax.set_yticks(range(len(shown)), shown, fontsize=7, parse_math=False)
    else:
        ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def scaling(
    sizes: Sequence[int],
    rates: Sequence[float],
    seconds: Mapping[str, Sequence[float]],
    memory: Sequence[Mapping[str, float]],
    capacity: float,
    title: str,
) -> Figure:
    """A plan for several numbers of GPUs.

    sizes [n]: numbers of GPUs. rates [n]: clips/s of all GPUs. seconds: parts of an optimizer step's time, each [n].
    memory [n]: parts of the peak memory of a GPU, GiB. capacity: of a GPU, GiB.
    """
    figure, (left, middle, right) = _figures(1, 3, (12.6, 3.6))
    _dress(left, f"speed, {title}", "GPUs", "clips / s")
    left.loglog(sizes, rates, color=BLUE, marker="o", markersize=3, label="planned")
    left.loglog(sizes, [rates[0] * n / sizes[0] for n in sizes], "--", color=GREY, linewidth=1, label="ideal")
    left.legend(frameon=False)
    _dress(middle, "time of an optimizer step", "GPUs", "ms")
    _stack(middle, sizes, {name: [1e3 * x for x in values] for name, values in seconds.items() if name != "loader"})
    middle.plot(range(len(sizes)), [1e3 * x for x in seconds["loader"]], color=RED, label="loader, in parallel")
    middle.legend(frameon=False, fontsize=8)
    _dress(right, "memory of a GPU at its peak", "GPUs", "GiB")
    _stack(right, sizes, {name: [parts[name] for parts in memory] for name in memory[0]})
    right.axhline(capacity, color=RED, linewidth=1, linestyle="--")
    right.legend(frameon=False, fontsize=8)
    return figure


def comparison(
    names: Sequence[str],
    each: Mapping[str, Sequence[Sequence[float]]],
    differences: Mapping[str, Sequence[tuple[float, float, float]]],
    bins: Mapping[str, Mapping[str, Sequence[float]]],
    by: str,
) -> Figure:
    """Results of experiments, their differences to the first one, and their results by bin.

    names: of the experiments. each: of each metric, the values of every run of every experiment. differences: of each
    metric, (difference, low, high) of every experiment but the first. bins: of each metric, by name of the bin, the
    value of every experiment; by: what the bins are of; both empty if there are none.
    """
    num_panels = 2 + len(bins)
    figure, axes = _figures(1, num_panels, (1.5 + 4.2 * num_panels, max(3.0, 1.2 + 0.4 * len(names))))
    place = np.arange(len(names))
    _dress(axes[0], "results, a point per run", "fraction of queries", "")
    _dress(axes[1], f"difference to {_short(names[0])}", "points, with 95 % interval", "")
    for number, (metric, values) in enumerate(each.items()):
        colour, shift = COLOURS[number % len(COLOURS)], 0.12 * (2 * number - len(each) + 1)
        for row, runs in zip(place, values, strict=True):
            axes[0].plot(runs, np.full(len(runs), row + shift), "o", color=colour, alpha=0.4, markersize=4)
        axes[0].plot([np.mean(runs) for runs in values], place + shift, "D", color=colour, markersize=6, label=metric)
        middle, low, high = 100 * np.array(differences[metric], dtype=np.float64).reshape(-1, 3).T
        reach = np.stack([middle - low, high - middle]).clip(min=0)
        axes[1].errorbar(middle, place[1:] + shift, xerr=reach, fmt="D", color=colour, capsize=3, label=metric)
    axes[1].axvline(0, color=GREY, linewidth=1, linestyle="--")
    _percent_of(axes[0].xaxis)
    for ax in axes[:2]:
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.legend(frameon=False, fontsize=8)
    axes[0].set_yticks(place, [_short(name) for name in names], parse_math=False)
    axes[1].set_yticks(place, [""] * len(names))
    for ax, (metric, by_bin) in zip(axes[2:], bins.items(), strict=True):
        _dress(ax, f"{metric} by {by}", by, "fraction of queries")
        table = np.array(list(by_bin.values()))
        for column, name, colour in zip(table.T, names, cycle(COLOURS), strict=False):
            ax.plot(column, color=colour, marker="o", markersize=3, label=_short(name))
        ax.set_xticks(range(len(by_bin)), list(by_bin), rotation=30, ha="right", parse_math=False)
        _percent(ax)
        for text in ax.legend(frameon=False, fontsize=8).get_texts():
            text.set_parse_math(False)
    return figure


def _short(name: str) -> str:
    return name if len(name) <= NAME else name[: NAME - 1] + "…"


def _stack(ax: Axes, sizes: Sequence[int], parts: Mapping[str, Sequence[float]]) -> None:
    """Stacked bars, one for each size."""
    place, bottom = np.arange(len(sizes)), np.zeros(len(sizes))
    for (name, values), colour in zip(parts.items(), cycle(COLOURS), strict=False):
        ax.bar(place, values, bottom=bottom, color=colour, label=name)
        bottom += np.asarray(values)
    ax.set_xticks(place, [str(size) for size in sizes], rotation=45)


def _rank_bins(candidates: int) -> list[int]:
    """Lower edges 1, 2, 3, 6, 11, 21, 51, 101, ... and the upper edge of the last bin."""
    tops = (digit * 10**power for power in range(9) for digit in (1, 2, 5))
    return [1, *(top + 1 for top in tops if top < candidates), candidates + 1]


def _smooth(values: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """Centred moving average over a tenth of the curve, shorter at the ends; None if there are few points."""
    if len(values) < SMOOTHING_POINTS:
        return None
    half = len(values) // 20
    total = np.concatenate([[0.0], np.cumsum(values)])
    middle = np.arange(len(values))
    reach = np.minimum(half, np.minimum(middle, middle[::-1]))
    means: NDArray[np.float64] = (total[middle + reach + 1] - total[middle - reach]) / (2 * reach + 1)
    return means


def _figure(title: str, xlabel: str, ylabel: str, size: tuple[float, float] = (7.2, 3.8)) -> tuple[Figure, Axes]:
    figure, (ax,) = _figures(1, 1, size)
    _dress(ax, title, xlabel, ylabel)
    return figure, ax


def _figures(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    return figure, list(np.ravel(figure.subplots(rows, columns)))


def _dress(ax: Axes, title: str, xlabel: str, ylabel: str) -> None:
    # Names of splits, experiments and fields may hold a $, which begins a formula otherwise.
    ax.set_title(title, fontsize=11, loc="left", fontweight="bold", parse_math=False)
    ax.set_xlabel(xlabel, parse_math=False)
    ax.set_ylabel(ylabel, parse_math=False)
    ax.grid(True, color="#e4e4e4", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def _percent(ax: Axes) -> None:
    _percent_of(ax.yaxis)


def _percent_of(axis: Axis) -> None:
    axis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
