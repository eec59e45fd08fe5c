"""Soft labels that come from no model: known relevance, random scores, equal scores.

Shape suffixes: B texts of the global batch, b rows of this rank, C captions, N clips.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from atr_scale.batch import Batch, stable_id
from atr_scale.data.sample import BadSample
from atr_scale.data.shard_reader import ShardSet
from atr_scale.distributed.world import World
from atr_scale.errors import UserError
from atr_scale.evaluation.relevance import Texts, pairs_of_csv, read_grades
from atr_scale.losses.soft_labels import SoftLabels
from atr_scale.losses.terms import DistillationSection
from atr_scale.score_block import EmbeddingScores, ScoreBlock
from atr_scale.teachers.ensemble import Coverage, EnsembleMember, TeacherEnsemble
from atr_scale.teachers.grades import GradeTable, Pairs
from atr_scale.teachers.keys import UNKNOWN
from atr_scale.teachers.sizes import check_grades_size

RANDOM_WIDTH = 64  # of random embeddings: their cosines have a standard deviation of 1/8
ROWS = 256  # captions whose grades are looked at together


class Constructed:
    """Random or equal scores of all pairs, which need no table.

    Random scores are cosines of random unit vectors, one for each caption and each clip, drawn from their stable ids
    and `seed`: the same in every epoch and on any number of ranks.
    """

    coverage: Sequence[Coverage] = ()

    def __init__(self, kind: str, seed: int) -> None:
        self.kind, self.seed = kind, seed

    def labels(self, batch: Batch, world: World | None = None) -> SoftLabels[ScoreBlock]:
        """Soft labels of the global batch; all ranks call this."""
        world, clips, device = world or World.current(), batch.clip_ids, batch.input_ids.device
        if self.kind == "uniform":
            audio = torch.zeros(len(clips), 1, device=device)
            return SoftLabels.of(EmbeddingScores(world.gather(audio), audio, world))
        captions = random_vectors(torch.stack([clips, batch.caption_index + 1], 1), self.seed).to(device)
        audio = random_vectors(torch.stack([clips, torch.zeros_like(clips)], 1), self.seed).to(device)
        return SoftLabels.of(EmbeddingScores(world.gather(captions), audio, world))


def random_vectors(ids: Tensor, seed: int) -> Tensor:
    """[n, d] float32 of unit length, a function of each row of `ids` [n, 2] int64 and of the seed."""
    streams = [np.random.Philox(key=[seed, clip], counter=[0, 0, 0, index]) for clip, index in ids.tolist()]
    vectors = np.stack([np.random.Generator(each).standard_normal(RANDOM_WIDTH, np.float32) for each in streams])
    return normalize(torch.from_numpy(vectors), dim=1)


def true_targets(section: DistillationSection, sources: Sequence[ShardSet]) -> TeacherEnsemble:
    """The grades of the relevance file of a configuration, as the scores of a teacher; all ranks call this.

    A caption's own clip has the grade 1. Raises UserError if the file cannot be read, if a CSV file grades no caption
    of `sources`, or if an npz file does not fit into memory.
    """
    path = Path(section.relevance or "")
    table = _of_npz(path) if path.suffix == ".npz" else _of_csv(path, sources)
    return TeacherEnsemble([EnsembleMember(table)], missing=section.missing)


def _of_npz(path: Path) -> GradeTable:
    check_grades_size(path, World.current())
    known = read_grades(path)
    clip_ids = torch.tensor([stable_id(clip) for clip in known.columns])
    rows = torch.tensor([[stable_id(clip), index] for clip, index in known.rows])
    own = np.array([known.columns.get(clip, UNKNOWN) for clip, _ in known.rows])
    graded = np.flatnonzero(own != UNKNOWN)
    known.grades_CN[graded, own[graded]] = 1
    return GradeTable.of(path, clip_ids, rows[:, 0], rows[:, 1], _positive(known.grades_CN))


def _positive(grades_CN: NDArray[np.floating]) -> Iterator[Pairs]:
    """Pairs with a positive grade, some captions at a time."""
    for first in range(0, len(grades_CN), ROWS):
        rows, columns = np.nonzero(grades_CN[first : first + ROWS])
        yield first + rows, columns, grades_CN[first + rows, columns].astype(np.float32)


def _of_csv(path: Path, sources: Sequence[ShardSet]) -> GradeTable:
    """A CSV file names captions by their text, so the texts of all samples are read. Two samples may be one clip."""
    captions: list[str] = []
    index: list[int] = []
    own: list[int] = []
    clips: dict[str, int] = {}
    for shards in sources:
        for sample in range(len(shards)):
            try:
                clip_id, texts, _ = shards.read_text(sample)
            except BadSample:  # training drops it too
                continue
            own += [clips.setdefault(clip_id, len(clips))] * len(texts)
            captions += texts
            index += range(len(texts))
    named = list(pairs_of_csv(path, Texts(captions, list(clips))))
    if not named:
        places = ", ".join(shards.location for shards in sources)
        raise UserError(f"{path} grades no caption and clip of {places}: give the file of these clips")
    pairs = np.unique([*named, *enumerate(own)], axis=0)
    parts = [(pairs[:, 0], pairs[:, 1], np.ones(len(pairs)))]
    ids, text = (torch.tensor([stable_id(name) for name in names]) for names in (clips, captions))
    return GradeTable.of(path, ids, ids[own], torch.tensor(index), parts, text)
