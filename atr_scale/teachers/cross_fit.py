"""Cross-fitted teachers: every query has soft labels of a model that was not trained on its clip.

Member f is trained without the clips of fold f (`data.folds`). t2a targets of a caption in fold f, and a2t targets of a
clip in fold f, come from member f, which scores the candidates of all folds.

Shape suffixes: C captions, N clips, F folds, d width.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from atr_scale.config import RunConfig
from atr_scale.data.folds import fold_of
from atr_scale.data.shard_reader import ShardSet
from atr_scale.errors import UserError
from atr_scale.teachers.tables import BEST, EMBEDDINGS, SCORES, TeacherTable

logger = logging.getLogger(__name__)

NAME = "cross_fit"


def by_fold(configs: dict[str, RunConfig]) -> dict[str, RunConfig]:
    """The configurations of runs by name, in the order of the folds that they left out.

    Raises UserError if the runs do not leave out each fold of the same division once.
    """
    found: dict[int, str] = {}
    for name, config in configs.items():
        folds = config.data.folds
        if folds is None:
            raise UserError(
                f"{name} was trained on all clips (data.folds is null): --cross-fit needs runs that each left out one "
                "fold, for example data.folds={count: 2, held_out: 0}"
            )
        if folds.count != len(configs) or folds.held_out in found:
            given = ", ".join(f"{other} {c.data.folds and c.data.folds.model_dump()}" for other, c in configs.items())
            raise UserError(f"the folds of the runs do not complement each other ({given}): give one run for each fold")
        found[folds.held_out] = name
        if config.train.initial_checkpoint is not None:
            logger.warning(
                "%s started from train.initial_checkpoint=%s: its targets are out-of-fold only if that was not trained "
                "on fold %d", name, config.train.initial_checkpoint, folds.held_out,
            )  # fmt: skip
    return {name: configs[name] for _, name in sorted(found.items())}


def cross_fitted(tables: Sequence[TeacherTable], shards: Sequence[ShardSet]) -> TeacherTable:
    """One table from those of the members, in the order of the folds that they left out, for these shard sets.

    Raises UserError if the members hold values of different kinds, or if two shard sets share clips: the fold of a clip
    follows from the key of its sample, so a member may have been trained on the other sample.
    """
    for source in tables[0].sources:
        if source.shared:
            raise UserError(
                f"{source.location} shares {source.shared} clips with the shards before it, which may be in another "
                "fold there: estimate with --cross-fit from shard sets without common clips"
            )
    kinds = {frozenset(table.values) for table in tables}
    if len(kinds) > 1:
        names = ", ".join(table.name for table in tables)
        raise UserError(f"{names} are dual encoders and pairwise scorers: cross-fitting needs members of one kind")
    kind, count = kinds.pop(), len(tables)
    clip_fold = _clip_folds(tables[0], shards, count)
    caption_fold = clip_fold[tables[0].keys.caption_clip_row]
    if kind == EMBEDDINGS:
        values = {side: _stacked([table.values[side] for table in tables]) for side in sorted(EMBEDDINGS)}
        values["clip_fold"] = clip_fold
    elif kind == SCORES:
        scores = [table.values["scores"] for table in tables]
        values = {"scores": _of_fold(scores, caption_fold), "scores_a2t": _of_fold([x.T for x in scores], clip_fold).T}
    else:
        assert kind == BEST, kind
        fold_of_side = {"caption": caption_fold, "clip": clip_fold}
        values = {
            name: _of_fold([table.values[name] for table in tables], fold_of_side[name.split("_")[0]])
            for name in sorted(BEST)
        }
    about = {
        "members": json.dumps({table.name: table.metadata.get("weights_sha256") for table in tables}),
        "sources": json.dumps(tables[0].sources),
    }
    return replace(tables[0], name=NAME, values=values, metadata=about)


def _clip_folds(table: TeacherTable, shards: Sequence[ShardSet], count: int) -> Tensor:
    """[N] int64: the fold of every clip of a table of these shards."""
    folds = []
    for each, source in zip(shards, table.sources, strict=True):
        kept = torch.ones(len(each), dtype=torch.bool)
        kept[source.dropped] = False
        folds.append(torch.from_numpy(fold_of(each.keys, count))[kept])
    return torch.cat(folds)


def _of_fold(members: Sequence[Tensor], folds: Tensor) -> Tensor:
    """Row i of member folds[i]."""
    out = torch.empty_like(members[0])
    for fold, member in enumerate(members):
        out[folds == fold] = member[folds == fold]
    return out


def _stacked(members: Sequence[Tensor]) -> Tensor:
    """[rows, F, d]; narrower members are filled with zeros, which changes no product."""
    width = max(member.shape[1] for member in members)
    return torch.stack([pad(member, (0, width - member.shape[1])) for member in members], 1)
