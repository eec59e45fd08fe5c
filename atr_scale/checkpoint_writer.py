"""Writes checkpoints: a copy of the state in main memory first, then its files behind the training.

    take (all ranks, the training waits) -> Writing (a thread of each rank) -> result (all ranks)

Under ZeRO 3 the thread of the main rank first receives the shards of the weights that the other ranks have copied.
Each rank writes, syncs and hashes its own files in a temporary folder, and then says so in a small file there. When all
have, the main rank writes the manifest, renames the folder and links it as latest. A crash before the rename leaves the
checkpoint before it.

If each node has a folder of its own (a run on S3), the first rank of each does this for the ranks of its node. Then
nobody has all files, and the manifest is written when all are in the bucket (`remote.mirror`).
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from atr_scale.distributed.world import World
from atr_scale.encoders.text import TextEncoder
from atr_scale.errors import Failure, one_line
from atr_scale.files import atomic_write, disk_of, give_usual_mode, is_full
from atr_scale.memory import as_text
from atr_scale.model import Retriever
from atr_scale.remote.nodes import SharedBy
from atr_scale.run_checkpoints import (
    CONFIG,
    STATE,
    TEXT_ENCODER,
    WEIGHTS,
    Files,
    link,
    remove_partial,
    rename,
    sealed,
    write_manifest,
)

PATIENCE_S = 20.0  # for the files of other ranks, after this one has failed
POLL_S = 0.05  # between two looks at whether the other ranks have written
YIELD_S = 0.001  # training goes on before this thread holds the interpreter for the names of all tensors
LISTEN_S = 0.5  # between two looks at whether one of them cannot


class HostCopies:
    """Copies of tensors in main memory, which is kept: new pages take three times as long as the copy itself.

    So the next copies of the same names replace those before.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def room(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor with any content."""
        kept = self._kept.get(name)
        if kept is None or kept.shape != tuple(shape) or kept.dtype != dtype:
            kept = self._kept[name] = torch.empty(tuple(shape), dtype=dtype)
        return kept

    def copy(self, name: str, tensor: Tensor) -> Tensor:
        """A contiguous copy, complete on return."""
        return self.room(name, tensor.shape, tensor.dtype).copy_(tensor.detach())


class Trained(Protocol):
    """A model in training, on all ranks, that a checkpoint can be written from."""

    model: Retriever

    def state(self) -> dict[str, Any]:
        """What a resume needs beside the files, equal on all ranks."""

    def files(self, copies: HostCopies) -> dict[str, dict[str, Tensor]]:
        """What this rank writes for a resume beside the weights: copies, by file and by name."""

    def copy_weights(self, copies: HostCopies) -> Callable[[], dict[str, Tensor]]:
        """Copy this rank's part of the weights. A thread of each rank calls the function that is returned.

        It returns the full weights on the main rank, {} on the others, and does not fail for a reason of one rank.
        """


class DiskFull(Failure):
    """There is no space for a checkpoint."""

    @staticmethod
    def of(folder: Path) -> DiskFull:
        """Names the disk of a folder, and the machine: another rank may tell of it."""
        free = as_text(shutil.disk_usage(folder).free)
        return DiskFull(f"the disk {disk_of(folder)} of {socket.gethostname()} is full: {free} are free")


@dataclass
class Snapshot:
    """A rank's part of a checkpoint, in main memory. Nothing of it changes when training goes on."""

    tensors: dict[str, dict[str, Tensor]]  # by file, but for the weights
    weights: Callable[[], dict[str, Tensor]]  # see `Trained.copy_weights`
    texts: dict[str, str]  # by file
    text_encoder: TextEncoder | None  # on the main rank; its configuration and tokenizer do not change


def take(
    trained: Trained, world: World, config_yaml: str, state: dict[str, Any], copies: HostCopies | None = None
) -> Snapshot:
    """Copy the state of all ranks into their main memory. All ranks call this together, between two steps.

    copies: the memory of the save before, whose files must have been written.
    """
    copies = copies or HostCopies()
    tensors, weights = trained.files(copies), trained.copy_weights(copies)
    if not world.is_main:
        return Snapshot(tensors, weights, {}, None)
    texts = {CONFIG: config_yaml, STATE: json.dumps({**state, **trained.state()})}
    return Snapshot(tensors, weights, texts, trained.model.text_encoder)


class Writing:
    """A checkpoint that is being written. All ranks make one together, and later ask for its result together."""

    def __init__(
        self,
        run: Path,
        final: Path,
        snapshot: Snapshot,
        world: World,
        shared: SharedBy | None = None,
        before: Callable[[], object] = lambda: None,
        afterwards: Callable[[Files], object] = lambda files: None,
        failed: Callable[[Failure], object] = lambda fault: None,
    ) -> None:
        """shared: the ranks of the folders, default one folder for all.

        before: called by the first rank of each folder, before that is made; may raise a Failure, such as DiskFull.
        afterwards: called by the thread of the first rank of each folder when the folder has the checkpoint's files,
        with what the manifest says of them. failed: called by the thread of the main rank when it is known that a rank
        could not write, within a second. The run may be at any step then.

        Raises Failure, DiskFull if the disk is full, if the folder cannot be made.
        """
        self.run, self.final, self.world = run, final, world
        self._before, self._afterwards, self._failed = before, afterwards, failed
        self._shared = shared or SharedBy.all_ranks(world)
        self._leads = world.rank == self._shared.leader
        self._snapshot: Snapshot | None = snapshot
        self._folder = final.with_name(f".{final.name}.partial")
        self._fault: Failure | None = None
        self._error: BaseException | None = None  # any other, which is ours
        self._ended: float | None = None
        self._store: Any = None  # a connection of the thread's own
        self._listens = 0.0  # the next time
        self._own_done, self._abandoned = threading.Event(), threading.Event()
        self._together(self._make_folder() if self._leads else None)
        self._thread = threading.Thread(target=self._write, name="checkpoint")  # a process that fails ends after it
        self._thread.start()

    def result(self) -> Path:
        """Wait for the checkpoint and return its folder.

        If a rank could not write, nothing of the checkpoint is left, and all ranks raise DiskFull, or Failure for
        another reason.
        """
        try:
            self._own_done.wait()
            self._together(self._fault)
            self._thread.join()
            self._together(self._fault)
        except Failure:
            self._abandoned.set()
            self._thread.join()
            if self._leads:
                remove_partial(self.run)
            raise
        return self.final

    def _together(self, fault: Failure | None) -> None:
        """All ranks raise if one of them has a fault. This one raises if it has another error."""
        if self._error is not None:
            raise self._error
        self.world.raise_together(fault)

    def _make_folder(self) -> Failure | None:
        try:
            self._before()
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir(parents=True)
        except Failure as fault:
            return fault
        except OSError as error:
            return self._as_failure(error)
        return None

    def _as_failure(self, error: Exception) -> Failure:
        if is_full(error, self.run):
            return DiskFull.of(self.run)
        return Failure(f"cannot save to {self.run}: {one_line(error)}")

    def _write(self) -> None:
        time.sleep(YIELD_S)
        try:
            written = self._own_files()
            self._own_done.set()
            if self._leads:
                self._finish(written)
        except (OSError, SafetensorError) as error:
            self._fault = self._as_failure(error)
            self._tell()
        except Failure as fault:  # of another rank
            self._fault = fault
        except BaseException as error:
            self._error = error
        self._own_done.set()
        if self._fault is not None and self.world.is_main:
            self._failed(self._fault)

    def _own_files(self) -> Files:
        assert self._snapshot is not None
        weights = self._snapshot.weights()  # before anything that may fail: other ranks wait for it
        if self.world.is_main:
            self._snapshot.tensors[WEIGHTS] = weights
        for name, tensors in self._snapshot.tensors.items():
            path = self._folder / name
            path.parent.mkdir(exist_ok=True)
            save_file(tensors, path)
            give_usual_mode(path)
        for name, text in self._snapshot.texts.items():
            (self._folder / name).write_text(text, encoding="utf-8")
        names = [*self._snapshot.tensors, *self._snapshot.texts]
        if self._snapshot.text_encoder is not None:
            place = self._folder / TEXT_ENCODER
            place.mkdir()
            self._snapshot.text_encoder.save_files(place)
            names += [str(path.relative_to(self._folder)) for path in place.rglob("*") if path.is_file()]
        self._snapshot = None  # frees its memory
        written = sealed(self._folder, names)
        if not self._leads:
            with atomic_write(self._said(self.world.rank)) as temporary:
                temporary.write_text(json.dumps(written), encoding="utf-8")
        return written

    def _finish(self, files: Files) -> None:
        """Wait until all ranks of the folder have written, and make a checkpoint of their files.

        Failure if one of them cannot.
        """
        for rank in self._shared.ranks[1:]:
            said = self._said(rank)
            while not said.is_file():
                if self._abandoned.wait(POLL_S) or self._has_ended():
                    return
                if fault := self._told():
                    raise fault
            files |= json.loads(said.read_text(encoding="utf-8"))
            said.unlink()
        if len(self._shared.leaders) == 1:
            write_manifest(self._folder, files)
        rename(self._folder, self.final)
        link(self.run, "latest", self.final)
        self._afterwards(files)

    def _tell(self) -> None:
        """The main rank is told now that this one has failed; without a store, when both ask for the result."""
        if not self.world.is_main and self.world.store is not None:
            told = json.dumps([isinstance(self._fault, DiskFull), str(self._fault)])
            with contextlib.suppress(RuntimeError):  # the store is gone, and so is the run
                self.world.store.clone().set(self._key, told)

    def _told(self) -> Failure | None:
        """The fault of another rank, if one has told of it."""
        if self.world.store is None or time.monotonic() < self._listens:
            return None
        self._listens = time.monotonic() + LISTEN_S
        try:
            self._store = self._store or self.world.store.clone()
            if not self._store.check([self._key]):
                return None
            full, text = json.loads(self._store.get(self._key))
        except RuntimeError:  # the store is gone, and so is the run
            return None
        return DiskFull(text) if full else Failure(text)

    @property
    def _key(self) -> str:
        return f"{self.final.name} cannot be written"

    def _has_ended(self) -> bool:
        """Whether this process has ended, but for this thread, and other ranks have had time to write."""
        if threading.main_thread().is_alive():
            return False
        self._ended = self._ended or time.monotonic()
        return time.monotonic() - self._ended > PATIENCE_S

    def _said(self, rank: int) -> Path:
        return self._folder / f".rank-{rank}.json"
