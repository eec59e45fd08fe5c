"""Results of the finished runs of a study: mean and standard deviation of a metric over seeds."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tools.study.recipes import EXPERIMENTS, Recipe
from tools.study.store import Line, Settings, name_of

TITLES = {"audiocaps": "AudioCaps format", "clotho": "Clotho format"}
Value = tuple[float, float, int]  # mean, sample standard deviation, number of seeds


class Found:
    """Finished runs by name."""

    def __init__(self, settings: Settings) -> None:
        self.lines = {line["name"]: line for line in settings.lines()}
        self.seeds = settings.seeds

    def runs(self, recipe: Recipe, kind: str = "demo") -> list[Line]:
        """The finished runs of a recipe, one per seed."""
        names = [name_of(kind, recipe, seed) for seed in self.seeds]
        return [self.lines[name] for name in names if name in self.lines]

    def value(self, recipe: Recipe, key: str, kind: str = "demo", part: str = "metrics") -> Value | None:
        """Mean and standard deviation of a metric over seeds, None if no run has it."""
        values = [run[part][key] for run in self.runs(recipe, kind) if key in run.get(part, {})]
        if not values:
            return None
        return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0, len(values)

    def statistics(self) -> Mapping[str, float]:
        """Metrics of the teachers, empty if they have not been computed."""
        metrics: Mapping[str, float] = self.lines.get(name_of("teachers", None, self.seeds[0]), {}).get("metrics", {})
        return metrics


def scorers(found: Found) -> dict[str, Recipe]:
    """Rows of the tables that compare scorers: all finished recipes of experiments a and d."""
    rows = {**EXPERIMENTS["a"].rows, **{f"{k} (d)": r for k, r in EXPERIMENTS["d"].rows.items() if r.rerank is None}}
    return {name: recipe for name, recipe in rows.items() if found.runs(recipe)}
