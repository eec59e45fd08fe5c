"""Checks of a run before its model is built: batch sizes, run folder, and the checkpoint that it continues."""

from __future__ import annotations

import logging
import math
import os
import tempfile
from pathlib import Path
from typing import Any

from atr_scale import checkpoint, run_checkpoints
from atr_scale.config import RunConfig
from atr_scale.config_train import MODEL_PARTS
from atr_scale.distributed.world import World
from atr_scale.errors import UserError
from atr_scale.training.fingerprints import INPUTS, without_places
from atr_scale.training.optimizer_state import OLD_FOLDER

logger = logging.getLogger(__name__)

SOCKET_PATH = 107  # bytes, in Linux
# Keys that may differ when a run is resumed. Any other difference would make it another run.
FREE_TO_CHANGE = (
    "monitor", "run.dir", "run.allow_changed_data", "data.workers", "data.buffer_gb", "data.validation", "data.test",
    "data.max_drop_rate", "data.outage_seconds", "evaluation.",
    "train.steps", "train.epochs",
    "train.zero_stage", "train.micro_batch_size", "train.kept_chunks", "train.evaluate_every", "train.checkpoint_every",
    "train.keep_checkpoints", "train.log_every", "train.max_bad_steps", "train.hang_seconds", "train.profile",
    "train.initial_checkpoint", "model.audio.attention", "model.text.attention",
)  # fmt: skip


def check_batch_size(config: RunConfig, world_size: int) -> None:
    """UserError if the global batch cannot be divided among the ranks, or a local batch must not be cut."""
    train = config.train
    batch = train.global_batch_size
    if batch % world_size:
        raise UserError(
            f"train.global_batch_size = {batch} does not divide among {world_size} ranks: start "
            f"{_numbers_that_fit(batch, world_size)}, with any of which a run in progress goes on too, or set it to "
            f"a multiple in a new run, for example {-(-batch // world_size) * world_size}"
        )
    local = batch // world_size
    micro = train.micro_batch_size or local
    if micro < local and config.model.audio.batch_norm == "local":
        raise UserError(
            f"model.audio.batch_norm is local, but train.micro_batch_size = {micro} cuts the local batch of {local} "
            "pairs into chunks with statistics of their own: set it to frozen, or train.micro_batch_size to null"
        )


def _numbers_that_fit(batch: int, ranks: int) -> str:
    """The largest numbers of ranks below `ranks` and the next one above it that divide a batch."""
    fit = [number for number in range(1, batch + 1) if batch % number == 0]
    below, above = [n for n in fit if n < ranks][-3:], [n for n in fit if n > ranks][:1]
    *others, last = map(str, below + above)
    return f"{', '.join(others)} or {last}" if others else last


def check_temporary_folder(workers: int) -> None:
    """UserError if loader workers cannot be started: the path of their socket in TMPDIR would be too long."""
    folder = tempfile.gettempdir()
    longest = SOCKET_PATH - len("/pymp-12345678/listener-12345678") if workers else math.inf
    if len(os.fsencode(folder)) > longest:
        raise UserError(
            f"TMPDIR={folder} is longer than the {longest} bytes that the sockets of loader workers leave for it: set "
            "TMPDIR to a shorter path, for example /tmp, or data.workers to 0"
        )


def check_run_folder(folder: Path) -> None:
    """Create the run folder. UserError if it cannot be created or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the run folder {folder} cannot be made ({error.strerror}): give another run.dir") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"the run folder {folder} is not writable: give another run.dir")


def checkpoint_to_resume(config: RunConfig, world: World) -> Path | None:
    """The checkpoint that a run continues, None if it starts anew. All ranks call this and get the same answer.

    Sets broken checkpoints aside, and mends the links of the run folder. Sets train.micro_batch_size if that is needed.

    UserError if the run folder's checkpoint is of another configuration or if all are damaged.
    """
    run_dir = config.run.folder

    def newest() -> Path | None:
        run_checkpoints.remove_partial(run_dir)
        return run_checkpoints.newest_sound(run_dir)

    newest_here = world.from_main(newest)
    found = newest_here and run_dir / "checkpoints" / newest_here.name  # the folder may have another path on each node
    if found is not None:
        _check_same_run(config, found, world.size)
        _keep_forward_size(config, found, world.size)
    if world.is_main:
        if found is not None:
            run_checkpoints.set_aside(run_dir, found)
        run_checkpoints.mend(run_dir, config.evaluation.select)
    return found


def _keep_forward_size(config: RunConfig, folder: Path, world_size: int) -> None:
    """Set train.micro_batch_size if it is null and fewer ranks go on from a checkpoint, whose parts of the batch are
    larger: one forward pass then holds no more pairs than it did, and needs no more memory.
    """
    train, saved = config.train, checkpoint.read_config(folder, config.plugins).train
    before = train.global_batch_size // checkpoint.read_state(folder)["world_size"]
    before = min(before, saved.micro_batch_size or before)
    if train.micro_batch_size is None and train.global_batch_size // world_size > before:
        if config.model.audio.batch_norm == "local":
            return  # its statistics are those of the forward pass
        train.micro_batch_size = before
        logger.info(
            "%d ranks have %d pairs each: train.micro_batch_size is %d, as many as a forward pass held before; set it "
            "for another number", world_size, train.global_batch_size // world_size, before,
        )  # fmt: skip


def check_length(config: RunConfig, folder: Path, steps: int) -> None:
    """UserError if a run of `steps` optimizer steps is shorter than what its checkpoint in `folder` has behind it."""
    made, train = checkpoint.read_state(folder)["step"], config.train
    if steps < made:
        asked = f"train.steps = {steps}" if train.steps else f"train.epochs = {train.epochs}, which is {steps} steps"
        raise UserError(
            f"{config.run.dir} has made {made} optimizer steps, more than {asked}: ask for at least as many, or give "
            "another run.dir"
        )


def _check_same_run(config: RunConfig, folder: Path, world_size: int) -> None:
    saved = checkpoint.read_config(folder, config.plugins)
    state = checkpoint.read_state(folder)
    before, now = saved.model_dump(mode="json"), config.model_dump(mode="json")
    if INPUTS in state:  # then not their places but their fingerprints are compared
        before, now = without_places(before), without_places(now)
    changed = differences(before, now)
    if changed:
        raise UserError(
            f"{config.run.dir} was trained with another configuration ({'; '.join(changed)}): "
            "restore these values, or give another run.dir"
        )
    if (folder / OLD_FOLDER).is_dir():
        old = state["world_size"], saved.train.zero_stage
        if old != (world_size, config.train.zero_stage) and (old[1], config.train.zero_stage) != (0, 0):
            raise UserError(
                f"{folder} is of version 0.5 or older, with the optimizer state of ZeRO {old[1]} on {old[0]} ranks, "
                f"not of ZeRO {config.train.zero_stage} on {world_size}: let it save once as it was, or give another "
                f"run.dir with 'train.initial_checkpoint={{from: {folder}, parts: [{', '.join(MODEL_PARTS)}]}}'"
            )


def differences(saved: dict[str, Any], current: dict[str, Any], prefix: str = "") -> list[str]:
    """Keys whose values differ between two configurations, with both values, except those in FREE_TO_CHANGE."""
    found = []
    for key in sorted({*saved, *current}):
        name, old, new = f"{prefix}{key}", saved.get(key), current.get(key)
        if name.startswith(FREE_TO_CHANGE):
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{name}.")
        elif isinstance(old, list) and isinstance(new, list) and all(isinstance(each, dict) for each in old + new):
            if len(old) != len(new):
                found.append(f"{name} had {len(old)} entries, now {len(new)}")
            for number, (was, now) in enumerate(zip(old, new, strict=False)):
                found += differences(was, now, f"{name}[{number}].")
        elif old != new:
            found.append(f"{name} was {old}, now {new}")
    return found
