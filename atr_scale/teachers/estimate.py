"""`atr-scale estimate`: writes one teacher table for each trained model and compares the models."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from atr_scale.batch import TokenSequence, stable_id
from atr_scale.checkpoint import find_checkpoint, load_retriever, read_config
from atr_scale.config import RunConfig
from atr_scale.data import storage
from atr_scale.data.shard_reader import ShardSet, open_shards
from atr_scale.distributed.world import World
from atr_scale.errors import UserError
from atr_scale.evaluation.embed import Embedded, embed, evaluating
from atr_scale.evaluation.parallel import Parallel
from atr_scale.evaluation.score import score
from atr_scale.files import sha256_of
from atr_scale.model import Retriever
from atr_scale.precision import Precision, Products
from atr_scale.run_checkpoints import WEIGHTS
from atr_scale.teachers.comparison import TeacherComparison, compare_teachers
from atr_scale.teachers.cross_fit import by_fold, cross_fitted
from atr_scale.teachers.sizes import check_sizes
from atr_scale.teachers.tables import Source, TeacherTable, same_keys, shards_checksum
from atr_scale.teachers.top_k import best_scores
from atr_scale.version import __version__

logger = logging.getLogger(__name__)

# Metadata that, with the shards, determines the values of a table, with what tables of version 0.3 do not say.
IDENTITY = {"config": "", "weights_sha256": "", "top_k": "", "precision": "fp32"}


def write_teacher_tables(
    runs: Sequence[str],
    *,
    shards: Sequence[str],
    out: Path,
    batch_size: int | None = None,
    top_k: int | None = None,
    cross_fit: bool = False,
    precision: Products | None = None,
    plugins: Sequence[str] = (),
    world: World,
    device: torch.device,
) -> TeacherComparison | None:
    """Write the teacher table of every run into the folder `out`, then compare them; all processes call this.

    runs: run folders or checkpoints. shards: locations of the shard sets that each table covers. batch_size: clips
    embedded at once; default evaluation.batch_size of each run. top_k: best scores that the table of a pairwise scorer
    keeps for every caption and every clip; default, all scores. cross_fit: join the tables to one in which every query
    has the scores of the run that left out its fold. precision: of the encoders, default that of each run. plugins:
    modules that the configurations of the runs need.
    An existing table of the same weights, shards and precision is kept. Returns the comparison on the main rank, None
    elsewhere. Raises UserError if a model or the shards do not exist, if two models have the same name, if the tables
    do not fit into memory or on the disk, or if the folds of cross-fitted runs do not complement each other.
    """
    folders = _by_name(runs)
    configs = {name: read_config(folder, plugins) for name, folder in folders.items()}
    if cross_fit:
        configs = by_fold(configs)
        folders = {name: folders[name] for name in configs}
    opened = [open_shards(place) for place in shards]
    storage.make_folder(str(out))
    check_sizes(configs, opened, out, top_k, 1 if cross_fit else 0, world)
    paths = [out / f"{name}.safetensors" for name in folders]
    spent, made = 0.0, 0
    for number, (name, folder) in enumerate(folders.items()):
        start = time.monotonic()
        train = configs[name].train
        chosen = Precision(train.precision, train.tf32).instead(precision)
        path, metadata = paths[number], _metadata(folder, top_k, chosen.products(device))
        if world.gather_objects(world.is_main and _is_current(path, metadata, opened))[0]:
            _say(world, "%s exists and is kept", path)
            continue
        _say(world, "model %d of %d: %s", number + 1, len(folders), name)
        model, config, _ = load_retriever(folder, plugins, precision)
        _say(world, "%s", chosen.describe(device, train.head_products))
        if batch_size is not None:
            config.evaluation.batch_size = batch_size
        table = teacher_table(name, model.to(device), opened, config, Parallel(world, device), metadata, top_k)
        if world.is_main:
            table.save(out)
        spent, made = spent + time.monotonic() - start, made + 1
        others = len(folders) - number - 1
        left = f", the others take about {tqdm.format_interval(spent / made * others)}" if others else ""
        _say(world, "%s is written%s", path, left)
    if not world.is_main:
        return None
    tables = [TeacherTable.read(path) for path in paths]
    same_keys(tables)
    if cross_fit:
        tables = [TeacherTable.read(cross_fitted(tables, opened).save(out))]
    comparison = compare_teachers(tables, ", ".join(f"{s.corpus} {s.split}".rstrip() for s in opened))
    about = {table.name: {k: v for k, v in table.metadata.items() if k != "config"} for table in tables}
    comparison.save(out, {"runs": list(runs), "tables": about})
    return comparison


def _say(world: World, line: str, *values: object) -> None:
    logger.log(logging.INFO if world.is_main else logging.DEBUG, line, *values)


def _by_name(runs: Sequence[str]) -> dict[str, Path]:
    """The checkpoint folder of each run, by the name of its run folder. UserError if two have the same name."""
    found: dict[str, Path] = {}
    for run in runs:
        folder = find_checkpoint(run)
        name = folder.parent.parent.name if folder.parent.name == "checkpoints" else folder.name
        if name in found:
            raise UserError(
                f"{run} and {found[name]} would both write the teacher table {name}: give models of different runs, or "
                "each its own --out"
            )
        found[name] = folder
    return found


def _metadata(folder: Path, top_k: int | None, products: Products) -> dict[str, str]:
    config = folder / "config.resolved.yaml"
    return {
        "config": config.read_text(encoding="utf-8"),
        "weights_sha256": sha256_of(folder / WEIGHTS),
        "top_k": str(top_k or ""),
        "precision": products,
        "atr_scale": __version__,
    }


def _is_current(path: Path, metadata: dict[str, str], shards: Sequence[ShardSet]) -> bool:
    if not path.exists():
        return False
    try:
        found = TeacherTable.read(path)
    except UserError as error:
        logger.warning("%s is written anew: %s", path, error)
        return False
    same = all(found.metadata.get(key, default) == metadata[key] for key, default in IDENTITY.items())
    return same and [source.sha256 for source in found.sources] == [shards_checksum(each) for each in shards]


def teacher_table(
    name: str,
    model: Retriever,
    shards: Sequence[ShardSet],
    config: RunConfig,
    parallel: Parallel,
    metadata: dict[str, str],
    top_k: int | None = None,
) -> TeacherTable:
    """The teacher table of a model for some shard sets, on every process; all of them call this.

    Raises UserError if a value is not finite, or if one of the shard sets holds a clip twice.
    """
    parts = [embed(model, each, config, parallel) for each in shards]
    keys = TableRows.of(parts, shards)
    text, audio = (TokenSequence.cat([getattr(part, side) for part in parts]) for side in ("text", "audio"))
    audio = audio.take(keys.audio)
    if model.scorer.is_dual_encoder:
        values = {"text": text.pooled, "audio": audio.pooled}
    else:
        batch_size = config.evaluation.batch_size
        with evaluating(model):
            if top_k is not None:
                values = best_scores(model.scorer, text, audio, top_k, batch_size=batch_size, parallel=parallel)
            else:
                values = {"scores": score(model.scorer, text, audio, batch_size=batch_size, parallel=parallel)}
    values = {key: value.half() if value.is_floating_point() else value for key, value in values.items()}
    if not all(value.isfinite().all() for value in values.values()):
        raise UserError(f"the model {name} gives values that are not finite, it has diverged: give another checkpoint")
    about = {**metadata, "sources": json.dumps(keys.sources), "scorer": config.model.scorer.name}
    return TeacherTable(name, keys.clip_ids, keys.caption_clip, keys.caption_index, values, about, keys.caption_text)


@dataclass(frozen=True)
class TableRows:
    """The rows of a table of several shard sets. audio: [N] int64, which of all embedded clips they are.

    A clip that several sets have, AudioCaps and WavCaps for example, has the audio of the first one and the captions of
    all. The other fields are those of `TeacherTable`; sources: one for each set.
    """

    audio: torch.Tensor
    clip_ids: torch.Tensor
    caption_clip: torch.Tensor
    caption_index: torch.Tensor
    caption_text: torch.Tensor
    sources: list[Source]

    @staticmethod
    def of(parts: Sequence[Embedded], shards: Sequence[ShardSet]) -> TableRows:
        """Of the embedded shard sets. Raises UserError if one set holds a clip twice."""
        seen: set[str] = set()
        audio: list[int] = []
        sources: list[Source] = []
        first = 0
        for part, each in zip(parts, shards, strict=True):
            for name, count in Counter(part.clip_ids).items():
                if count > 1:
                    raise UserError(
                        f"{each.location} holds the clip {name} twice: build its shards with one sample for each clip"
                    )
            new = [row for row, name in enumerate(part.clip_ids) if name not in seen]
            seen.update(part.clip_ids)
            audio += [first + row for row in new]
            kept = [part.index[row] for row in new]
            dropped = np.setdiff1d(np.arange(len(each)), kept).tolist()
            shared = len(part.clip_ids) - len(new)
            sources.append(Source(each.location, shards_checksum(each), len(new), dropped, shared))
            first += len(part.clip_ids)
        ids = torch.tensor([stable_id(name) for part in parts for name in part.clip_ids])
        owners = np.cumsum([0, *(len(part.clip_ids) for part in parts)])
        caption_clip = torch.cat([ids[start + part.owner] for start, part in zip(owners, parts, strict=False)])
        texts = [stable_id(caption) for part in parts for caption in part.captions]
        return TableRows(
            torch.tensor(audio), ids[audio], caption_clip, _number_within(caption_clip), torch.tensor(texts), sources
        )


def _number_within(groups: torch.Tensor) -> torch.Tensor:
    """[n] int64: how many earlier elements of `groups` [n] have the same value."""
    ordered, place = torch.sort(groups, stable=True)
    numbers = torch.empty_like(groups)
    numbers[place] = torch.arange(len(groups)) - torch.searchsorted(ordered, ordered)
    return numbers
