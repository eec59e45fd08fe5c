"""The checkpoints of a run: which are sound, which is the best, which are kept. `checkpoint` writes and reads one.

    RUN/checkpoints/step-N/
        manifest.json           size and sha256 of every file of the checkpoint
        score.json              the value of evaluation.select after step N, written when it is known
    RUN/latest, RUN/best        links to the newest checkpoint and to the one with the highest score

The links are for people: they follow from what the checkpoints say, and are mended if a kill came in between.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from atr_scale.errors import Failure, UserError
from atr_scale.files import atomic_write, sha256_of, sync

logger = logging.getLogger(__name__)

WEIGHTS, CONFIG, TEXT_ENCODER, STATE, MANIFEST, SCORE = (
    "model.safetensors", "config.resolved.yaml", "text_encoder", "state.json", "manifest.json", "score.json",
)  # fmt: skip
REQUIRED = (WEIGHTS, CONFIG, STATE)  # names that every manifest holds

Files = dict[str, dict[str, int | str]]  # bytes and sha256 by name


class Score(NamedTuple):
    """The value of a metric that a checkpoint has reached. Scores of the same metric and data are compared.

    metric: evaluation.select, which may be None. data: fingerprint of the validation sets, None if it is not known.
    """

    metric: str | None
    value: float
    data: str | None = None


def newest_first(run: Path) -> list[Path]:
    """The checkpoints of the run, sorted by falling step. Raises UserError if its folder cannot be read."""
    try:
        names = os.listdir(run / "checkpoints")
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            return []
        raise _unreadable(run / "checkpoints", error) from None
    found = [(int(match[1]), match[0]) for name in names if (match := re.fullmatch(r"step-(\d+)", name))]
    return [run / "checkpoints" / name for _, name in sorted(found, reverse=True)]


def step_of(name: str) -> int:
    """The step of a checkpoint by its name step-N, or by that of a file in it, step-N/FILE."""
    return int(name.partition("/")[0].removeprefix("step-"))


def newest_sound(run: Path) -> Path | None:
    """The newest checkpoint of a run with correct checksums, None if the run has no checkpoint.

    Raises UserError if all checkpoints are broken, because a run must not silently start over, and if one cannot be
    read, because it must not silently go back.
    """
    checkpoints = newest_first(run)
    for checkpoint in checkpoints:
        faults = verify(checkpoint)
        if not faults:
            return checkpoint
        logger.warning("%s is broken (%s): trying the one before it", checkpoint, "; ".join(faults))
    if checkpoints:
        raise UserError(f"all {len(checkpoints)} checkpoints of {run} are broken: give another run.dir to start over")
    return None


def set_aside(run: Path, sound: Path) -> None:
    """Rename the broken checkpoints after the newest sound one, from which a run goes on, to step-N.broken.

    Otherwise they would count among those that are kept, in the place of sound ones.
    """
    for broken in newest_first(run)[: newest_first(run).index(sound)]:
        aside = broken.with_name(f"{broken.name}.broken")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(broken, aside)
        logger.warning("%s is called %s now; it is removed when the run has saved that step again", broken, aside.name)


def check_checksums(checkpoint: Path) -> None:
    """Raise UserError if the weights or the files of the text encoder do not match the manifest.

    A checkpoint without a manifest is not checked. The configuration may be edited.
    """
    if (checkpoint / MANIFEST).is_file():
        faults = verify(checkpoint, (WEIGHTS, TEXT_ENCODER))
        if faults:
            raise UserError(f"{checkpoint} is damaged ({'; '.join(faults)}): copy it anew, or give another checkpoint")


def verify(checkpoint: Path, only: tuple[str, ...] = ("",)) -> list[str]:
    """Compare a checkpoint with its manifest and return one line per fault.

    only: beginnings of the names of the files to check, by default all files. Raises UserError for files that exist
    and cannot be read: they are not broken.
    """
    try:
        manifest = checkpoint / MANIFEST
        files = listed_files(manifest.read_bytes() if manifest.exists() else None)
        if isinstance(files, str):
            return [files]
        # Two names that differ in one bit may become one.
        folders = (folder for folder in checkpoint.iterdir() if folder.is_dir() and folder.name.startswith(only))
        inner = (path for folder in folders for path in folder.rglob("[!.]*") if path.is_file())
        faults = [
            f"{MANIFEST} lists no {path.name}" for path in inner if str(path.relative_to(checkpoint)) not in files
        ]
        for name, (size, checksum) in files.items():
            path = checkpoint / name
            if not name.startswith(only):
                continue
            if not path.is_file():
                faults.append(f"{name} is missing")
            elif path.stat().st_size != size:
                faults.append(f"{name} has {path.stat().st_size} bytes instead of {size}")
            elif sha256_of(path) != checksum:
                faults.append(f"{name} has another checksum")
        return faults
    except OSError as error:
        raise _unreadable(checkpoint, error) from None


def listed_files(manifest: bytes | None) -> dict[str, tuple[int, str]] | str:
    """Size and sha256 by name as a manifest lists them, or what is wrong with it. manifest: None if there is none."""
    if manifest is None:
        return f"no {MANIFEST}"
    try:
        files = json.loads(manifest)["files"]
        listed = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        return f"no readable {MANIFEST}: {type(error).__name__} {error}"
    odd = [
        name
        for name in listed
        if not re.fullmatch(r"[^\0/]{1,99}(/[^\0/]{1,99}){0,9}", name) or ".." in name.split("/")
    ]
    missing = [name for name in REQUIRED if name not in listed]
    if odd or missing:
        return f"no readable {MANIFEST}: it lists {', '.join(odd)}" if odd else f"{MANIFEST} lists no {missing[0]}"
    return listed


def _unreadable(place: Path, error: OSError) -> UserError | Failure:
    what = f"{error.filename or place} cannot be read ({error.strerror})"
    if isinstance(error, PermissionError):
        return UserError(f"{what}: give this user access to it; no older checkpoint is taken in its place")
    return Failure(f"{what}: no older checkpoint is taken in its place")


def write_score(checkpoint: Path, score: Score) -> None:
    """Record the score of a checkpoint, which its manifest does not list."""
    with atomic_write(checkpoint / SCORE) as temporary:
        value = score.value if math.isfinite(score.value) else None
        temporary.write_text(json.dumps({**score._asdict(), "value": value}), encoding="utf-8")


def read_score(checkpoint: Path) -> Score | None:
    """The score of a checkpoint; None if it was not evaluated, or the record is damaged."""
    try:
        found: Mapping[str, Any] = json.loads((checkpoint / SCORE).read_bytes())
        value = found["value"]
        if value is not None and (type(value) not in (int, float) or not math.isfinite(value)):
            return None
        return Score(found["metric"], -math.inf if value is None else float(value), found.get("data"))
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def best_scored(run: Path, metric: str | None) -> Path | None:
    """The checkpoint with the highest score by `metric`, of several equal ones the oldest. None if none has one.

    The scores that count are those on the validation sets that the newest of them is of.
    """
    scored = [(path, score) for path, score in _scored(run) if score.metric == metric]
    scored = [(path, score) for path, score in scored if score.data == scored[0][1].data]
    return max(reversed(scored), key=lambda entry: entry[1].value)[0] if scored else None


def best_of(run: Path) -> Path | None:
    """The same by the metric of the newest score."""
    scored = _scored(run)
    return best_scored(run, scored[0][1].metric) if scored else None


def _scored(run: Path) -> list[tuple[Path, Score]]:
    """Newest first."""
    return [(path, score) for path in newest_first(run) if (score := read_score(path))]


def link(run: Path, name: str, checkpoint: Path) -> None:
    """Make RUN/`name` a link to a checkpoint, in one atomic step."""
    temporary = run / f".{name}.partial"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(checkpoint.relative_to(run))
    if (run / name).is_dir() and not (run / name).is_symlink():  # a copy of the run that has followed the link
        shutil.rmtree(run / name)
    os.replace(temporary, run / name)
    sync(run)


def mend(run: Path, metric: str | None) -> None:
    """Mend what a kill has left: links that do not follow from the checkpoints, and remains of interrupted saves.

    metric: evaluation.select. Call it only from the process that writes to the run folder.
    """
    remove_partial(run)
    newest = next(iter(newest_first(run)), None)
    for name, meant in (("latest", newest), ("best", best_scored(run, metric))):
        place = run / name
        if meant is not None and (not place.exists() or place.resolve() != meant.resolve()):
            logger.info("%s: the link %s leads to %s now", run, name, meant.name)
            link(run, name, meant)
        elif place.is_symlink() and not place.exists():
            place.unlink()


def remove_partial(run: Path) -> None:
    """Remove the remains of interrupted saves."""
    for partial in run.glob("checkpoints/.step-*.partial"):
        replaced = re.fullmatch(r"\.(step-\d+)\.replaced\.partial", partial.name)
        if replaced and not (partial.parent / replaced[1]).exists():  # the new one of this step did not take its place
            os.replace(partial, partial.parent / replaced[1])
        else:
            shutil.rmtree(partial, ignore_errors=True)
    for name in ("latest", "best"):
        (run / f".{name}.partial").unlink(missing_ok=True)


def prune(run: Path, keep: int, *needed: Path | None) -> None:
    """Remove all checkpoints except the newest `keep`, the best one and those `needed`, and remains of interrupted
    saves.
    """
    remove_partial(run)
    kept = {path.resolve() for path in (best_of(run), run / "best", *needed) if path is not None and path.exists()}
    found = newest_first(run)
    for aside in run.glob("checkpoints/step-*.broken"):
        step = re.fullmatch(r"step-(\d+)\.broken", aside.name)
        if step and found and int(step[1]) <= step_of(found[0].name):
            shutil.rmtree(aside, ignore_errors=True)
    for checkpoint in found[keep:]:
        if checkpoint.is_symlink() and checkpoint.resolve() not in kept:  # it lies on another disk, and stays there
            checkpoint.unlink()
        elif checkpoint.resolve() not in kept:
            aside = checkpoint.with_name(f".{checkpoint.name}.pruned.partial")
            os.replace(checkpoint, aside)  # a kill leaves no checkpoint with some of its files
            shutil.rmtree(
                aside, ignore_errors=True
            )  # NFS keeps files that another process reads; the next one removes it


def rename(finished: Path, final: Path) -> None:
    """Rename a finished checkpoint. An older one of the same step moves aside first and is deleted last."""
    aside = final.with_name(f".{final.name}.replaced.partial")
    if final.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(final, aside)
    os.replace(finished, final)
    sync(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def sealed(folder: Path, names: Iterable[str]) -> Files:
    """Sync files of a checkpoint's folder, and return what its manifest says of them."""
    files: Files = {}
    for name in sorted(names):
        sync(folder / name)
        files[name] = {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
    return files


def write_manifest(folder: Path, files: Files) -> None:
    """Write the manifest of a checkpoint's files, and sync it and all folders."""
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"files": dict(sorted(files.items()))}, indent=1), encoding="utf-8")
    for path in (manifest, *(p for p in folder.rglob("*") if p.is_dir()), folder):
        sync(path)


def seal(folder: Path) -> None:
    """Sync every file and write the manifest of all files."""
    write_manifest(folder, sealed(folder, [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]))
