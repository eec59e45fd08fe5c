"""Keeps a run in a bucket like the local folder that training writes to, behind the training.

The first rank of each folder (node) has a thread that uploads what is new or has changed. Of a checkpoint, each uploads
the files of its node's ranks; when all have, the main rank uploads the manifest and then `latest`, and deletes the
checkpoints that are no longer kept. A file that is there with the same checksum is not sent again. An upload that fails
is tried again until it succeeds, and training goes on meanwhile. Only its end waits: at most data.outage_seconds, and
at most STOPPED_S after a signal to stop, behind which whoever has sent it kills.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from atr_scale.data.storage import join
from atr_scale.distributed.world import World
from atr_scale.errors import Failure, one_line
from atr_scale.remote.fetch import CHECKPOINTS, LINKS, RemoteRun
from atr_scale.remote.lock import RemoteLock
from atr_scale.remote.nodes import SharedBy
from atr_scale.remote.objects import checksum_of, list_below, put_bytes, put_file, remove
from atr_scale.run_checkpoints import MANIFEST, SCORE, Files, listed_files, newest_first, step_of, write_manifest
from atr_scale.run_files import ATTEMPTS, LOCK, PREEMPTED

logger = logging.getLogger(__name__)

PERIOD_S = 15.0  # between two looks at what has changed
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 10.0  # after an upload has failed
LAST_WORDS_S = 5.0
STOPPED_S = 15.0  # the longest wait for a store that refuses after a signal: launchers kill 30 s after it
SILENT_S = 60.0  # the shortest wait for one that neither takes nor refuses, as it may be slow
POLL_S = 0.1
NEVER = 1 << 60  # a step, of a node that will upload no more
UPLOADED = ".uploaded"  # a local file: the bucket has had this run
GONE = -1, -1  # the state of a file that is not there
LARGE = 4 << 20  # bytes; a larger file is uploaded with checkpoints and at the end alone


class _NotYet(OSError):
    """Another node has not uploaded its files of a checkpoint."""


class Mirror:
    """The uploads of one rank; those of a rank that is not the first of its folder do nothing."""

    def __init__(self, address: str, folder: Path, world: World, shared: SharedBy, lock: RemoteLock | None) -> None:
        """lock: of the main rank."""
        self.address, self.folder, self.shared = address, folder, shared
        self._world, self._lock = world, lock
        self.leads = world.rank == shared.leader
        self._sent: dict[str, tuple[int, int]] = {}  # bytes and time of change of what is in the bucket
        self._linked: dict[str, str] = {}
        self._committed: set[int] = set()  # steps
        self._grown = False  # by a checkpoint: older ones may go
        self._written: tuple[int, Files] | None = None  # the newest checkpoint, and this folder's files of it
        self._finished: tuple[int, Files] | None = None  # the same, uploaded
        self._store: Any = None
        self._away: float | None = None  # since when uploads fail
        self._waits = False  # for other nodes
        self._fault = ""
        self.uploading: Path | None = None  # a checkpoint, whose files must stay
        self._beat: Callable[[], None] = lambda: None
        self._moved = time.monotonic()  # the last time that all was uploaded, or another part of a checkpoint
        self._pass = threading.Lock()
        self._wake, self._ends, self._gives_up = threading.Event(), threading.Event(), threading.Event()
        self._thread = self._new_thread()

    def _new_thread(self) -> threading.Thread:
        return threading.Thread(target=self._work, name="uploads", daemon=True)

    def knows(self, run: RemoteRun) -> None:
        """What the bucket has at the start."""
        self._committed = {step_of(name) for name in run.checkpoints()}

    def goes_on_from(self, checkpoint: str) -> None:
        """Later ones are broken."""
        self._committed = {step for step in self._committed if step <= step_of(checkpoint)}

    def start(self) -> None:
        """The run begins: from now on the bucket follows."""
        if self.leads:
            self._thread.start()

    def written(self, step: int, files: Files) -> None:
        """The checkpoint of a step is in this folder. files: those of the ranks that share the folder."""
        self._written = step, files
        self._committed.discard(step)
        self._wake.set()

    def finish(self, budget_s: float, told: Callable[[], bool], beat: Callable[[], None]) -> None:
        """Upload the rest. All ranks call this, at the normal end.

        budget_s: for how long the store is waited for, or STOPPED_S once this rank is `told` to stop. If the store is
        away, a line says so if the run was stopped and will be continued; else Failure is raised.
        """
        if not self.leads:
            return
        self._beat = beat
        stopped = (self.folder / PREEMPTED).exists()
        waited = self._wait(lambda: min(budget_s, STOPPED_S) if stopped or told() else budget_s)
        if waited is None:
            return
        last = max(self._committed, default=None)
        with contextlib.suppress(RuntimeError):  # the main rank is gone
            self._say(NEVER, {})
        limit = "" if stopped or told() else f" (data.outage_seconds = {budget_s:g})"
        fault = f"{self.address} could not be written for {waited:.0f} s{limit}: {self._fault or 'no answer'}"
        step = f"step-{last}" if last is not None else "the start"
        if len(self.shared.leaders) > 1:  # no node has a whole checkpoint
            left = f"the same command goes on from what is there, {step}"
        else:
            left = (
                f"what is missing there is in {self.folder}: the same command on this machine uploads it and goes on, "
                f"on another machine it goes on from {step}"
            )
        if not stopped:
            raise Failure(f"{fault}; {left}")
        logger.warning("%s; %s", fault, left)

    def close(self) -> None:
        """After the end, whatever it was: the last words, and what can be uploaded without waiting for the store."""
        if not self.leads or self._gives_up.is_set():
            return
        self._gives_up.set()
        if not self._thread.is_alive():
            self._thread = self._new_thread()
            self._thread.start()
        self._wait(lambda: SILENT_S)

    def _wait(self, budget: Callable[[], float]) -> float | None:
        """Wait for the thread to upload the rest. Returns after how long this was given up, None if it was not.

        budget: seconds for which the store may take nothing.
        """
        self._ends.set()
        self._wake.set()
        began = time.monotonic()
        while self._thread.is_alive():
            self._thread.join(POLL_S)
            if self._waits:
                self._beat()  # the other node's watchdog looks after it
                continue
            waited, longest = time.monotonic() - max(began, self._moved), budget()
            if waited > (longest if self._away is not None else max(longest, SILENT_S)) and self._thread.is_alive():
                self._gives_up.set()
                return waited
        return None

    def last_words(self) -> None:
        """The process is about to be ended, and perhaps hangs: upload what says why, in a few seconds."""
        if self.leads:
            last = threading.Thread(target=lambda: self._try(self._upload_files), daemon=True)
            last.start()
            last.join(LAST_WORDS_S)

    def upload(self) -> None:
        """Upload what the bucket lacks. Raises OSError at the first fault; the next call goes on from there."""
        with self._pass:
            self._upload_files(all_of_them=self._ends.is_set())
            self._upload_checkpoints()
            if self._world.is_main:
                self._upload_links()
                self._prune()

    def _work(self) -> None:
        """Upload until the end, then the rest until all is there or the main thread gives up."""
        pause = FIRST_PAUSE_S
        while True:
            last = self._ends.is_set()
            self._try(self.upload)
            if self._away is None:
                if last:
                    return
                pause = FIRST_PAUSE_S
                self._wake.wait(PERIOD_S)
                self._wake.clear()
            elif self._gives_up.is_set():
                return
            elif not last and self._ends.wait(pause):
                pause = FIRST_PAUSE_S
            else:
                if last:
                    self._gives_up.wait(pause)
                pause = min(LONGEST_PAUSE_S, 2 * pause)

    def _try(self, upload: Callable[[], None]) -> None:
        try:
            upload()
        except Exception as error:  # of s3fs, aiohttp and botocore, or of a folder that has changed meanwhile
            self._fault, self._waits = one_line(repr(error), 160), isinstance(error, _NotYet)
            if self._waits:
                self._away = time.monotonic()
            elif self._away is None:
                self._away = time.monotonic()
                if self._gives_up.is_set():
                    return  # that is said by an error, or the run has ended well before
                logger.warning("%s: an upload has failed (%s) and is tried again", self.address, self._fault)
        else:
            if self._away is not None and (waited := time.monotonic() - self._away) > PERIOD_S:
                logger.warning("%s: uploads have caught up after %.0f s", self.address, waited)
            self._away, self._waits, self._moved = None, False, time.monotonic()

    def _upload_files(self, all_of_them: bool = False) -> None:
        """Files outside of checkpoints that have changed."""
        for path in sorted(self.folder.rglob("*")):
            name = str(path.relative_to(self.folder))
            first = name.partition("/")[0]
            if first in (CHECKPOINTS, LOCK, *LINKS) or "/." in f"/{name}" or path.is_symlink() or not path.is_file():
                continue
            if not self._world.is_main and name == ATTEMPTS:  # the main rank writes the run's
                continue
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                if stat.st_size <= LARGE or all_of_them:
                    self._send(name, path, (stat.st_size, stat.st_mtime_ns))
        if not self._world.is_main:
            return
        if self._sent.get(PREEMPTED) != GONE and not (self.folder / PREEMPTED).exists():
            remove(join(self.address, PREEMPTED))
            self._sent[PREEMPTED] = GONE
        if ATTEMPTS in self._sent:
            (self.folder / UPLOADED).touch()

    def _send(self, name: str, path: Path, state: tuple[int, int]) -> None:
        if self._sent.get(name) != state:
            self._put(path, name)
            self._sent[name] = state

    def _put(self, path: Path, name: str, sha256: str | None = None) -> None:
        put_file(path, join(self.address, name), sha256, self._move if sha256 else self._beat)

    def _move(self) -> None:
        """The bucket has more of a checkpoint. Small files do not count: they change, and may be sent all the time."""
        self._moved = time.monotonic()
        self._beat()

    def _upload_checkpoints(self) -> None:
        """Those that the bucket lacks, the newest one first."""
        missing = []
        for path in newest_first(self.folder):
            step = step_of(path.name)
            if step not in self._committed:
                found = self._written if self._written and self._written[0] == step else self._listed(step, path)
                if found:
                    missing.append(found)
        for step, files in missing:
            self.uploading = self.folder / CHECKPOINTS / f"step-{step}"
            try:
                self._upload_checkpoint(step, files)
            finally:
                self.uploading = None

    def _listed(self, step: int, path: Path) -> tuple[int, Files] | None:
        """The files of a checkpoint that this process has not written, if they are all here."""
        manifest = path / MANIFEST
        files = listed_files(manifest.read_bytes() if manifest.is_file() else None)
        if not self._world.is_main or isinstance(files, str):
            return None
        if not all((path / name).is_file() for name in files):
            return None
        return step, {name: {"bytes": size, "sha256": sha256} for name, (size, sha256) in files.items()}

    def _upload_checkpoint(self, step: int, files: Files) -> None:
        place, folder = join(self.address, f"{CHECKPOINTS}/step-{step}"), self.folder / CHECKPOINTS / f"step-{step}"
        if self._finished is None or self._finished != (step, files):
            if self._world.is_main:
                remove(join(place, MANIFEST))  # of another one of this step
            there = list_below(place)
            for name, entry in files.items():
                size, sha256 = int(entry["bytes"]), str(entry["sha256"])
                same = name in there and there[name].size == size
                if not (same and checksum_of(join(place, name)) == sha256):
                    try:
                        self._put(folder / name, f"{CHECKPOINTS}/step-{step}/{name}", sha256)
                    except FileNotFoundError:
                        if not folder.exists():  # pruned meanwhile
                            return
                        raise
            self._finished = step, files
        self._say(step, files)
        if not self._world.is_main:
            self._committed.add(step)
            return
        if self._written and self._written[0] == step:
            others = self._of_others(step)
            if others is None:
                return
            if len(self.shared.leaders) > 1:
                files = files | others
                write_manifest(folder, files)
        self._upload_files(all_of_them=True)  # the metrics up to this step, and all else
        self._check_lock()
        self._put(folder / MANIFEST, f"{CHECKPOINTS}/step-{step}/{MANIFEST}")
        self._committed.add(step)
        self._grown = True
        logger.info("%s has the checkpoint of step %d", self.address, step)

    def _check_lock(self) -> None:
        """Of two that believe to have the run, one alone may change what it goes on from."""
        if self._lock is not None and not self._lock.is_mine():
            raise OSError("the lock of the run is another process's, or gone")

    def _say(self, step: int, files: Files) -> None:
        """To the main rank: this folder's files of a checkpoint are in the bucket."""
        if self._world.is_main:
            return
        self._others().set(f"{self._world.rank}", json.dumps([step, files]))

    def _of_others(self, step: int) -> Files | None:
        """What the other folders have uploaded of a step. None if one of them has gone on to a later one."""
        found: Files = {}
        for rank in self.shared.leaders[1:]:
            store = self._others()
            said, files = json.loads(store.get(str(rank))) if store.check([str(rank)]) else (-1, {})
            if said > step:
                return None
            if said < step:
                raise _NotYet(f"rank {rank} has not uploaded its files of step {step}")
            found |= files
        return found

    def _others(self) -> Any:
        from torch._C._distributed_c10d import PrefixStore  # torch.distributed, but typed

        if self._store is None:
            self._store = PrefixStore("uploads", self._world.store.clone())
        return self._store

    def _upload_links(self) -> None:
        """The scores of checkpoints, and `latest` and `best`."""
        for path in newest_first(self.folder):
            step, score = step_of(path.name), path / SCORE
            if step in self._committed and score.is_file():
                stat = score.stat()
                self._send(f"{CHECKPOINTS}/{path.name}/{SCORE}", score, (stat.st_size, stat.st_mtime_ns))
        complete = {f"step-{step}" for step in self._committed}
        newest = max(self._committed, default=None)
        best = (self.folder / "best").resolve().name if (self.folder / "best").exists() else ""
        for name, target in (("latest", f"step-{newest}"), ("best", best)):
            if target in complete and self._linked.get(name) != target:
                put_bytes(f"{CHECKPOINTS}/{target}\n".encode(), join(self.address, name))
                self._linked[name] = target

    def _prune(self) -> None:
        """Delete what the bucket has of older checkpoints that are not kept here, when it has the newest one."""
        here = {step_of(path.name) for path in newest_first(self.folder)}
        newest = max(self._committed, default=None)
        if not self._grown or newest is None:
            return
        place = join(self.address, CHECKPOINTS)
        names = list_below(place)
        gone = [
            name
            for name in names
            if re.match(r"step-\d+/", name) and step_of(name) < newest and step_of(name) not in here
        ]
        self._check_lock()
        for name in sorted(gone, key=lambda name: not name.endswith(f"/{MANIFEST}")):
            remove(join(place, name))
        self._committed &= here | {newest}
        self._grown = False
