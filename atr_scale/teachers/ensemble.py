"""Teachers of a run: weighted teacher tables that give the soft labels of a batch, and the clips that they know.

Shape suffixes: B texts of the global batch, b rows of this rank, d width.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from atr_scale.batch import Batch, stable_id
from atr_scale.data.sample import BadSample
from atr_scale.data.shard_reader import ShardSet
from atr_scale.distributed.world import World
from atr_scale.errors import UserError
from atr_scale.losses.soft_labels import SoftLabels, Teacher
from atr_scale.losses.terms import DistillationSection
from atr_scale.score_block import EmbeddingScores, ScoreBlock, StoredScores
from atr_scale.teachers.keys import UNKNOWN
from atr_scale.teachers.tables import REMEDY, Direction, TeacherTable, same_keys, shards_checksum

logger = logging.getLogger(__name__)

SPOT_CHECKS = 64  # samples of unknown shards that are looked up before training starts
SKIP = "set objective.distillation.missing=skip to leave such pairs out of the term"


class EnsembleMember(NamedTuple):
    """A teacher table, its weight among the others, and the temperature of its scores (None: the student's)."""

    table: TeacherTable
    weight: float = 1.0
    temperature: float | None = None


class _Mean(NamedTuple):
    """sum of factor * scores over some tables: the scores of one `Teacher`."""

    tables: list[tuple[TeacherTable, float]]
    weight: float
    temperature: float | None


@dataclass(frozen=True)
class Coverage:
    """How many clips of a shard set have no teacher.

    missing: out of `looked_up` samples; all samples of a set that the tables were made from count as looked up.
    example: a caption without a teacher, in words. skipped: whether pairs without a teacher are left out.
    """

    location: str
    clips: int
    missing: int
    looked_up: int
    example: str = ""
    skipped: bool = False

    def describe(self) -> str:
        """The count in words, an estimate if only some samples were looked up."""
        if not self.missing:
            sampled = "" if self.looked_up == self.clips else f" (of which {self.looked_up} were looked up)"
            return f"all {self.clips} clips{sampled} have a teacher"
        count, sampled = str(self.missing), ""
        if self.looked_up < self.clips:
            count = f"about {round(self.missing / self.looked_up * self.clips)}"
            sampled = f" ({self.missing} of {self.looked_up} that were looked up)"
        then = ", their pairs are left out of distillation" if self.skipped else ""
        return f"{count} of {self.clips} clips have no teacher{sampled}{then}"


class TeacherEnsemble:
    """Several teacher tables of the same clips, as soft labels of a batch.

    ensemble: "cosines" averages the members' scores by weight, each divided by its temperature; "probabilities" the
    softmaxes of these. missing: "refuse" or "skip" pairs that the tables do not have.
    Raises UserError if the tables are of different splits.
    """

    def __init__(
        self,
        members: Sequence[EnsembleMember],
        ensemble: Literal["cosines", "probabilities"] = "cosines",
        missing: Literal["refuse", "skip"] = "refuse",
    ) -> None:
        self.tables = [member.table for member in members]
        same_keys(self.tables)
        self.keys, self.missing = self.tables[0].keys, missing
        self._means = _mean_of_cosines(members) if ensemble == "cosines" else _mean_of_probabilities(members)
        self.coverage: list[Coverage] = []

    @staticmethod
    def of(*tables: TeacherTable) -> TeacherEnsemble:
        """The mean of the scores of these tables, with the student's temperature."""
        return TeacherEnsemble([EnsembleMember(table) for table in tables])

    @staticmethod
    def read(section: DistillationSection) -> TeacherEnsemble:
        """The tables of a configuration. Raises UserError like `TeacherTable.read`.

        The first rank of a machine verifies the checksums.
        """
        verify = os.environ.get("LOCAL_RANK", "0") == "0"
        members = [
            EnsembleMember(TeacherTable.read(entry.path, verify), entry.weight, entry.temperature)
            for entry in section.tables
        ]
        if len({member.temperature is None for member in members}) == 2:
            members = [m if m.temperature else m._replace(temperature=section.temperature) for m in members]
        return TeacherEnsemble(members, section.ensemble, section.missing)

    def check(self, sources: Sequence[ShardSet]) -> None:
        """Count the clips of each shard set that have no teacher, as `coverage`, and log it.

        Raises UserError if there are any and `missing` is "refuse", or if no shard set has a teacher. Shards with the
        same manifest as those of the tables hold the same samples. Of other shards a few samples are read, because only
        samples hold clip ids. If they miss an unknown caption, `labels` finds it once it is in a batch.
        """
        self.coverage = [self._coverage(shards) for shards in sources]
        for found in self.coverage:
            if found.missing and self.missing == "refuse":
                raise self._unknown(f"{found.describe()}; {found.example} in {found.location}")
        for found in self.coverage:
            logger.info("%s: %s", found.location, found.describe())
        if all(found.missing == found.looked_up for found in self.coverage):
            places = ", ".join(found.location for found in self.coverage)
            raise UserError(f"no clip of {places} is in the teacher tables ({self._names()}): {REMEDY}")

    def labels(self, batch: Batch, world: World | None = None) -> SoftLabels[ScoreBlock]:
        """Soft labels of the global batch, from scores [B, b] of all its captions with this rank's clips.

        All ranks call this. Scores come before temperature and softmax. If all tables of a mean hold embeddings, the
        block holds these, joined along their width. Raises UserError on every rank if a caption of any rank is unknown,
        unless `missing` is "skip".
        """
        world = world or World.current()
        own = self.keys.captions(batch.clip_ids, batch.caption_index, batch.stored_ids)
        captions = torch.from_numpy(world.gather_host(own.numpy()))
        known = captions != UNKNOWN
        every, device = bool(known.all()), batch.input_ids.device
        if not every and self.missing == "refuse":
            lost = int((own == UNKNOWN).nonzero()[0]) if (own == UNKNOWN).any() else None
            raise self._unknown("a caption of another rank" if lost is None else _describe(batch, lost))
        # Pairs without a teacher hold the scores of any other until the loss leaves them out.
        rows, columns = captions.clamp(min=0), self.keys.clips(batch.clip_ids).clamp(min=0)
        teachers = tuple(_teacher(mean, rows, columns, device, world) for mean in self._means)
        return SoftLabels(teachers, None if every else known)

    def _coverage(self, shards: ShardSet) -> Coverage:
        checksum = shards_checksum(shards)
        for source in self.tables[0].sources:
            if source.sha256 == checksum:  # samples that were unreadable then are dropped in training too
                return Coverage(shards.location, len(shards), 0, len(shards))
        missing, looked_up, example = 0, 0, ""
        for row in np.unique(np.linspace(0, len(shards) - 1, SPOT_CHECKS).astype(int)).tolist():
            try:
                clip_id, captions, _ = shards.read_text(row)
            except BadSample:  # training drops it too
                continue
            ids = torch.full((len(captions),), stable_id(clip_id))
            texts = torch.tensor([stable_id(caption) for caption in captions])
            unknown = (self.keys.captions(ids, torch.arange(len(captions)), texts) == UNKNOWN).nonzero()
            looked_up += 1
            if len(unknown):
                missing, example = missing + 1, example or f"caption {int(unknown[0])} of {clip_id}"
        skipped = self.missing == "skip"
        return Coverage(shards.location, len(shards), missing, looked_up, example, skipped)

    def _names(self) -> str:
        return ", ".join(table.name for table in self.tables)

    def _unknown(self, what: str) -> UserError:
        return UserError(f"{what} is not in the teacher tables ({self._names()}): {REMEDY}, or {SKIP}")


def _mean_of_cosines(members: Sequence[EnsembleMember]) -> list[_Mean]:
    """One teacher: sum_m w_m C_m at the members' common temperature, or logits sum_m w_m C_m / tau_m."""
    shares, temperatures = _shares(members), {member.temperature for member in members}
    if len(temperatures) == 1:
        return [_Mean([(m.table, w) for m, w in zip(members, shares, strict=True)], 1.0, temperatures.pop())]
    assert None not in temperatures, "the configuration gives every member a temperature, or none"
    scaled = [(m.table, w / (m.temperature or 1.0)) for m, w in zip(members, shares, strict=True)]
    return [_Mean(scaled, 1.0, 1.0)]


def _mean_of_probabilities(members: Sequence[EnsembleMember]) -> list[_Mean]:
    return [_Mean([(m.table, 1.0)], w, m.temperature) for m, w in zip(members, _shares(members), strict=True)]


def _shares(members: Sequence[EnsembleMember]) -> list[float]:
    total = sum(member.weight for member in members)
    return [member.weight / total for member in members]


def _teacher(mean: _Mean, captions: Tensor, clips: Tensor, device: torch.device, world: World) -> Teacher[ScoreBlock]:
    tables = [table for table, _ in mean.tables]

    def block(direction: Direction) -> ScoreBlock:
        if all(table.is_dual_encoder for table in tables):
            return EmbeddingScores(*joined_embeddings(mean.tables, captions, clips, direction, device), world)
        parts = (factor * table.scores(captions, clips, direction, device) for table, factor in mean.tables)
        return StoredScores(torch.stack(list(parts)).sum(0), world)

    t2a = block("t2a")
    a2t = block("a2t") if any(table.differs_by_direction for table in tables) else t2a
    return Teacher(t2a, a2t, mean.weight, mean.temperature)


def joined_embeddings(
    tables: Sequence[tuple[TeacherTable, float]],
    captions: Tensor,
    clips: Tensor,
    direction: Direction = "t2a",
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """([c, d], [n, d]): embeddings whose products are the sums of factor * scores over the tables."""
    each = [(factor, *table.embeddings(captions, clips, direction, device)) for table, factor in tables]
    return torch.cat([factor * text for factor, text, _ in each], 1), torch.cat([audio for _, _, audio in each], 1)


def _describe(batch: Batch, row: int) -> str:
    place = batch.keys[row] if batch.keys else f"clip {int(batch.clip_ids[row])}"
    return f"caption {int(batch.caption_index[row])} of {place}"
