"""`atr-scale estimate`: writes one teacher table for each trained model and compares the models."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from atr_scale.batch import stable_id
from atr_scale.checkpoint import WEIGHTS, find_checkpoint, load_retriever
from atr_scale.config import RunConfig
from atr_scale.data import storage
from atr_scale.data.shard_reader import ShardSet, open_shards
from atr_scale.distributed.world import World
from atr_scale.errors import UserError
from atr_scale.evaluation.embed import embed, evaluating
from atr_scale.evaluation.parallel import Parallel
from atr_scale.evaluation.score import score
from atr_scale.files import sha256_of
from atr_scale.model import Retriever
from atr_scale.teachers.comparison import Comparison, compare_teachers
from atr_scale.teachers.tables import TeacherEnsemble, TeacherTable, shards_checksum
from atr_scale.version import __version__

logger = logging.getLogger(__name__)

IDENTITY = ("config", "weights_sha256", "shards_sha256")  # metadata that determines the values of a table


def write_teacher_tables(
    runs: Sequence[str],
    *,
    shards: str,
    out: Path,
    batch_size: int | None,
    plugins: Sequence[str] = (),
    world: World,
    device: torch.device,
) -> Comparison | None:
    """Write the teacher table of every run into the folder `out`, then compare them; all processes call this.

    runs: run folders or checkpoints. shards: location of the split. batch_size: clips embedded at once; default
    evaluation.batch_size of each run. plugins: modules that the configurations of the runs need.
    An existing table of the same weights and shards is kept. Returns the comparison on the main rank, None elsewhere.
    Raises UserError if a model or the shards do not exist, or if two models have the same name.
    """
    folders = _by_name(runs)
    opened = open_shards(shards)
    storage.make_folder(str(out))
    say = logger.info if world.is_main else logger.debug
    paths: list[Path] = []
    spent = 0.0
    for number, (name, folder) in enumerate(folders.items()):
        start = time.monotonic()
        paths.append(out / f"{name}.safetensors")
        metadata = _metadata(folder, opened)
        if world.gather_objects(world.is_main and _is_current(paths[-1], metadata))[0]:
            say("%s exists and is kept", paths[-1])
            continue
        say("model %d of %d: %s", number + 1, len(folders), name)
        model, config, _ = load_retriever(folder, plugins)
        if batch_size is not None:
            config.evaluation.batch_size = batch_size
        table = teacher_table(name, model.to(device), opened, config, Parallel(world, device), metadata)
        if world.is_main:
            table.save(out)
        spent += time.monotonic() - start
        left = tqdm.format_interval(spent / len(paths) * (len(folders) - len(paths)))
        say("%s is written, the others take about %s", paths[-1], left)
    if not world.is_main:
        return None
    tables = TeacherEnsemble.read(paths).tables
    comparison = compare_teachers(tables, f"{opened.corpus} {opened.split}".rstrip())
    about = {path.stem: {"run": run, **table.metadata} for path, run, table in zip(paths, runs, tables, strict=True)}
    for metadata in about.values():
        del metadata["config"]
    comparison.save(out, {"tables": about})
    return comparison


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


def _metadata(folder: Path, shards: ShardSet) -> dict[str, str]:
    config = folder / "config.resolved.yaml"
    if not config.is_file():
        raise UserError(f"{folder} has no config.resolved.yaml: give a run folder or one of its checkpoints/step-N")
    return {
        "config": config.read_text(encoding="utf-8"),
        "weights_sha256": sha256_of(folder / WEIGHTS),
        "shards": shards.location,
        "shards_sha256": shards_checksum(shards),
        "atr_scale": __version__,
    }


def _is_current(path: Path, metadata: dict[str, str]) -> bool:
    if not path.exists():
        return False
    try:
        found = TeacherTable.read(path).metadata
    except UserError as error:
        logger.warning("%s is written anew: %s", path, error)
        return False
    return all(found.get(key) == metadata[key] for key in IDENTITY)


def teacher_table(
    name: str, model: Retriever, shards: ShardSet, config: RunConfig, parallel: Parallel, metadata: dict[str, str]
) -> TeacherTable:
    """The teacher table of a model for a split, on every process; all of them call this.

    Raises UserError if a value is not finite, or if the shards hold a clip twice.
    """
    embedded = embed(model, shards, config, parallel)
    if model.scorer.is_dual_encoder:
        values = {"text": embedded.text.pooled, "audio": embedded.audio.pooled}
    else:
        with evaluating(model):
            batch_size = config.evaluation.batch_size
            scores = score(model.scorer, embedded.text, embedded.audio, batch_size=batch_size, parallel=parallel)
        values = {"scores": scores}
    values = {key: value.half() for key, value in values.items()}
    if not all(value.isfinite().all() for value in values.values()):
        raise UserError(f"the model {name} gives values that are not finite, it has diverged: give another checkpoint")
    ids = torch.tensor([stable_id(clip) for clip in embedded.clip_ids])
    if len(ids.unique()) < len(ids):
        raise UserError(f"{shards.location} holds a clip twice: build its shards with one sample for each clip")
    owner = torch.from_numpy(embedded.owner)
    first = torch.searchsorted(owner, torch.arange(len(ids)))
    index = torch.arange(len(owner)) - first[owner]
    return TeacherTable(name, ids, ids[owner], index, values, {**metadata, "scorer": config.model.scorer.name})
