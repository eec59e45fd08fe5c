"""The start of training in a run folder on S3: the lock, and a local folder that holds what the run goes on from.

The bucket is the run. What is left in the local folder counts if nobody has gone on with the run elsewhere since: then
it may be newer, and is uploaded first. Else it is removed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar, cast

from atr_scale.data.outage import STORE
from atr_scale.data.storage import join, retried
from atr_scale.distributed.world import World
from atr_scale.errors import Failure, OneLineError, UserError, one_line
from atr_scale.files import full_disk_in_one_line
from atr_scale.rank_signs import float_in
from atr_scale.remote.fetch import CHECKPOINTS, RemoteRun
from atr_scale.remote.lock import RemoteLock
from atr_scale.remote.mirror import UPLOADED, Mirror
from atr_scale.remote.nodes import TOKEN, SharedBy
from atr_scale.remote.objects import get_bytes
from atr_scale.remote.places import SCRATCH, address_of, training_folder
from atr_scale.run_checkpoints import MANIFEST, SCORE, newest_first, step_of, verify
from atr_scale.run_files import ATTEMPTS, PREEMPTED, STATUS, read_json_lines, read_json_object

logger = logging.getLogger(__name__)

T = TypeVar("T")
CLOCKS_APART_S = 60.0  # that of the store and ours


@contextlib.contextmanager
def mirrored(location: str, world: World, outage_s: float) -> Iterator[Mirror | None]:
    """The uploads of a run on S3, whose local folder is ready; None for a local one. All ranks call this.

    outage_s: for which the start waits for the store. Raises UserError on all ranks if another training uses the run,
    or if the bucket or the local folder cannot be written to.
    """
    address = address_of(location)
    if address is None:
        yield None
        return
    folder, lock = training_folder(location), RemoteLock(address) if world.is_main else None
    with contextlib.ExitStack() as held:
        with STORE.waiting_with(outage_s, lambda _: contextlib.nullcontext()):
            _on_all(world, lambda: _take(lock, held))
            _on_all(world, lambda: _make(folder))
            mirror = Mirror(address, folder, world, SharedBy.find(folder, world), lock)
            chosen = _on_all(world, lambda: _prepare(address, folder, mirror) if world.is_main else None)
            _on_all(world, lambda: _follow(address, folder, mirror, chosen) if mirror.leads else None)
        if world.is_main:
            logger.info("%s: trains in %s, uploads behind training", address, folder)
        held.callback(mirror.close)
        yield mirror


def _on_all(world: World, work: Callable[[], T]) -> T:
    """What `work` returns on the main rank, on all ranks, which raise what one of them raises."""
    made: T | OneLineError
    try:
        made = work()
    except OneLineError as error:
        made = error
    except OSError as error:
        made = Failure(f"the run folder cannot be made ready: {one_line(error)}")
    found = world.gather_objects(made)
    for each in found:
        if isinstance(each, OneLineError):
            raise each
    return cast(T, found[0])


def _take(lock: RemoteLock | None, held: contextlib.ExitStack) -> None:
    if lock is not None:
        held.enter_context(lock)


def _make(folder: Path) -> None:
    with full_disk_in_one_line(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / TOKEN).touch()
        except OSError as error:
            raise UserError(
                f"the local folder {folder} cannot be written to ({error.strerror}): set {SCRATCH} to a folder on a "
                "disk of this node"
            ) from None


def _prepare(address: str, folder: Path, mirror: Mirror) -> str | None:
    """On the main rank: make its folder the run's, and return the name of the checkpoint that the run goes on from."""
    run = RemoteRun(address)
    mirror.knows(run)
    for path in newest_first(folder):
        if path.name not in run.checkpoints() and not (path / MANIFEST).is_file():
            shutil.rmtree(path, ignore_errors=True)  # other nodes had not uploaded their files, or a download was cut
    if _went_on_elsewhere(run, folder):
        _empty(folder)
    elif _local_is_newer(run, folder):
        retried(mirror.upload, address)
        run = RemoteRun(address)
    with full_disk_in_one_line(folder):
        if run.is_run:  # and not a prefix with other objects
            run.bring([name for name in run.files() if name != PREEMPTED and _is_older(folder / name, run)], folder)
        _bring_signs(run, folder)
        for name in run.checkpoints():
            target = folder / CHECKPOINTS / name
            faults = run.bring_checkpoint(f"{CHECKPOINTS}/{name}", target)
            if not faults:
                break
            logger.warning("%s/%s/%s is broken (%s): trying the one before it", address, CHECKPOINTS, name, faults[0])
        else:
            if run.checkpoints():
                raise UserError(
                    f"all {len(run.checkpoints())} checkpoints of {address} are broken: give another run.dir"
                )
            return None
        mirror.goes_on_from(name)
        _bring_scores(run, folder, name)
    return name


def _went_on_elsewhere(run: RemoteRun, folder: Path) -> bool:
    """Whether the bucket tells of an attempt that the local folder does not know, or is another run."""
    here = read_json_lines(folder / ATTEMPTS)
    content = retried(lambda: get_bytes(join(run.address, ATTEMPTS)), run.address)
    there = []
    for line in (content or b"").splitlines():
        with contextlib.suppress(ValueError):
            there.append(json.loads(line))
    if not there:  # nothing was ever uploaded, or the run was deleted there
        return not here or (folder / UPLOADED).exists()
    return not all(line in here for line in there)


def _is_older(path: Path, run: RemoteRun) -> bool:
    """Whether a local file is missing, or older than what `evaluate` has uploaded since. Of records it never is."""
    if not path.exists():
        return True
    there, here = run.objects.get(path.name), path.stat()
    if there is None or path.suffix == ".jsonl":
        return False
    return there.size != here.st_size and there.changed > here.st_mtime + CLOCKS_APART_S


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _local_is_newer(run: RemoteRun, folder: Path) -> bool:
    """Whether the folder has a sound checkpoint that was not uploaded before its process ended.

    Of older ones it may have the files of this node's ranks alone.
    """
    newest = max(map(step_of, run.checkpoints()), default=-1)
    try:
        return any(step_of(path.name) > newest and not verify(path) for path in newest_first(folder))
    except UserError:  # one cannot be read
        return False


def _bring_signs(run: RemoteRun, folder: Path) -> None:
    """The signs of life of ranks on other nodes: they say why the attempt before has ended."""
    for name in run.files():
        if name.startswith(f"{STATUS}/rank-"):
            here = read_json_object(folder / name) or {}
            if (float_in(here, "written") or 0.0) < run.objects[name].changed - CLOCKS_APART_S:
                run.bring([name], folder)


def _bring_scores(run: RemoteRun, folder: Path, chosen: str) -> None:
    """Folders with the scores of older checkpoints: they say which one is the best, and which are kept."""
    for name in run.checkpoints():
        if name != chosen:
            path = folder / CHECKPOINTS / name
            if step_of(name) > step_of(chosen):
                shutil.rmtree(path, ignore_errors=True)  # broken
                continue
            path.mkdir(parents=True, exist_ok=True)
        score = f"{CHECKPOINTS}/{name}/{SCORE}"
        if score in run.objects and not (folder / score).exists():
            run.bring([score], folder)


def _follow(address: str, folder: Path, mirror: Mirror, chosen: str | None) -> None:
    """On the first rank of another folder than the main rank's: bring what its ranks read."""
    if mirror.shared.leader == 0:
        return
    for path in folder.iterdir():
        if path.name not in (CHECKPOINTS, TOKEN):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    run = RemoteRun(address)
    mirror.knows(run)
    for path in (folder / CHECKPOINTS).glob("*"):
        if path.name not in run.checkpoints():
            shutil.rmtree(path, ignore_errors=True)
    if chosen is None:
        return
    with full_disk_in_one_line(folder):
        faults = run.bring_checkpoint(f"{CHECKPOINTS}/{chosen}", folder / CHECKPOINTS / chosen)
        if faults:
            raise UserError(f"{address}/{CHECKPOINTS}/{chosen} is broken ({faults[0]}): start again")
        _bring_scores(run, folder, chosen)
