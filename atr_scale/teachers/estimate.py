"""`atr-scale estimate`: the scores that trained models give a split, one table a model, and how the models compare."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from atr_scale.batch import stable_id
from atr_scale.checkpoint import WEIGHTS, find_checkpoint, load_retriever
from atr_scale.data import storage
from atr_scale.data.shard_reader import ShardSet, open_shards
from atr_scale.data.tokenizer import caption_tokenizer
from atr_scale.distributed.world import World
from atr_scale.errors import UserError
from atr_scale.evaluation.embed import embed
from atr_scale.evaluation.score import score
from atr_scale.files import sha256_of
from atr_scale.teachers.comparison import Comparison, compare_teachers
from atr_scale.teachers.tables import TeacherEnsemble, TeacherTable, shards_checksum
from atr_scale.version import __version__

logger = logging.getLogger(__name__)

IDENTITY = ("config", "weights_sha256", "shards_sha256")  # a table that has these is this model's on this split


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
    """Write one table of teacher scores a run into `out`, then compare them; all ranks call this.

    runs: run folders or checkpoints. shards: the split. batch_size: clips embedded at once, default each run's own.
    plugins: modules that the runs' configurations need.
    A table that is there is kept where it is of the same weights and shards. Returns the comparison on the main rank.
    Raises UserError where a model or the shards are not there, or where two models would have one name.
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
            say("%s is there and is kept", paths[-1])
            continue
        say("model %d of %d: %s", number + 1, len(folders), name)
        table = _table(name, folder, opened, metadata, batch_size, plugins, world, device)
        if world.is_main:
            table.save(out)
        spent += time.monotonic() - start
        left = tqdm.format_interval(spent / len(paths) * (len(folders) - len(paths)))
        say("%s written, ETA of the others %s", paths[-1], left)
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
    """The checkpoint folder of each run, by the name of its run folder. UserError where two have the same name."""
    found: dict[str, Path] = {}
    for run in runs:
        folder = find_checkpoint(run)
        name = folder.parent.parent.name if folder.parent.name == "checkpoints" else folder.name
        if name in found:
            raise UserError(
                f"{run} and {found[name]} would both be the table {name}: give models of different runs, or --out each"
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


def _table(
    name: str,
    folder: Path,
    shards: ShardSet,
    metadata: dict[str, str],
    batch_size: int | None,
    plugins: Sequence[str],
    world: World,
    device: torch.device,
) -> TeacherTable:
    """What the model in `folder` says of a split, on every rank."""
    model, config, _ = load_retriever(folder, plugins)
    model.to(device).eval()
    batch_size = batch_size or config.evaluation.batch_size
    embedded = embed(
        model,
        shards,
        caption_tokenizer(model.text_encoder.tokenizer, config.data.captions),
        batch_size=batch_size,
        seconds=config.data.evaluation_seconds,
        world=world,
        device=device,
    )
    if embedded.dropped:
        logger.warning("%s: unreadable and left out: %s", shards.location, dict(embedded.dropped))
    if model.scorer.is_dual_encoder:
        values = {"text": embedded.text.pooled, "audio": embedded.audio.pooled}
    else:
        scores = score(model.scorer, embedded.text, embedded.audio, batch_size=batch_size, world=world, device=device)
        values = {"scores": scores}
    values = {key: value.half() for key, value in values.items()}
    if not all(value.isfinite().all() for value in values.values()):
        raise UserError(f"{folder} gives values that are not finite, for it has diverged: give another checkpoint")
    ids = torch.tensor([stable_id(clip) for clip in embedded.clip_ids])
    if len(ids.unique()) < len(ids):
        raise UserError(f"{shards.location} holds a clip twice: build its shards with one sample a clip")
    owner = torch.from_numpy(embedded.owner)
    first = torch.searchsorted(owner, torch.arange(len(ids)))
    index = torch.arange(len(owner)) - first[owner]
    return TeacherTable(name, ids, ids[owner], index, values, {**metadata, "scorer": config.model.scorer.name})
