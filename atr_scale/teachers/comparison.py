"""Retrieval metrics of the teachers of an ensemble on a split, and the correlation of their scores.

Shape suffixes: C captions, N clips, M models, P pairs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from atr_scale import plots
from atr_scale.evaluation.retrieval_scores import DualEncoderScores, RetrievalScores, ScoreMatrix
from atr_scale.teachers.ensemble import joined_embeddings
from atr_scale.teachers.tables import Direction, TeacherTable

NUM_CLIPS = 4096  # clips that retrieval is measured on; drawn if the split has more
NUM_PAIRS = 250_000  # pairs that a correlation is computed from: its standard error is 0.002
SEED = 0
SHOWN = ("t2a/R@1", "t2a/R@5", "t2a/R@10", "t2a/mAP@10", "a2t/R@1", "a2t/R@10")
Metrics = dict[str, float]


@dataclass(frozen=True)
class TeacherComparison:
    """Retrieval metrics of the teachers of an ensemble on a split, and the Pearson correlation of their scores.

    Correlations are [M, M], in the order of `models`, over a sample of pairs of a caption and a clip.
    """

    split: str
    num_clips: int
    measured_clips: int  # clips that the metrics are computed on
    models: dict[str, Metrics]  # of each teacher
    ensemble: Metrics  # of all teachers together
    without: dict[str, Metrics]  # of all except the named one; empty for a single teacher
    correlation: list[list[float]]
    unmatched: list[list[float]]  # correlation without the pairs of a caption and its own clip
    num_pairs: int  # of the sample

    def table(self) -> str:
        """The metrics of all models and ensembles as a Markdown table."""
        rows = [(name, metrics) for name, metrics in self.models.items()]
        if self.without:
            rows.append(("**all**", self.ensemble))
            rows += [(f"all but {name}", metrics) for name, metrics in self.without.items()]
        width = max(len(name) for name, _ in rows)
        rule = "|".join("-" * len(key) + "-:" for key in SHOWN)
        lines = [f"| {'scores of':<{width}} | {' | '.join(SHOWN)} |", f"|:-{'-' * width}|{rule}|"]
        for name, metrics in rows:
            cells = (f"{100 * metrics[key]:.2f} %".rjust(len(key)) for key in SHOWN)
            lines.append(f"| {name:<{width}} | {' | '.join(cells)} |")
        return "\n".join(lines)

    def save(self, folder: Path, about: dict[str, Any]) -> None:
        """Write estimate.json, with the entries of `about`, and report.md with its picture."""
        text = json.dumps({**about, **asdict(self)}, indent=2, ensure_ascii=False)
        (folder / "estimate.json").write_text(text + "\n", encoding="utf-8")
        (folder / "report.md").write_text("\n\n".join(self._report(folder)) + "\n", encoding="utf-8")

    def _report(self, folder: Path) -> list[str]:
        drawn = "" if self.measured_clips == self.num_clips else f"{self.measured_clips} of "
        parts = [
            f"# Teacher scores of {self.split}",
            self.table(),
            f"Retrieval inside the split ({drawn}{self.num_clips} clips), on which the models may have been trained: "
            "it says how sharp the soft labels are, not how good the models are on new data. Several models together "
            "have the mean of their scores.",
        ]
        if not self.without:
            return parts
        rows = [
            f"| {name} | {100 * (self.ensemble['t2a/mAP@10'] - metrics['t2a/mAP@10']):+.2f} "
            f"| {100 * (self.ensemble['a2t/R@1'] - metrics['a2t/R@1']):+.2f} |"
            for name, metrics in self.without.items()
        ]
        head = ["| model | t2a/mAP@10 | a2t/R@1 |", "|:-|-:|-:|"]
        parts += ["## What each model adds to the others, percentage points", "\n".join([*head, *rows])]
        names = list(self.models)
        values = np.array(self.unmatched, dtype=np.float32)
        (folder / "figures").mkdir(exist_ok=True)
        figure = plots.heatmap(values, "correlation of scores, without matched pairs", "", "model", names)
        figure.savefig(folder / "figures" / "correlation.png")
        rows = [
            f"| {one} | {other} | {self.correlation[i][j]:.4f} | {self.unmatched[i][j]:.4f} |"
            for i, one in enumerate(names)
            for j, other in enumerate(names)
            if i < j
        ]
        head = ["| model | model | all pairs | without matched pairs |", "|:-|:-|-:|-:|"]
        return [
            *parts,
            f"## Correlation of scores over {self.num_pairs} pairs",
            "\n".join([*head, *rows]),
            "![correlation of scores](figures/correlation.png)",
        ]


def compare_teachers(tables: Sequence[TeacherTable], split: str) -> TeacherComparison:
    """Compare the teacher tables of one split: each, all together, and all except each one.

    Samples are drawn with a fixed seed. Tables of embeddings need no score matrix. If a table holds scores, two
    matrices of NUM_CLIPS clips and their captions are in memory.
    """
    first, rng = tables[0], np.random.default_rng(SEED)
    num_clips, num_captions = len(first.clip_ids), len(first.caption_clip)
    drawn = np.sort(rng.permutation(num_clips)[:NUM_CLIPS])
    clips = torch.from_numpy(drawn)
    captions = torch.isin(first.caption_clip, first.clip_ids[clips]).nonzero().squeeze(1)

    def retrieval(members: Sequence[TeacherTable]) -> Metrics:
        """Metrics of the sum of the members' scores, which has the same ranks as their mean."""
        t2a = _scores(members, captions, clips, "t2a").ranks(first.caption_clip[captions], first.clip_ids[clips])
        if not any(table.differs_by_direction for table in members):
            return t2a.metrics()
        a2t = _scores(members, captions, clips, "a2t").ranks(first.caption_clip[captions], first.clip_ids[clips])
        own = a2t.metrics()
        return {name: own[name] if name.startswith("a2t/") else value for name, value in t2a.metrics().items()}

    models = {
        table.name: retrieval([table]) for table in tqdm(tables, desc="comparing models", unit="model", disable=None)
    }
    several = len(tables) > 1
    without = {
        table.name: retrieval([other for other in tables if other is not table])
        for table in tqdm(tables if several else [], desc="leaving one out", unit="model", disable=None)
    }
    count = num_captions * num_clips
    pairs = np.arange(count) if count <= NUM_PAIRS else rng.integers(0, count, NUM_PAIRS)
    rows, columns = torch.from_numpy(pairs // num_clips), torch.from_numpy(pairs % num_clips)
    values = np.stack([_pairs(table, rows, columns) for table in tables])
    matched = (first.caption_clip[rows] == first.clip_ids[columns]).numpy()
    return TeacherComparison(
        split=split,
        num_clips=num_clips,
        measured_clips=len(clips),
        models=models,
        ensemble=retrieval(tables) if several else models[first.name],
        without=without,
        correlation=np.atleast_2d(np.corrcoef(values)).tolist(),
        unmatched=np.atleast_2d(np.corrcoef(values[:, ~matched])).tolist(),
        num_pairs=len(pairs),
    )


def _scores(members: Sequence[TeacherTable], captions: Tensor, clips: Tensor, direction: Direction) -> RetrievalScores:
    """The sum of the members' scores."""
    if all(table.is_dual_encoder for table in members):
        equal = [(table, 1.0) for table in members]
        return DualEncoderScores(*joined_embeddings(equal, captions, clips, direction))
    total = members[0].scores(captions, clips, direction)
    for table in members[1:]:
        total += table.scores(captions, clips, direction)
    return ScoreMatrix(total)


def _pairs(table: TeacherTable, rows: Tensor, columns: Tensor) -> NDArray[np.float64]:
    """[P]: scores of pairs."""
    parts = zip(rows.split(8192), columns.split(8192), strict=True)
    return torch.cat([table.pairs(*part) for part in parts]).double().numpy()
