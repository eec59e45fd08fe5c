"""Where every sample of a shard set lies, and how to read one.

With a manifest.json the offsets come from there. Other shards (LAION's, say) are indexed once by their tar headers;
a sample's group is closed at its shard's end, so audio never meets the caption of another shard's clip, and the index
is kept beside the shards or, where that cannot be written, in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from atr_scale.data import storage
from atr_scale.data.sample import AUDIO_EXTENSIONS, BadSample, FileSlice, RawSample, parse_json, read_fault
from atr_scale.data.tar import BrokenTar, split_key, walk
from atr_scale.errors import UserError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
INDEX = ".index.json"
FORMAT = 1
SPLIT_NAMES = {
    "train", "training", "development", "val", "valid", "validation", "test", "testing", "evaluation", "eval",
}  # fmt: skip
SCAN_THREADS = 8
HEAD_BYTES = 4096  # of a sample in a local shard: where the audio comes last, all that is before it


@dataclass(frozen=True)
class ShardScan:
    """What a shard's headers say: complete samples, the rest by reason, and how the archive ends."""

    keys: list[str]
    starts: list[int]
    stops: list[int]
    dropped: Counter[str]
    fault: str | None
    end_marker: bool


@dataclass(frozen=True)
class ShardSet:
    """All samples of one folder of shards, in shard order.

    keys [N], shard_of int32 [N] (into `names`), start and stop int64 [N]: bytes of the sample in its shard, from its
    first tar header on. `manifest` is the file's content, empty where there is none. `dropped` counts what an index
    scan left out, by reason.
    """

    location: str
    corpus: str
    split: str
    names: list[str]
    shard_of: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    keys: list[str]
    manifest: dict[str, Any] = field(default_factory=dict, repr=False)
    dropped: dict[str, int] = field(default_factory=dict)
    unique_keys: bool = True

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, i: int) -> RawSample:
        """Sample `i`, its audio in memory. Raises BadSample where its bytes are not exactly that sample."""
        sample = self.open(i)
        return replace(sample, audio=bytes(sample.audio)) if isinstance(sample.audio, FileSlice) else sample

    def open(self, i: int) -> RawSample:
        """Sample `i`; in a local shard its audio stays where it is until it is decoded, and the shard open as long as
        the sample is held. Raises BadSample where its bytes are not exactly that sample."""
        return parse_sample(self._contents(i), self.keys[i], self._set_name(i))

    def read_text(self, i: int) -> tuple[str, list[str], dict[str, Any]]:
        """(clip id, captions, the JSON's rest) of sample `i`; its audio is not read. Raises BadSample."""
        key = self.keys[i]
        try:
            for member in walk(lambda start, stop: self._bytes(i, start, stop), self._size(i)):
                if member is not None and split_key(member) == (key, "json"):
                    payload = self._bytes(i, member.data_start, member.data_start + member.size)
                    fields, meta = parse_json(key, payload, self._set_name(i))
                    return fields["clip_id"], fields["captions"], meta
        except BrokenTar as error:
            raise BadSample("cut_shard", f"{key}: {error}") from None
        raise BadSample("missing_json", key)

    def _size(self, i: int) -> int:
        return int(self.stop[i] - self.start[i])

    def _bytes(self, i: int, start: int, stop: int) -> bytes:
        """The bytes [start, stop) of sample `i`."""
        path, first = self._paths[self.shard_of[i]], int(self.start[i])
        try:
            return storage.read_range(path, first + start, first + stop)
        except OSError as error:
            raise read_fault(path, error) from None

    def _contents(self, i: int) -> memoryview | FileSlice:
        """All bytes of sample `i`: of a remote shard at once, for a request costs more than what it carries."""
        if self._remote:
            return memoryview(self._bytes(i, 0, self._size(i)))
        path, start, stop = self._paths[self.shard_of[i]], int(self.start[i]), int(self.stop[i])
        try:
            file = storage.LocalFile(path)
            return FileSlice(file, start, stop, file.read(start, min(stop, start + HEAD_BYTES)))
        except OSError as error:
            raise read_fault(path, error) from None

    @cached_property
    def _remote(self) -> bool:
        return storage.is_remote(self.location)

    @cached_property
    def _paths(self) -> list[str]:
        return [storage.join(self.location, name) for name in self.names]

    def _set_name(self, i: int) -> str:
        """What makes a clip id for samples that carry none."""
        name = f"{self.corpus}/{self.split}" if self.split else self.corpus
        return name if self.unique_keys else f"{name}/{Path(self.names[self.shard_of[i]]).stem}"


def parse_sample(data: memoryview | FileSlice, key: str, set_name: str) -> RawSample:
    """One sample from its bytes in a shard: regular files that all carry `key`, one JSON and one audio among them.

    `set_name` makes a clip id for shards that carry none. Raises BadSample.
    """
    parts: dict[str, memoryview | FileSlice] = {}
    try:
        for member in walk(lambda start, stop: bytes(data[start:stop]), len(data)):
            named = None if member is None else split_key(member)
            if member is None or named is None or named[0] != key:
                found = "an archive end" if member is None else repr(member.name)
                raise BadSample("mismatched_key", f"{key}: the shard holds {found} there")
            if named[1] in parts:
                raise BadSample("mismatched_key", f"{key}: two members .{named[1]}")
            parts[named[1]] = data[member.data_start : member.data_start + member.size]
    except BrokenTar as error:
        raise BadSample("cut_shard", f"{key}: {error}") from None
    fault = group_fault(list(parts))
    if fault:
        raise BadSample(fault, f"{key}: members {', '.join(parts)}")
    extension = next(e for e in parts if e in AUDIO_EXTENSIONS)
    fields, meta = parse_json(key, parts["json"], set_name)
    return RawSample(key=key, audio=parts[extension], extension=extension, meta=meta, **fields)


def group_fault(extensions: list[str]) -> str | None:
    """Why members with these extensions are no sample, or None: one JSON and one audio, whatever else is beside."""
    if len(set(extensions)) < len(extensions):
        return "duplicate_key"
    audio = sum(e in AUDIO_EXTENSIONS for e in extensions)
    if audio > 1:
        return "several_audios"
    return "missing_audio" if audio == 0 else "missing_json" if "json" not in extensions else None


def open_shards(location: str) -> ShardSet:
    """The shard set in a folder or under an s3:// prefix, with or without a manifest.json.

    UserError where nothing is there, and one that names ALL shards of the manifest that are missing.
    """
    files = storage.list_files(location)
    tars = {name: size for name, size in files.items() if name.endswith(".tar") and not name.startswith(".")}
    if MANIFEST in files:
        return _from_manifest(location, read_manifest(location), tars)
    if not tars:
        raise UserError(f"no shards in {location}: neither {MANIFEST} nor *.tar{_hint(location)}")
    return _from_scan(location, tars)


def read_manifest(location: str) -> dict[str, Any]:
    """The manifest of a folder of shards. UserError where it is none of ours."""
    path = storage.join(location, MANIFEST)
    try:
        manifest = json.loads(storage.read_bytes(path))
        if manifest["format"] != FORMAT:
            raise UserError(f"{path} has format {manifest['format']}, this version reads {FORMAT}: rebuild the shards")
        for shard in manifest["shards"]:
            if len(shard["offsets"]) != len(shard["keys"]) + 1:
                raise UserError(f"{path}: offsets of {shard['name']} do not fit its keys: rebuild the shards")
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a shard manifest ({error!r}): rebuild the shards") from None
    return manifest


def _from_manifest(location: str, manifest: dict[str, Any], tars: dict[str, int]) -> ShardSet:
    shards = manifest["shards"]
    missing = [shard["name"] for shard in shards if shard["name"] not in tars]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(shards)} shards are missing from {location}: {', '.join(missing)}; "
            "copy them again or rerun `atr-scale shards build`"
        )
    changed = [shard["name"] for shard in shards if shard["bytes"] != tars[shard["name"]]]
    if changed:
        logger.warning(
            "%s: %d shards differ from the manifest in size (%s, ...): run `atr-scale shards check`",
            location, len(changed), changed[0],
        )  # fmt: skip
    offsets = [np.asarray(shard["offsets"], np.int64) for shard in shards]
    return _assemble(
        location,
        manifest["corpus"],
        manifest["split"] or "",
        [shard["name"] for shard in shards],
        [shard["keys"] for shard in shards],
        [o[:-1] for o in offsets],
        [o[1:] for o in offsets],
        manifest=manifest,
    )


def _from_scan(location: str, tars: dict[str, int]) -> ShardSet:
    index = _load_index(location, tars)
    if index is None:
        index = _scan_all(location, tars)
        _store_index(location, index)
    dropped = Counter[str]()
    for shard in index["shards"]:
        dropped.update(shard["dropped"])
    if dropped:
        logger.warning("%s: left out while indexing: %s", location, dict(dropped))
    keys = [shard["keys"] for shard in index["shards"]]
    if not any(keys):
        raise UserError(
            f"no sample in the {len(tars)} shards of {location}: {dict(dropped)}; are they audio-text tars?"
        )
    parts = [part for part in location.rstrip("/").split("/") if part] or [location]
    split = parts[-1] if parts[-1].lower() in SPLIT_NAMES and len(parts) > 1 else ""
    return _assemble(
        location,
        parts[-2] if split else parts[-1],
        split,
        [shard["name"] for shard in index["shards"]],
        keys,
        [np.asarray(shard["starts"], np.int64) for shard in index["shards"]],
        [np.asarray(shard["stops"], np.int64) for shard in index["shards"]],
        dropped=dict(dropped),
    )


def _assemble(
    location: str,
    corpus: str,
    split: str,
    names: list[str],
    keys: list[list[str]],
    starts: list[np.ndarray],
    stops: list[np.ndarray],
    **more: Any,
) -> ShardSet:
    flat = [key for shard in keys for key in shard]
    return ShardSet(
        location=location,
        corpus=corpus,
        split=split,
        names=names,
        shard_of=np.repeat(np.arange(len(names), dtype=np.int32), [len(shard) for shard in keys]),
        start=np.concatenate(starts) if starts else np.zeros(0, np.int64),
        stop=np.concatenate(stops) if stops else np.zeros(0, np.int64),
        keys=flat,
        unique_keys=len(set(flat)) == len(flat),
        **more,
    )


def scan_shard(path: str, size: int) -> ShardScan:
    """Group a shard's members by key, in one pass over its headers. Members of a sample lie side by side."""
    keys: list[str] = []
    starts: list[int] = []
    stops: list[int] = []
    dropped: Counter[str] = Counter()
    fault, end_marker = None, False
    group: tuple[str, int, int, list[str]] | None = None

    seen: set[str] = set()

    def close() -> None:
        if group is None:
            return
        reason = "duplicate_key" if group[0] in seen else group_fault(group[3])
        seen.add(group[0])
        if reason:
            dropped[reason] += 1
        else:
            keys.append(group[0])
            starts.append(group[1])
            stops.append(group[2])

    try:
        with storage.range_reader(path, size) as read:
            for member in walk(read, size):
                named = None if member is None else split_key(member)
                if member is None or named is None:
                    end_marker = member is None
                    close()
                    group = None
                elif group is not None and named[0] == group[0]:
                    group = (group[0], group[1], member.stop, [*group[3], named[1]])
                else:
                    close()
                    group = (named[0], member.start, member.stop, [named[1]])
    except BrokenTar as error:
        fault = str(error)
        dropped["cut_shard"] += 1
    close()
    return ShardScan(keys, starts, stops, dropped, fault, end_marker)


def _scan_all(location: str, tars: dict[str, int]) -> dict[str, Any]:
    def scan(item: tuple[str, int]) -> dict[str, Any]:
        name, size = item
        found = scan_shard(storage.join(location, name), size)
        if found.fault:
            logger.warning("%s: %s; the rest of the shard is left out", storage.join(location, name), found.fault)
        lists = {"keys": found.keys, "starts": found.starts, "stops": found.stops}
        return {"name": name, "bytes": size, **lists, "dropped": dict(found.dropped)}

    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        shards = list(tqdm(pool.map(scan, tars.items()), "indexing shards", len(tars), unit=" shards", disable=None))
    return {"format": FORMAT, "stamp": _stamp(location, tars), "shards": shards}


def _stamp(location: str, tars: dict[str, int]) -> list[list[Any]]:
    """Changes when a shard does: sizes, and locally the times of modification."""
    if storage.is_remote(location):
        return [[name, size] for name, size in tars.items()]
    return [[name, size, os.stat(os.path.join(location, name)).st_mtime_ns] for name, size in tars.items()]


def _index_places(location: str) -> list[str]:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "atr-scale"
    absolute = location if storage.is_remote(location) else os.path.abspath(location)
    return [storage.join(location, INDEX), str(cache / f"{hashlib.sha256(absolute.encode()).hexdigest()[:32]}.json")]


def _load_index(location: str, tars: dict[str, int]) -> dict[str, Any] | None:
    for place in _index_places(location):
        try:
            index = json.loads(storage.read_bytes(place))
        except (OSError, ValueError):
            continue
        if index.get("format") == FORMAT and index.get("stamp") == _stamp(location, tars):
            return index
    return None


def _store_index(location: str, index: dict[str, Any]) -> None:
    payload = json.dumps(index).encode()
    for place in _index_places(location):
        try:
            if not storage.is_remote(place):
                os.makedirs(os.path.dirname(place), exist_ok=True)
            storage.write_bytes(place, payload)
            return
        except (OSError, UserError) as error:
            logger.info("the index cannot be kept at %s: %s", place, error)


def _hint(location: str) -> str:
    if storage.is_remote(location):
        return ""
    if not os.path.isdir(location):
        return " (there is no such folder): build them with `atr-scale shards build`"
    inside = sorted(entry.parent.name for entry in Path(location).glob(f"*/{MANIFEST}"))
    return f"; did you mean {', '.join(os.path.join(location, name) for name in inside)}?" if inside else ""
