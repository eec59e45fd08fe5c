"""Downloads of a run on S3: what a resume needs, and what the commands need that read a run.

A checkpoint counts if its manifest is there, which is uploaded last and deleted first. Files are checked against it.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from atr_scale.data.storage import join, retried
from atr_scale.errors import UserError
from atr_scale.files import FULL, full_disk_in_one_line, sha256_of
from atr_scale.remote.objects import get_bytes, get_file, list_below, put_file
from atr_scale.remote.places import address_of, copy_folder, run_of
from atr_scale.run_checkpoints import MANIFEST, SCORE, WEIGHTS, best_of, link, listed_files
from atr_scale.run_files import LOCK, OF_A_RUN, STATUS

logger = logging.getLogger(__name__)

AT_ONCE = 8  # downloads
CHECKPOINTS = "checkpoints"
LINKS = "best", "latest"  # objects that hold the path of a checkpoint
OF_A_RESUME = "optimizer/", "deepspeed/"  # files of a checkpoint that only a resume reads

Result = TypeVar("Result")


class RemoteRun:
    """What the bucket holds of a run, at the moment of the listing. UserError if it cannot be listed."""

    def __init__(self, address: str) -> None:
        self.address = address
        with _read_in_one_line(address):
            self.objects = retried(lambda: list_below(address), address)

    @property
    def is_run(self) -> bool:
        """Whether training has written here."""
        return any(name.partition("/")[0] in OF_A_RUN for name in self.objects)

    def checkpoints(self) -> list[str]:
        """Names of the complete checkpoints, newest first."""
        found = (re.fullmatch(rf"{CHECKPOINTS}/step-(\d+)/{MANIFEST}", name) for name in self.objects)
        return [f"step-{step}" for step in sorted((int(match[1]) for match in found if match), reverse=True)]

    def files(self) -> list[str]:
        """Names of the files of the run itself, without checkpoints, TensorBoard files and pictures."""
        kept = (name for name in self.objects if "/" not in name or name.startswith(f"{STATUS}/"))
        return [name for name in kept if name not in (LOCK, *LINKS)]

    def bring(self, names: Iterable[str], folder: Path) -> None:
        """Download objects to their places in a folder, but not those that are there already."""

        def one(name: str) -> None:
            there, path, place = self.objects[name], folder / name, join(self.address, name)
            with contextlib.suppress(OSError):
                found = path.stat()
                if found.st_size == there.size and abs(found.st_mtime - there.changed) < 1e-3:
                    return
            with contextlib.suppress(FileNotFoundError):  # it has gone since
                retried(lambda: get_file(place, path, changed=there.changed), place)

        with _read_in_one_line(self.address):
            _at_once(one, names)

    def bring_scores(self, folder: Path) -> None:
        """Make the folder's checkpoints those of the bucket: a folder with the score for each, and no others."""
        kept = self.checkpoints()
        for path in (folder / CHECKPOINTS).glob("*"):
            if path.name not in kept:
                shutil.rmtree(path, ignore_errors=True)
        scores = [f"{CHECKPOINTS}/{name}/{SCORE}" for name in kept]
        for score in scores:
            (folder / score).parent.mkdir(parents=True, exist_ok=True)
            if score not in self.objects:
                (folder / score).unlink(missing_ok=True)
        self.bring([score for score in scores if score in self.objects], folder)

    def bring_checkpoint(self, place: str, target: Path, without: tuple[str, ...] = ()) -> list[str]:
        """Download a checkpoint and return one line per fault.

        place: its name in the bucket, "" for the address itself. without: beginnings of names that are left out.
        """
        prefix = join(self.address, place) if place else self.address
        with _read_in_one_line(prefix):
            manifest = retried(lambda: get_bytes(join(prefix, MANIFEST)), prefix)
        files = listed_files(manifest)
        if manifest is None or isinstance(files, str):
            return [str(files)]
        target.mkdir(parents=True, exist_ok=True)
        for path in target.rglob("*"):  # of another checkpoint of this step
            if path.is_file() and str(path.relative_to(target)) not in (*files, MANIFEST, SCORE):
                path.unlink()

        def one(name: str) -> str | None:
            size, sha256 = files[name]
            path, location = target / name, join(prefix, name)
            if path.is_file() and path.stat().st_size == size and sha256_of(path) == sha256:
                return None
            try:
                whole = retried(lambda: get_file(location, path, sha256), location)
            except FileNotFoundError:
                return f"{name} is missing"
            return None if whole else f"{name} has another checksum"

        with _read_in_one_line(prefix):
            found = _at_once(one, (name for name in files if not name.startswith(without or "\0")))
        faults = [fault for fault in found if fault]
        (target / MANIFEST).write_bytes(manifest)
        return faults

    def link(self, name: str) -> str | None:
        """The complete checkpoint that the object `best` or `latest` names."""
        if name not in self.objects:
            return None
        with _read_in_one_line(self.address):
            content = retried(lambda: get_bytes(join(self.address, name)), self.address)
        found = (content or b"").decode(errors="replace").strip().rpartition("/")[2]
        return found if found in self.checkpoints() else None


def _at_once(work: Callable[[str], Result], names: Iterable[str]) -> list[Result]:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(work, names))


@contextlib.contextmanager
def _read_in_one_line(place: str) -> Iterator[None]:
    """UserError if an object below `place` cannot be read."""
    try:
        yield
    except (FileNotFoundError, PermissionError) as error:
        if error.filename is not None:  # of a local folder
            raise
        raise UserError(f"{place} cannot be read ({error}): check the bucket and its permissions") from None
    except OSError as error:
        if error.errno in FULL:
            raise
        raise UserError(f"{place} cannot be read: {error}; check AWS_ENDPOINT_URL") from None


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time downloads to a folder, where the file system has locks: others find what it has brought."""
    with full_disk_in_one_line(folder):
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder.with_name(f".{folder.name}.lock"), os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise UserError(
                f"{folder.parent} cannot be written to ({error.strerror}): set ATR_SCALE_SCRATCH to a folder for "
                "downloads"
            ) from None
        try:
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


def bring_files(address: str) -> Path:
    """Download the files of a run, without its checkpoints' weights, and return the folder."""
    folder = copy_folder(address)
    with _alone(folder):
        run = RemoteRun(address)
        if not run.is_run and WEIGHTS not in run.objects:  # of an exported model
            what = f"it has none of {', '.join(OF_A_RUN)}" if run.objects else "there is nothing"
            raise UserError(f"no run at {address}: {what}; give the run.dir of a training")
        _bring_files(run, folder)
    return folder


def _bring_files(run: RemoteRun, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    kept = run.files()
    for path in (*folder.glob("*"), *(folder / STATUS).glob("*")):
        if path.is_file() and not path.is_symlink() and str(path.relative_to(folder)) not in kept:
            path.unlink()
    run.bring(kept, folder)
    run.bring_scores(folder)
    states = (f"{CHECKPOINTS}/{name}/{file}" for name in run.checkpoints() for file in ("state.json", MANIFEST))
    run.bring([name for name in states if name in run.objects], folder)
    for name in LINKS:
        found = run.link(name)
        if found:
            link(folder, name, folder / CHECKPOINTS / found)
        else:
            (folder / name).unlink(missing_ok=True)


def bring_model(address: str) -> Path:
    """Download a checkpoint without its optimizer's state, and return its folder.

    address: of a run, whose best checkpoint it is; of a checkpoint; or of an exported model. Raises UserError if there
    is none, or if it is damaged.
    """
    run = RemoteRun(address)
    if WEIGHTS in run.objects:
        match = re.fullmatch(rf"(.+)/({CHECKPOINTS}/step-\d+)", address)
        root, place = (match[1], match[2]) if match else (address, "")
        folder = copy_folder(root)
        target = folder / place if place else folder
    else:
        above, _, last = address.rpartition("/")
        if last in LINKS and not run.objects:
            run = RemoteRun(above)
            chosen = run.link(last)
        else:
            chosen = None
        folder = copy_folder(run.address)
        with _alone(folder):
            run.bring_scores(folder)
            best = best_of(folder)
        names = (chosen, best.name if best else None, run.link("best"), *run.checkpoints())
        name = next((name for name in names if name), None)
        if name is None:
            raise UserError(f"no checkpoint at {address}: give a run folder or one of its checkpoints/step-N")
        place, target = f"{CHECKPOINTS}/{name}", folder / CHECKPOINTS / name
        root = run.address
    with _alone(folder):
        source = RemoteRun(root)
        logger.info("downloading %s", join(root, place) if place else root)
        faults = source.bring_checkpoint(place, target, OF_A_RESUME)
        for each in LINKS if place else ():
            found = source.link(each)
            if found and (folder / CHECKPOINTS / found).is_dir():
                link(folder, each, folder / CHECKPOINTS / found)
    if faults and WEIGHTS not in run.objects and target.name not in RemoteRun(root).checkpoints():
        return bring_model(address)  # training has pruned it meanwhile, so there is a newer one
    if faults:
        raise UserError(f"{join(root, place)} is damaged ({'; '.join(faults)}): give another checkpoint")
    return target


@contextlib.contextmanager
def results_of(location: str | os.PathLike[str]) -> Iterator[Path]:
    """The local folder in which the results of a run are, and to which more are written in the block.

    Of a run on S3, its files are downloaded before, and what has changed is uploaded afterwards. Raises UserError if
    that is refused.
    """
    address = address_of(location)
    if address is None:
        yield Path(location)
        return
    address = run_of(address)
    folder = bring_files(address)
    if any(name.startswith("tensorboard/") for name in RemoteRun(address).objects):
        (folder / "tensorboard").mkdir(exist_ok=True)
    before = _states(folder)
    yield folder
    for name, _ in _states(folder).items() - before.items():
        _send(folder / name, join(address, name))


def _send(path: Path, place: str) -> None:
    try:
        retried(lambda: put_file(path, place), place)
    except OSError as error:
        raise UserError(f"{place} cannot be written ({error}): give --out a local folder") from None


def _states(folder: Path) -> dict[str, tuple[int, int]]:
    """Bytes and time of change of each file of a run, without checkpoints."""
    found = {}
    for path in folder.rglob("[!.]*"):
        name = path.relative_to(folder)
        if name.parts[0] not in (CHECKPOINTS, STATUS, *LINKS) and path.is_file() and not path.is_symlink():
            found[str(name)] = path.stat().st_size, path.stat().st_mtime_ns
    return found
