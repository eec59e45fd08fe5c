"""A set of shards: its samples, their positions in the shards, and reading one of them.

The position of each sample comes from manifest.json or, without one, from an index (`shard_index`).
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from atr_scale.data import storage
from atr_scale.data.manifest import MANIFEST, read_manifest
from atr_scale.data.sample import (
    AUDIO_EXTENSIONS,
    BadSample,
    Bytes,
    FileSlice,
    RawSample,
    group_fault,
    has_text,
    parse_texts,
    read_fault,
)
from atr_scale.data.shard_index import index_shards
from atr_scale.data.splits import is_split_name
from atr_scale.data.tar import BrokenTar, split_key, walk
from atr_scale.errors import UserError

logger = logging.getLogger(__name__)

READ_THREADS = 8  # that read texts at once, for shards on S3
HEAD_BYTES = 4096  # read first of a sample in a local shard: if its audio comes last, everything before the audio


@dataclass(frozen=True)
class ShardSet:
    """All samples of one folder of shards, in shard order.

    keys [N], shard_of int32 [N] (index into `names`), start and stop int64 [N]: bytes of the sample in its shard, from
    its first tar header on. `manifest` is the file's content, empty if there is no file. `dropped` counts the groups of
    members that an index left out, by reason. captions: int32 [N], number of captions of each sample; None if neither
    the manifest nor the index lists it, which is so if version 0.2 or older has written them.
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
    captions: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def num_captions(self) -> int | None:
        """Captions of all samples; None if they have to be counted."""
        if self.captions is not None:
            return int(self.captions.sum())
        whole = len(self) == self.manifest.get("num_samples")
        return self.manifest.get("num_captions") if whole else None

    def count_captions(self) -> int:
        """Captions of all samples. If they are not known, the shards are scanned, once: the index is stored."""
        if (known := self.num_captions) is not None:
            return known
        index = index_shards(self.location, tars_among(storage.list_files(self.location)), need_captions=True)
        found = {shard["name"]: dict(zip(shard["keys"], shard["captions"], strict=True)) for shard in index}
        return sum(found[self.names[n]].get(key, 0) for n, key in zip(self.shard_of.tolist(), self.keys, strict=True))

    def read(self, i: int) -> RawSample:
        """Sample `i` with its audio in memory. Raises BadSample if its bytes are not exactly that sample."""
        sample = self.open(i)
        return replace(sample, audio=bytes(sample.audio)) if isinstance(sample.audio, FileSlice) else sample

    def open(self, i: int) -> RawSample:
        """Sample `i`. In a local shard its audio is read only when it is decoded, and the file stays open for as long
        as the sample is referenced. Raises BadSample if its bytes are not exactly that sample."""
        return parse_sample(self._contents(i), self.keys[i], self._set_name(i))

    def read_text(self, i: int) -> tuple[str, list[str], dict[str, Any]]:
        """(clip id, captions, other fields of the JSON) of sample `i`, without reading its audio. Raises BadSample."""
        key = self.keys[i]
        texts: dict[str, Bytes] = {}
        try:
            for member in walk(lambda start, stop: self._bytes(i, start, stop), self._size(i)):
                named = None if member is None else split_key(member)
                if member is None or named is None or named[0] != key or not has_text(named[1:]):
                    continue
                texts[named[1]] = self._bytes(i, member.data_start, member.data_start + member.size)
                if named[1] == "json" and (found := self._texts(i, texts)):
                    return found
        except BrokenTar as error:
            raise BadSample("cut_shard", f"{key}: {error}") from None
        if not texts:
            raise BadSample("missing_json", key)
        found = self._texts(i, texts)
        if found is None:
            raise BadSample("no_caption", key)
        return found

    def _texts(self, i: int, texts: dict[str, Bytes]) -> tuple[str, list[str], dict[str, Any]] | None:
        """What `read_text` returns, from these members by extension; None if they have no caption. Raises BadSample."""
        try:
            fields, meta = parse_texts(self.keys[i], texts, self._set_name(i))
        except BadSample as error:
            if error.reason == "no_caption":
                return None
            raise
        return fields["clip_id"], fields["captions"], meta

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
        """All bytes of sample `i`. Those of a remote shard are read at once: a second request costs more than bytes."""
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
        """First part of the clip id of a sample without one."""
        name = f"{self.corpus}/{self.split}" if self.split else self.corpus
        return name if self.unique_keys else f"{name}/{Path(self.names[self.shard_of[i]]).stem}"


def parse_sample(data: memoryview | FileSlice, key: str, set_name: str) -> RawSample:
    """One sample from its bytes in a shard: plain files that all have the key `key`, one audio and its captions.

    `set_name` is the first part of the clip id if the JSON has none. Raises BadSample.
    """
    parts: dict[str, memoryview | FileSlice] = {}
    try:
        for member in walk(lambda start, stop: bytes(data[start:stop]), len(data)):
            named = None if member is None else split_key(member)
            if member is None or named is None or named[0] != key:
                found = "an archive end" if member is None else repr(member.name)
                raise BadSample("mismatched_key", f"{key}: the shard has {found} there")
            if named[1] in parts:
                raise BadSample("mismatched_key", f"{key}: two members .{named[1]}")
            parts[named[1]] = data[member.data_start : member.data_start + member.size]
    except BrokenTar as error:
        raise BadSample("cut_shard", f"{key}: {error}") from None
    fault = group_fault(list(parts))
    if fault:
        raise BadSample(fault, f"{key}: members {', '.join(parts)}")
    extension = next(e for e in parts if e in AUDIO_EXTENSIONS)
    fields, meta = parse_texts(key, parts, set_name)
    return RawSample(key=key, audio=parts[extension], extension=extension, meta=meta, **fields)


def refuse_repeated_ids(shards: ShardSet) -> None:
    """UserError with both places if a clip id occurs twice in a set: evaluation gives every clip one column."""

    def clip_id(i: int) -> str | None:
        try:
            return shards.read_text(i)[0]
        except BadSample:
            return None  # the evaluation reports it

    places: dict[str, int] = {}
    with ThreadPoolExecutor(READ_THREADS) as pool:
        for i, found in enumerate(pool.map(clip_id, range(len(shards)))):
            if found is None or places.setdefault(found, i) == i:
                continue
            first, second = (
                f"sample {shards.keys[n]} of {shards.names[shards.shard_of[n]]}" for n in (places[found], i)
            )
            raise UserError(
                f"{shards.location}: clip id {found!r} is that of {first} and of {second}; "
                "`atr-scale shards check` lists all of them, build the shards again with distinct ids"
            )


def tars_among(files: dict[str, int]) -> dict[str, int]:
    """The shards among `files` (bytes by name); hidden ones are unfinished and left out."""
    return {name: size for name, size in files.items() if name.endswith(".tar") and not name.startswith(".")}


def open_shards(location: str) -> ShardSet:
    """The shards in a folder or under an s3:// prefix, with or without a manifest.json.

    Raises UserError if there are none, if this user may not read them, or if shards of the manifest are missing (it
    names all of them).
    """
    files = storage.list_files(location)
    tars = tars_among(files)
    check_permissions(location, [MANIFEST] if MANIFEST in files else list(tars))
    if MANIFEST in files:
        return _from_manifest(location, read_manifest(location), tars)
    if not tars:
        raise no_shards(location)
    return _from_index(location, tars)


def check_permissions(location: str, names: Sequence[str]) -> None:
    """Raises UserError if this user may not read some of the files `names` of a local folder."""
    if storage.is_remote(location):
        return
    paths = (os.path.join(location, name) for name in names)
    denied = [path for path in paths if not os.access(path, os.R_OK, effective_ids=True)]
    if denied:
        raise UserError(
            f"no permission to read {len(denied)} of {len(names)} files in {location}, for example {denied[0]}: make "
            f"them readable for this user (uid {os.geteuid()}), for example with chmod a+r; they are not damaged"
        )


class _Shard(NamedTuple):
    """Keys, positions and numbers of captions (None: unknown) of one shard's samples; starts, stops int64 [samples]."""

    name: str
    keys: list[str]
    starts: np.ndarray
    stops: np.ndarray
    captions: list[int] | None


def _from_manifest(location: str, manifest: dict[str, Any], tars: dict[str, int]) -> ShardSet:
    shards = manifest["shards"]
    missing = [shard["name"] for shard in shards if shard["name"] not in tars]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(shards)} shards are missing from {location}: {', '.join(missing)}; "
            "copy them again or rerun `atr-scale shards build`"
        )
    check_permissions(location, [shard["name"] for shard in shards])
    changed = [shard["name"] for shard in shards if shard["bytes"] != tars[shard["name"]]]
    if changed:
        logger.warning(
            "%s: %d shards differ from the manifest in size (%s, ...): run `atr-scale shards check`",
            location, len(changed), changed[0],
        )  # fmt: skip
    offsets = [_int64(shard["offsets"]) for shard in shards]
    found = [
        _Shard(s["name"], s["keys"], o[:-1], o[1:], s.get("captions")) for s, o in zip(shards, offsets, strict=True)
    ]
    return _assemble(location, manifest["corpus"], manifest["split"] or "", found, manifest=manifest)


def _from_index(location: str, tars: dict[str, int]) -> ShardSet:
    shards = index_shards(location, tars)
    dropped = Counter[str]()
    for shard in shards:
        dropped.update(shard["dropped"])
    if dropped:
        logger.warning("%s: left out of the index: %s", location, dict(dropped))
    found = [_Shard(s["name"], s["keys"], _int64(s["starts"]), _int64(s["stops"]), s.get("captions")) for s in shards]
    if not any(shard.keys for shard in found):
        raise UserError(
            f"no sample in the {len(tars)} shards of {location}: {dict(dropped)}; are they audio-text tars?"
        )
    parts = [part for part in location.rstrip("/").split("/") if part] or [location]
    split = parts[-1] if is_split_name(parts[-1]) and len(parts) > 1 else ""
    return _assemble(location, parts[-2] if split else parts[-1], split, found, dropped=dict(dropped))


def _assemble(location: str, corpus: str, split: str, shards: Sequence[_Shard], **more: Any) -> ShardSet:
    flat = [key for shard in shards for key in shard.keys]
    captions = [shard.captions for shard in shards]
    none = np.zeros(0, np.int64)
    return ShardSet(
        location=location,
        corpus=corpus,
        split=split,
        names=[shard.name for shard in shards],
        shard_of=np.repeat(np.arange(len(shards), dtype=np.int32), [len(shard.keys) for shard in shards]),
        start=np.concatenate([none, *(shard.starts for shard in shards)]),
        stop=np.concatenate([none, *(shard.stops for shard in shards)]),
        keys=flat,
        unique_keys=len(set(flat)) == len(flat),
        captions=None if None in captions else np.array([n for counts in captions for n in counts or ()], np.int32),
        **more,
    )


def _int64(values: list[int]) -> np.ndarray:
    return np.asarray(values, np.int64)


def no_shards(location: str) -> UserError:
    """The error of a location without shards, with what may have been meant."""
    return UserError(f"no shards in {location}: neither {MANIFEST} nor *.tar{_hint(location)}")


def _hint(location: str) -> str:
    folder, _, last = location.rstrip("/").rpartition("/")
    if last.endswith(".tar") or re.search(r"[*?\[{]", last):
        what = "one shard" if not re.search(r"[*?\[{]", last) else "a pattern"
        return f"; it is {what}: give the folder {folder or '.'}, whose shards are all read"
    if storage.is_remote(location):
        return ""
    if not os.path.isdir(location):
        return " (there is no such folder): build them with `atr-scale shards build`"
    inside = sorted(entry.parent.name for entry in Path(location).glob(f"*/{MANIFEST}"))
    return f"; did you mean {', '.join(os.path.join(location, name) for name in inside)}?" if inside else ""
