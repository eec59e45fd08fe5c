"""Embeds a source, on any number of ranks, into F.npy or F.parquet.

`parts` says how the work is divided, and how a job that was killed goes on.

Shape suffixes: n items, d width of the embeddings.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from atr_scale.data.collate import pad
from atr_scale.data.dropped import DropLog, DroppedClip
from atr_scale.distributed.world import World
from atr_scale.errors import Failure, UserError, one_line
from atr_scale.evaluation.embed import as_read, load_ahead
from atr_scale.inference import TrainedModel
from atr_scale.locks import hold
from atr_scale.precision import encoder_products
from atr_scale.scorers import SCORERS
from atr_scale.search.parts import (
    PartResult,
    Plan,
    dropped_file,
    join_parts,
    missing_parts,
    taken_parts,
    write_part,
)
from atr_scale.search.progress import EmbeddingProgress
from atr_scale.search.sources import open_source
from atr_scale.search.spans import Reader, ReadSound
from atr_scale.search.vectors import Item, ModelId, checked_suffix, items_file, read_about

logger = logging.getLogger(__name__)


def embed_files(
    model: TrainedModel,
    run: str | Path,
    source: str | Path,
    out: str | Path,
    *,
    windows: float | None = None,
    world: World | None = None,
) -> None:
    """Embed the sounds of `source` into `out`, F.npy or F.parquet. All ranks call this.

    run: where `model` was loaded from. source: as for `open_source`. windows: seconds of the windows that each
    recording is cut into; by default a clip has one embedding, of its first data.evaluation_seconds. Sounds that
    cannot be used are left out and named in F.dropped.jsonl. Nothing is done if `out` is complete already. Raises
    UserError if the model has no embeddings, if `out` holds those of another model or source, or if no sound can be
    used.
    """
    world = world or World()
    out = checked_suffix(os.path.abspath(out))
    need_embeddings(model, run)
    if windows is not None and not 0.1 <= windows < float("inf"):
        raise UserError(f"windows of {windows:g} s: give at least 0.1 s")
    plan = Plan.of(model, ModelId.of(run, model), open_source(source), windows)
    if len(set(world.gather_objects(plan.digest))) > 1:
        raise Failure(f"{source} is not the same on all ranks, or is changing: start the same command again")
    folder = out.with_name(f"{out.name}.parts")
    if world.from_main(lambda: _is_complete(out, plan)):
        logger.info("%s is complete: nothing to do", out)
        return
    world.from_main(lambda: _make(folder))
    lock = hold(folder / ".lock", f"the folder {folder}") if world.is_main else nullcontext()
    with on_disk(out), lock:
        todo = world.from_main(lambda: missing_parts(plan, folder))
        log, progress = DropLog(dropped_file(out).name), EmbeddingProgress(plan, todo, world)
        reader = Reader(plan.source, model.sample_rate, plan.settings["seconds"], windows)
        for number in taken_parts(todo, plan.digest, world):
            progress.begin(number)
            write_part(plan.file(folder, number), _embed_part(model, reader, plan.parts[number], progress, log))
        progress.close()
        world.barrier()
        world.from_main(lambda: join_parts(plan, folder, out))
    world.barrier()


def need_embeddings(model: TrainedModel, run: str | Path) -> None:
    """Raises UserError if the model is a pairwise scorer."""
    if model.module.scorer.is_dual_encoder:
        return
    makers = {name: getattr(maker, "func", maker) for name, maker in SCORERS.items()}  # of a partial, its class
    able = ", ".join(name for name, maker in makers.items() if getattr(maker, "is_dual_encoder", False))
    raise UserError(
        f"{run}: its scorer {model.config.model.scorer.name} is pairwise, so a sound alone has no embedding: take a "
        f"run of another scorer ({able}), and re-rank what it finds with this one (`atr-scale search --rerank`)"
    )


def _is_complete(out: Path, plan: Plan) -> bool:
    """Whether `out` is the result of this plan. Raises UserError if it is something else that must not be lost."""
    found = read_about(out)
    beside = (out, items_file(out), out.with_suffix(".json")) if out.suffix == ".npy" else (out,)
    if found is None:
        for path in beside:
            if path.exists() and not _is_unfinished(out):
                raise UserError(
                    f"{path} is there, and not complete or not of `embed`: choose another --out, or remove it"
                )
        return False
    model, about = found
    if about.get("digest") == plan.digest and about.get("source") == plan.source.location:
        return True
    differences = [
        f"{name} {was}, not {now}"
        for name, was, now in (
            ("the model", model, plan.model),
            ("the source", about.get("source"), plan.source.location),
            ("windows of", about.get("windows"), plan.windows),
        )
        if (not was.same(now) if isinstance(was, ModelId) and isinstance(now, ModelId) else was != now)
    ]
    if differences:
        raise UserError(f"{out} is there with {'; '.join(differences)}: choose another --out, or remove it")
    logger.warning("%s has changed since %s was written: what has changed is embedded again", plan.source.location, out)
    return False


def _is_unfinished(out: Path) -> bool:
    """Whether the parts of an earlier start are there: then the files were left by a kill while they were joined."""
    return out.with_name(f"{out.name}.parts").is_dir()


@contextmanager
def on_disk(out: Path) -> Iterator[None]:
    """A disk that is full or gone is one line."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise Failure(f"cannot write {out} ({reason}): start the same command again; what is done is kept") from None


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create {folder} ({error.strerror}): choose another --out") from None


@torch.no_grad()
def _embed_part(
    model: TrainedModel, reader: Reader, part: range, progress: EmbeddingProgress, log: DropLog
) -> PartResult:
    batch_size = model.config.evaluation.batch_size
    waiting: list[ReadSound] = []
    found: list[NDArray[np.float32]] = [np.zeros((0, model.module.audio_projection.dim), np.float32)]
    items: list[Item] = []
    dropped: list[DroppedClip] = []
    cut = 0

    def drop(clip: DroppedClip) -> None:
        dropped.append(clip)
        log.add([clip])

    def flush() -> None:
        waveform, lengths = pad([sound.waveform for sound in waiting])
        with encoder_products(model.module.tf32):
            encoded = model.module.encode_audio(waveform.to(model.device), lengths)
        vectors = as_read(model.module.scorer, encoded, "audio").pooled.float().numpy()
        finite = np.isfinite(vectors).all(1)
        found.append(vectors[finite])
        for sound, usable in zip(waiting, finite.tolist(), strict=True):
            if usable:
                items.append(sound.item)
            else:
                drop(DroppedClip(sound.item.id, sound.item.path, "nonfinite_embedding", ""))
            progress.add(sound.clips, sound.bytes)
        waiting.clear()

    for result in load_ahead(lambda task: task(), reader.tasks(part)):
        for sound in result:
            if isinstance(sound, DroppedClip):
                drop(sound)
                continue
            cut += sound.cut
            waiting.append(sound)
            if len(waiting) == batch_size:
                flush()
    if waiting:
        flush()
    return PartResult(np.concatenate(found), items, dropped, cut)
