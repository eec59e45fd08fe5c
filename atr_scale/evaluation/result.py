"""The result of an evaluation, stored as `evaluation-<split>.json` and `ranks-<split>.npz` in the run folder."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from atr_scale.errors import UserError
from atr_scale.evaluation.examples import NUM_EXAMPLES, Example, RetrievalExamples, spread
from atr_scale.evaluation.facts import Facts
from atr_scale.evaluation.metrics import (
    GRADED_AT,
    Ids,
    Ranks,
    Scores,
    bootstrap,
    classification,
    graded_values,
    label_ranks,
)
from atr_scale.evaluation.retrieval_scores import RetrievalScores
from atr_scale.files import atomic_write

FORMAT = 2
NUM_PAIRS, NUM_CLASSES = 32, 64  # rows and columns of the stored excerpt of the score matrix
RANKS = ("t2a", "a2t", "clip", "audio_ids")  # fields of `Ranks` in the file of ranks
GRADED = "graded/"  # before the names of `Ranks.graded` in the file of ranks


@dataclass(frozen=True)
class EvaluationResult:
    """Metrics of one split at one step, and the part of its scores that a report shows.

    For a labelled set the texts are the captions of its classes.
    """

    split: str
    step: int
    metrics: dict[str, float]  # keys of `Ranks.metrics` or `classification`; fractions
    intervals: dict[str, tuple[float, float]]  # 95 % bootstrap intervals, for some of the keys
    ranks: Ranks
    excerpt: NDArray[np.float32]  # [n, n] scores of n pairs; labelled: of n classes, means over the clips of a class
    excerpt_names: tuple[str, ...]  # [n] captions of the rows; the right column of a row is on the diagonal
    examples: tuple[Example, ...]
    labelled: bool = False
    misses: tuple[Example, ...] = ()  # worst first; empty if labelled, and in results of version 0.5 and older
    method: str = ""  # which pairs were scored
    facts: Facts | None = None  # of the queries; None if labelled, and in results of version 0.2
    precision: str = ""  # of most products of the encoders, one of `precision.Products`; empty before version 0.4
    test_set: dict[str, str | None] = field(default_factory=dict)  # `Facts.test_set`; empty without facts

    @property
    def num_texts(self) -> int:
        """Number of captions, or of classes of a labelled set."""
        return len(self.ranks.audio_ids) if self.labelled else len(self.ranks.t2a)

    @property
    def num_clips(self) -> int:
        """Number of clips, including those without a caption."""
        return len(self.ranks.t2a) if self.labelled else len(self.ranks.audio_ids)

    def save(self, folder: Path) -> Path:
        """Write both files into the folder; returns the path of the JSON file."""
        folder.mkdir(parents=True, exist_ok=True)
        stem = file_stem(self.split)
        arrays: dict[str, Any] = {name: getattr(self.ranks, name) for name in RANKS} | {"excerpt": self.excerpt}
        arrays |= {GRADED + key: values for key, values in self.ranks.graded.items()}
        arrays |= {} if self.facts is None else self.facts.arrays()
        with atomic_write(folder / f"ranks-{stem}.npz") as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)
        table = {
            "format": FORMAT,
            "split": self.split,
            "step": self.step,
            "labelled": self.labelled,
            "method": self.method,
            "precision": self.precision,
            "num_texts": self.num_texts,
            "num_clips": self.num_clips,
            "metrics": self.metrics,
            "intervals": self.intervals,
            "test_set": self.test_set,
            "excerpt_names": self.excerpt_names,
            "examples": [asdict(example) for example in self.examples],
            "misses": [asdict(example) for example in self.misses],
        }
        path = folder / f"evaluation-{stem}.json"
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: Path) -> EvaluationResult:
        """Read `evaluation-<split>.json` and its `ranks-<split>.npz`. Raises UserError if they are not readable,
        or of another format."""
        try:
            table = json.loads(path.read_text(encoding="utf-8"))
            with np.load(path.with_name(path.stem.replace("evaluation-", "ranks-", 1) + ".npz")) as file:
                arrays = dict(file)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} or its ranks are missing or damaged ({error}): evaluate the run again") from None
        if table.get("format") != FORMAT:
            raise UserError(f"{path}: format {table.get('format')} instead of {FORMAT}; evaluate the checkpoint again")
        graded = {name.removeprefix(GRADED): arrays[name] for name in arrays if name.startswith(GRADED)}
        ranks = Ranks(**{name: arrays[name] for name in RANKS}, graded=graded)
        return cls(
            split=table["split"],
            step=table["step"],
            # Results of version 0.2 lack some metrics, which follow from the ranks.
            metrics=table["metrics"] if table["labelled"] else ranks.metrics() | table["metrics"],
            intervals={key: (low, high) for key, (low, high) in table["intervals"].items()},
            ranks=ranks,
            excerpt=arrays["excerpt"],
            excerpt_names=tuple(table["excerpt_names"]),
            examples=tuple(map(Example.read, table["examples"])),
            misses=tuple(map(Example.read, table.get("misses", ()))),
            labelled=table["labelled"],
            method=table["method"],
            precision=table.get("precision", ""),
            facts=Facts.from_arrays(arrays),
            test_set=table.get("test_set", {}),
        )


def file_stem(split: str) -> str:
    """The part of the files' names that tells the split: its slashes become dashes."""
    return split.replace("/", "-")


def evaluate_retrieval(
    split: str,
    step: int,
    scores: RetrievalScores,
    ranks: Ranks,
    captions: Sequence[str],
    clip_names: Sequence[str],
    grades: NDArray[np.floating] | None = None,
    facts: Facts | None = None,
) -> EvaluationResult:
    """The result of scores [T, A] with their ranks.

    captions [T] and clip_names [A] are shown in examples. grades [T, A]: relevance, for `metrics.graded_values`. facts:
    of the captions and clips.
    """
    if grades is not None:
        ranks = replace(ranks, graded=graded_values(scores.lists(GRADED_AT), grades))
    examples = RetrievalExamples(scores, ranks, captions, clip_names)
    shown = examples.first_text[spread(len(examples.first_text), NUM_PAIRS)]
    return EvaluationResult(
        split=split,
        step=step,
        metrics=ranks.metrics(),
        intervals=bootstrap(ranks),
        ranks=ranks,
        excerpt=scores.block(*map(torch.from_numpy, (shown, ranks.clip[shown]))).float().cpu().numpy(),
        excerpt_names=tuple(captions[text] for text in shown),
        examples=examples.typical(),
        misses=examples.misses(),
        method=scores.method,
        facts=facts,
        test_set={} if facts is None else facts.test_set(ranks.clip, grades),
    )


def evaluate_labelled(
    split: str, step: int, scores: Scores, class_captions: Sequence[str], clip_names: Sequence[str], labels: Ids
) -> EvaluationResult:
    """Zero-shot classification and class retrieval of scores [classes, audios].

    class_captions [classes] and clip_names [audios] are shown in examples. labels [audios]: class indices.
    """
    table = label_ranks(scores, labels)
    matrix = torch.as_tensor(scores).detach()
    classes = np.unique(table.clip)[:NUM_CLASSES]
    means = [matrix[classes][:, np.flatnonzero(table.clip == label)].float().mean(dim=1) for label in classes]
    zero_shot = [
        Example.of("a2t", clip_names[c], c, int(table.t2a[c]), matrix[:, c], class_captions, table.clip[c, None])
        for c in spread(len(clip_names), NUM_EXAMPLES // 2)
    ]
    by_class = []
    for label in classes[spread(len(classes), NUM_EXAMPLES)]:
        relevant = np.flatnonzero(table.clip == label)
        rank = int(table.a2t[relevant].min())
        by_class.append(Example.of("t2a", class_captions[label], label, rank, matrix[label], clip_names, relevant))
    return EvaluationResult(
        split=split,
        step=step,
        metrics=classification(scores, labels),
        intervals={},
        ranks=table,
        excerpt=torch.stack(means, dim=1).cpu().numpy(),
        excerpt_names=tuple(class_captions[label] for label in classes),
        examples=(*by_class, *zero_shot),
        labelled=True,
    )
