"""The audio of the clips that a file of moments names, and the search of all of its queries in them by a model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from atr_scale.checkpoint import find_checkpoint, read_state
from atr_scale.config import RunConfig
from atr_scale.data.corpora.audio_files import SOURCE_EXTENSIONS, audio_stem
from atr_scale.data.decode import decode
from atr_scale.data.sample import BadSample
from atr_scale.data.shard_reader import READ_THREADS, ShardSet, open_shards
from atr_scale.data.storage import make_folder
from atr_scale.distributed.world import World
from atr_scale.errors import UserError
from atr_scale.evaluation.embed import load_ahead
from atr_scale.evaluation.moments import LocatedQuery, MomentQuery, MomentResult, read_moments
from atr_scale.evaluation.result import file_stem
from atr_scale.evaluation.results import checkpoint_name, record_entries, run_folder
from atr_scale.model import Retriever
from atr_scale.moments import Moment, Moments
from atr_scale.precision import Precision
from atr_scale.run_files import read_json_object

logger = logging.getLogger(__name__)

# (texts, waveform) -> the spans of each text, best first
Locate = Callable[[Sequence[str], NDArray[np.float32]], list[list[Moment]]]


class Locator(Protocol):
    """What is asked of a trained model, see `atr_scale.inference.TrainedModel`."""

    module: Retriever
    config: RunConfig
    device: torch.device

    @property
    def sample_rate(self) -> int: ...

    def need_moments(self) -> None: ...

    def locate(
        self, texts: Sequence[str], audio: NDArray[np.float32], sample_rate: int | None, seconds: float | None
    ) -> list[Moments]: ...


def evaluate_moments(
    location: str | Path,
    model: Locator,
    file: str | Path,
    *,
    name: str | None = None,
    audio: str | Path | None = None,
    shards: str | None = None,
    out: str | Path | None = None,
    world: World | None = None,
) -> MomentResult | None:
    """Measure how well a model finds the moments of a file, and save the result. All ranks call this.

    location: of the model, a run folder or a checkpoint. file: as for `read_moments`. name: of the result, by default
    that of the file without its ending; an older result of this name is replaced. audio: folder of the clips, by
    default that of the file. shards: where the clips are instead. out: folder of the result, by default the run folder.
    Clips are read whole. Returns None on other ranks than the main one. Raises UserError if the scorer has no attention
    over frames, or if the file, the shards or all clips cannot be read.
    """

    def locate(texts: Sequence[str], waveform: NDArray[np.float32]) -> list[list[Moment]]:
        seconds = len(waveform) / model.sample_rate
        return [found.spans for found in model.locate(texts, waveform, model.sample_rate, seconds)]

    world = world or World()
    model.need_moments()  # all ranks, also one without clips
    queries = read_moments(file)
    where = Path(audio or Path(file).parent) if shards is None else open_shards(shards)
    if isinstance(where, Path) and not where.is_dir():
        raise UserError(f"there is no folder {where}: give that of the clips by --audio, or --shards")
    located = locate_all(queries, MomentClips(where, model.sample_rate), locate, file, world)
    if not world.is_main:
        return None
    if out is not None:
        make_folder(str(out))
    result = MomentResult.of(located)
    checkpoint = find_checkpoint(location)
    run_dir, name = run_folder(location, checkpoint), name or Path(file).stem
    about: dict[str, Any] = {
        "checkpoint": checkpoint_name(run_dir, checkpoint),
        "step": read_state(checkpoint)["step"],
        "method": model.config.model.scorer.name,
        "precision": Precision(model.module.precision, model.module.tf32).products(model.device),
        "counts": {"clips": result.clips, "queries": result.queries, "left_out": len(queries) - result.queries},
    }
    target = Path(out or run_dir)
    older = read_json_object(target / f"moments-{file_stem(name)}.json") or {}
    if (before := older.get("file", str(file))) != str(file):
        logger.warning("%s: the result %s of %s is replaced; --split NAME keeps both", target, name, before)
    options = {"file": str(file), "audio": str(where) if shards is None else None, "shards": shards}
    path = result.save(target, file_stem(name), located, about | options)
    entry = {"split": f"moments/{name}", "kind": "moments", **about, "test_set": {}, "metrics": result.by_name()}
    record_entries(target, run_dir.resolve().name, model.config, [{**entry, "file": path.name}])
    return result


class MomentClips:
    """Clips by the names that a file of moments gives them: in shards, or as audio files in a folder.

    In shards a name is a clip id, else a key, else the last part of a clip id. In the folder it is the path of a file,
    with or without its extension. The first name that fits is taken.
    """

    def __init__(self, where: ShardSet | Path, sample_rate: int) -> None:
        """where: shards, or the folder that paths are relative to. sample_rate: of what is read, in Hz."""
        self.where, self.sample_rate = where, sample_rate

    def read(self, names: Sequence[str]) -> NDArray[np.float32]:
        """The whole clip as a mono waveform. Raises BadSample if there is none, or if it cannot be decoded."""
        if isinstance(self.where, Path):
            return self._read_file(self.where, names)
        row = next((self._rows[name] for name in names if name in self._rows), None)
        if row is None:
            raise BadSample("missing_clip", f"{self.where.location} has no clip {' or '.join(names)}")
        sample = self.where.read(row)
        return decode(sample.audio, sample.extension, self.sample_rate, pcm_rate=sample.sample_rate)

    def _read_file(self, folder: Path, names: Sequence[str]) -> NDArray[np.float32]:
        tried = (folder / f"{name}{ending}" for name in names for ending in ("", *SOURCE_EXTENSIONS))
        path: Path | None = None
        try:
            path = next((path for path in tried if path.is_file()), None)
            if path is None:
                raise BadSample("missing_audio", f"{folder} has no audio file {' or '.join(names)}")
            return decode(path.read_bytes(), path.suffix[1:].lower(), self.sample_rate)
        except OSError as error:
            raise BadSample("unreadable_file", f"{path or names[0]}: {error.strerror}") from None

    @cached_property
    def _rows(self) -> dict[str, int]:
        """Row in the shards of every name. Text alone is read."""
        assert isinstance(self.where, ShardSet)
        shards = self.where

        def clip_id(row: int) -> str | None:
            try:
                return shards.read_text(row)[0]
            except BadSample:
                return None

        with ThreadPoolExecutor(READ_THREADS) as pool:
            ids = list(pool.map(clip_id, range(len(shards))))
        keys = enumerate(shards.keys if shards.unique_keys else ())
        last = {audio_stem(name): row for row, name in enumerate(ids) if name}
        return last | {key: row for row, key in keys} | {name: row for row, name in enumerate(ids) if name}


class _Read(NamedTuple):
    """The rows of a clip with its waveform, or the reason why there is none."""

    rows: list[MomentQuery]
    waveform: NDArray[np.float32] | None
    fault: str


def locate_all(
    queries: Sequence[MomentQuery], clips: MomentClips, locate: Locate, file: str | Path, world: World
) -> list[LocatedQuery]:
    """The spans of all queries, in their order. All ranks call this and share the clips; the main rank has the result.

    file: the name of the file of moments, for messages. A query whose clip cannot be read, or is
    refused by `locate`, is left out with a warning. Raises UserError if no clip can be used.
    """
    by_clip: dict[tuple[str, ...], list[MomentQuery]] = {}
    for row in queries:
        by_clip.setdefault(row.clip, []).append(row)
    own = list(by_clip.values())[world.rank :: world.size]

    def read(rows: list[MomentQuery]) -> _Read:
        try:
            return _Read(rows, clips.read(rows[0].clip), "")
        except BadSample as error:
            return _Read(rows, None, str(error))

    found: list[LocatedQuery] = []
    faults: list[tuple[int, str, int]] = []
    hidden = None if world.is_main else True
    for part in tqdm(load_ahead(read, own), "locating moments", len(own), unit="clip", disable=hidden):
        try:
            if part.waveform is not None:
                found += _located(part.rows, part.waveform, locate, clips.sample_rate)
                continue
            fault = part.fault
        except UserError as error:  # of this clip; the other ranks must not wait for this one
            fault = str(error)
        faults.append((part.rows[0].line, fault, len(part.rows)))
    results = world.gather_objects((found, faults))
    found = sorted((one for some, _ in results for one in some), key=lambda one: one.row.line)
    faults = sorted(fault for _, some in results for fault in some)
    if faults:
        first = f"the first is line {faults[0][0]}: {faults[0][1]}"
        if not found:
            raise UserError(
                f"{file}: none of its clips can be used ({first}): tell where they are, --audio or --shards"
            )
        if world.is_main:
            count = sum(number for _, _, number in faults)
            logger.warning("%s: %d of %d rows are left out, %s", file, count, len(queries), first)
    return found


def _located(
    rows: Sequence[MomentQuery], waveform: NDArray[np.float32], locate: Locate, sample_rate: int
) -> Iterator[LocatedQuery]:
    seconds = len(waveform) / sample_rate
    for row, spans in zip(rows, locate([row.query for row in rows], waveform), strict=True):
        if row.windows.min() >= seconds:
            logger.warning("line %d: all windows begin after the end of the clip, at %.1f s", row.line, seconds)
        yield LocatedQuery(row, spans, seconds)
