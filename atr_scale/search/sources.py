"""What can be embedded: a folder of audio, one recording, a table of captions, shards. And one `Item` of it read back.

A source lists its clips, with the size and version of each, before any of them is read.
"""

from __future__ import annotations

import functools
import mmap
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from atr_scale.data import storage
from atr_scale.data.audio_source import AudioSource, Span, open_audio
from atr_scale.data.corpora.audio_files import SOURCE_EXTENSIONS, normal_name, walk_audio
from atr_scale.data.corpora.folder import ALL, Folder, FolderOptions
from atr_scale.data.dropped import DroppedClip
from atr_scale.data.sample import BadSample, Bytes
from atr_scale.data.shard_reader import ShardSet, open_shards, tars_among
from atr_scale.errors import Failure, UserError
from atr_scale.search.vectors import Item

TABLES = (".csv", ".tsv", ".txt", ".jsonl", ".parquet")
CAPTIONS = "captions.csv"
MAPPED_BYTES = 16 << 20  # larger files are mapped: then an hour of audio needs no memory for all of it
IN_SHARD = ".tar#"  # in the path of a clip of a shard: SHARD.tar#KEY


class ListedClip(NamedTuple):
    """A clip before it is read. size: bytes. version: changes if its bytes do: an ETag, or a time of change.

    id and captions: of a clip of a shard they are empty, because they are read with it.
    """

    id: str
    path: str
    captions: tuple[str, ...]
    size: int
    version: str | int


@dataclass(frozen=True)
class Recording:
    """A clip that can be opened, several times at once. audio: its bytes, or its file. pcm_rate: as for open_audio."""

    id: str
    path: str
    captions: tuple[str, ...]
    audio: Bytes | Path
    extension: str
    pcm_rate: int | None = None

    def open(self, whole: bool = True) -> AudioSource:
        """whole: as for `open_audio`. Raises BadSample."""
        audio = _contents(self.audio) if isinstance(self.audio, Path) else self.audio
        return open_audio(audio, self.extension, self.pcm_rate, whole=whole)


class SoundSource(ABC):
    """Clips in a fixed order. dropped: those that were left out when they were listed."""

    location: str
    entries: list[ListedClip]
    dropped: list[DroppedClip]

    @abstractmethod
    def read(self, i: int) -> Recording:
        """Clip `i`. Raises BadSample if it cannot be used, Failure if the store or the disk cannot be read now."""


class _Files(SoundSource):
    def __init__(self, location: Path, clips: Iterable[tuple[str, str, tuple[str, ...]]]) -> None:
        """clips: id, path and captions."""
        self.location, self.entries, self.dropped = str(location), [], []
        for clip_id, path, captions in clips:
            try:
                stat = os.stat(path)
                path.encode()
            except UnicodeEncodeError:  # no file of ours can hold such a name
                self.dropped.append(_drop(repr(clip_id), repr(path), "bad_name", "not UTF-8: rename the file"))
            except OSError as error:
                self.dropped.append(_drop(clip_id, path, "unreadable_file", error.strerror or str(error)))
            else:
                if S_ISREG(stat.st_mode):
                    self.entries.append(ListedClip(clip_id, path, captions, stat.st_size, stat.st_mtime_ns))
                else:  # a pipe would be waited for
                    self.dropped.append(_drop(clip_id, path, "unreadable_file", "not a regular file"))

    def read(self, i: int) -> Recording:
        entry = self.entries[i]
        return Recording(entry.id, entry.path, entry.captions, Path(entry.path), _extension(entry.path))


class _Shards(SoundSource):
    def __init__(self, location: str) -> None:
        self.location, self.dropped = location, []
        self.shards = open_shards(location)
        versions = storage.list_versions(location)
        places = zip(self.shards.shard_of.tolist(), self.shards.keys, self.shards.start, self.shards.stop, strict=True)
        paths = [storage.join(location, name) for name in self.shards.names]
        self.entries = [
            ListedClip("", f"{paths[n]}#{key}", (), int(stop - start), versions[self.shards.names[n]][1])
            for n, key, start, stop in places
        ]

    def read(self, i: int) -> Recording:
        return _recording(self.shards, i, self.entries[i].path)


def open_source(location: str | Path) -> SoundSource:
    """The clips of a folder of audio, of an audio file, of a table (as captions.csv), or of shards, local or on S3.

    A folder may have a captions.csv. Paths become absolute. Raises UserError if there are no clips.
    """
    location = str(location)
    if storage.is_remote(location):
        return _Shards(location)
    path = Path(os.path.abspath(location))
    if path.is_dir():
        if tars_among(storage.list_files(str(path))):
            return _Shards(str(path))
        source: SoundSource = _folder(path)
    elif not path.exists():
        raise UserError(f"there is no {location}: give a folder of audio, a table of captions, or shards")
    elif path.suffix.lower() in TABLES:
        source = _table(path)
    elif path.suffix.lower() in SOURCE_EXTENSIONS:
        source = _Files(path, [(normal_name(path.name), str(path), ())])
    else:
        raise UserError(
            f"{location} is no audio file and no table ({', '.join(TABLES)}): give a folder of audio, a table of "
            "captions, or the folder of shards"
        )
    if not source.entries:
        drop = source.dropped[0] if source.dropped else None
        first = f"; {drop.path or drop.clip_id}: {drop.reason}, {drop.detail}" if drop else ""
        raise UserError(f"no audio files in {location}{first}: give a folder with .wav, .flac, .mp3 or other audio")
    return source


def item_audio(item: Item) -> tuple[NDArray[np.float32], int]:
    """The audio of an item, its window only, as a mono waveform [samples] and its rate in Hz.

    Raises UserError if it is not there any more or cannot be read.
    """
    try:
        recording = _find(item.path)
        source = recording.open(whole=item.start is None)
        if item.start is not None and item.stop is not None:
            source = span_of(source, item.start, item.stop)
        if not source.frames:
            raise BadSample("short_audio", f"it ends before {item.start:g} s")
        return np.asarray(source.read(0, source.frames), np.float32), source.rate
    except BadSample as error:
        raise UserError(f"{item.path} cannot be read ({error}): embed the source again if it has changed") from None


def span_of(source: AudioSource, start: float, stop: float) -> Span:
    """The part of a source from `start` to `stop` seconds."""
    first = round(start * source.rate)
    return Span(source, first, round(stop * source.rate) - first)


def _folder(path: Path) -> _Files:
    """All audio below a folder, or below its audio/ if it has a captions.csv that names files there."""
    table = path / CAPTIONS
    audio = path / "audio" if table.is_file() and (path / "audio").is_dir() else path
    known = {file: (clip_id, captions) for clip_id, file, captions in _table_clips(table)[0]} if table.is_file() else {}
    prefix = f"{path.name}/" if path.name else ""
    clips = []
    for name, file in walk_audio([audio]):
        clip_id, captions = known.get(file, (prefix + normal_name(name), ()))
        clips.append((clip_id, file, captions))
    return _Files(path, clips)


def _table(path: Path) -> _Files:
    clips, dropped = _table_clips(path)
    files = _Files(path, clips)
    files.dropped = [*dropped, *files.dropped]
    return files


def _table_clips(table: Path) -> tuple[list[tuple[str, str, tuple[str, ...]]], list[DroppedClip]]:
    """(id, path, captions) of the rows of a table whose audio is there, and the other rows.

    Ids are those of shards that are built of the table. Rows that lead to one file are one clip.
    """
    root = table.parent
    audio = root / "audio" if (root / "audio").is_dir() else root
    corpus = Folder("folder", root, FolderOptions(captions=str(table), audio=str(audio)))
    rows = corpus.read_clips(ALL)
    clips: dict[str, tuple[str, tuple[str, ...]]] = {}
    dropped = [DroppedClip("", place, "bad_row", detail) for place, detail in corpus.bad_rows.items()]
    for clip, path in zip(rows, corpus.find_audio(ALL, rows), strict=True):
        if path:
            clip_id, captions = clips.get(path, (clip.clip_id, ()))
            clips[path] = clip_id, (*captions, *clip.captions)
        else:
            dropped.append(_drop(clip.clip_id, "", "missing_audio", corpus.missing.get(clip.clip_id, "")))
    return [(clip_id, path, captions) for path, (clip_id, captions) in clips.items()], dropped


def _drop(clip_id: str, path: str, reason: str, detail: str) -> DroppedClip:
    return DroppedClip(clip_id, path, reason, detail)


def _extension(path: str) -> str:
    return os.path.splitext(path)[1][1:].lower()


def _contents(path: Path) -> bytes | mmap.mmap:
    """The bytes of a file, mapped if they are many. Raises BadSample if it is gone or not readable for this user."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size <= MAPPED_BYTES:
                return file.read()
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise BadSample("unreadable_file", str(error.strerror)) from None
    except OSError as error:
        raise Failure(f"{path} cannot be read ({error.strerror}): start the same command again") from None


def _recording(shards: ShardSet, i: int, path: str) -> Recording:
    sample = shards.open(i)
    audio, rate = sample.audio, sample.sample_rate
    return Recording(sample.clip_id, path, tuple(sample.captions), audio, sample.extension, rate)


def _find(path: str) -> Recording:
    """The recording of an item's path."""
    if IN_SHARD not in path or (not storage.is_remote(path) and os.path.exists(path)):
        return Recording(path, path, (), Path(path), _extension(path))
    shard, _, key = path.partition(IN_SHARD)
    location, _, name = f"{shard}.tar".rpartition("/")
    shards, places = _opened(location)
    if (name, key) not in places:
        raise BadSample("missing_clip", f"{location} has no sample {key} in {name}")
    return _recording(shards, places[name, key], path)


@functools.lru_cache(maxsize=4)
def _opened(location: str) -> tuple[ShardSet, dict[tuple[str, str], int]]:
    """The shards at a location, and the number of every sample by the names of its shard and its key."""
    shards = open_shards(location)
    names = [shards.names[n] for n in shards.shard_of.tolist()]
    return shards, {place: i for i, place in enumerate(zip(names, shards.keys, strict=True))}
