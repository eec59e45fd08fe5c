"""Positions of the samples in shards without a manifest.json (LAION's, for example), from one scan of the tar headers.

The scan also counts the captions in the JSON of each sample. A sample ends at the end of its shard at the latest, so
audio is never paired with the caption of another clip. The index is stored beside the shards or, if that folder cannot
be written, in the cache folder of the user.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from tqdm import tqdm

from atr_scale.data import storage
from atr_scale.data.manifest import FORMAT, all_are
from atr_scale.data.sample import BadSample, group_fault, has_text, parse_texts
from atr_scale.data.tar import BrokenTar, split_key, walk
from atr_scale.errors import UserError, one_line

logger = logging.getLogger(__name__)

INDEX = ".index.json"
SCAN_THREADS = 8


@dataclass(frozen=True)
class ShardScan:
    """Content of one shard by its headers.

    keys, starts, stops, captions: of the complete samples; sample k is the bytes [starts[k], stops[k]) of the shard and
    has captions[k] captions, 0 if its JSON is unusable,
    and the JSON says clip_ids[k], "" if it has none.
    dropped: groups of members that are not a sample, by reason. fault: the broken header, if there is one.
    end_marker: whether the archive ends as it should; one without the marker counts as cut_shard too.
    """

    keys: list[str]
    starts: list[int]
    stops: list[int]
    captions: list[int]
    dropped: Counter[str]
    fault: str | None
    end_marker: bool
    clip_ids: list[str]

    @property
    def offsets(self) -> list[int]:
        """Start of each sample and end of the last one, as a manifest has them: samples without gaps between them."""
        return [*self.starts, *self.stops[-1:]]


@dataclass
class _Group:
    """Neighbouring members with one key."""

    key: str
    start: int
    stop: int
    extensions: list[str]
    texts: dict[str, bytes] = field(default_factory=dict)


def scan_shard(path: str, size: int) -> ShardScan:
    """Scan the headers and JSON files of a shard of `size` bytes once, and group neighbouring members by key."""
    groups: list[_Group] = []
    group: _Group | None = None
    fault, end_marker = None, False
    try:
        with storage.range_reader(path, size) as read:
            for member in walk(read, size):
                named = None if member is None else split_key(member)
                if member is None or named is None:
                    end_marker, group = member is None, None
                    continue
                key, extension = named
                if group is None or group.key != key:
                    group = _Group(key, member.start, member.stop, [])
                    groups.append(group)
                group.stop = member.stop
                group.extensions.append(extension)
                if has_text([extension]):
                    group.texts[extension] = read(member.data_start, member.data_start + member.size)
    except BrokenTar as error:
        fault = str(error)
    cut = Counter({} if end_marker and not fault else {"cut_shard": 1})
    scan = ShardScan([], [], [], [], cut, fault, end_marker, [])
    seen: set[str] = set()
    for group in groups:
        reason = "duplicate_key" if group.key in seen else group_fault(group.extensions)
        seen.add(group.key)
        if reason:
            scan.dropped[reason] += 1
        else:
            scan.keys.append(group.key)
            scan.starts.append(group.start)
            scan.stops.append(group.stop)
            clip_id, captions = _id_and_captions(group.key, group.texts)
            scan.captions.append(captions)
            scan.clip_ids.append(clip_id)
    return scan


def _id_and_captions(key: str, texts: Mapping[str, bytes]) -> tuple[str, int]:
    """("" or the clip id, number of captions) in the JSON and text file of a sample; 0 if they are unusable."""
    try:
        fields = parse_texts(key, texts, "")[0]
    except BadSample:
        return "", 0
    return "" if fields["clip_id"] == f"/{key}" else fields["clip_id"], len(fields["captions"])


def index_shards(location: str, tars: dict[str, int], need_captions: bool = False) -> list[dict[str, Any]]:
    """The index of the shards `tars` (bytes by name): for each its name, keys, starts, stops, captions, dropped groups.

    The stored index is used if it still fits the shards; otherwise they are scanned and the index is stored. One that
    version 0.2 has stored lacks the captions, and is renewed only if they are needed.
    """
    stamp = _stamp(location, tars)
    shards = _load(location, stamp)
    if shards is None or (need_captions and not all("captions" in shard for shard in shards)):
        shards = _scan_all(location, tars)
        _store(location, {"format": FORMAT, "stamp": stamp, "sha256": _checksum(shards), "shards": shards})
    return shards


def _scan_all(location: str, tars: dict[str, int]) -> list[dict[str, Any]]:
    def scan(item: tuple[str, int]) -> dict[str, Any]:
        name, size = item
        found = scan_shard(storage.join(location, name), size)
        fault = found.fault or (None if found.end_marker else f"no end marker at byte {size}")
        if fault:
            logger.warning("%s is cut or damaged: %s; the rest is left out", storage.join(location, name), fault)
        lists = {"keys": found.keys, "starts": found.starts, "stops": found.stops, "captions": found.captions}
        return {"name": name, "bytes": size, **lists, "dropped": dict(found.dropped)}

    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        return list(tqdm(pool.map(scan, tars.items()), "indexing shards", len(tars), unit=" shards", disable=None))


def _stamp(location: str, tars: dict[str, int]) -> list[list[Any]]:
    """A value that changes if a shard does: names, sizes, and modification times or, on S3, the ETags."""
    versions = storage.list_versions(location)
    return [[name, size, versions[name][1] if name in versions else None] for name, size in tars.items()]


def _places(location: str) -> list[str]:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "atr-scale"
    absolute = location if storage.is_remote(location) else os.path.abspath(location)
    return [storage.join(location, INDEX), str(cache / f"{hashlib.sha256(absolute.encode()).hexdigest()[:32]}.json")]


def _load(location: str, stamp: list[list[Any]]) -> list[dict[str, Any]] | None:
    for place in _places(location):
        try:
            index = json.loads(storage.read_bytes(place))
        except OSError:
            continue
        except (ValueError, RecursionError) as error:
            logger.warning("%s is damaged (%s): the shards are indexed again", place, one_line(error))
            continue
        if isinstance(index, dict) and index.get("format") == FORMAT and index.get("stamp") == stamp:
            shards: list[dict[str, Any]] = index.get("shards", [])
            if index.get("sha256", _checksum(shards)) == _checksum(shards) and _fits(location, shards, stamp):
                return shards
            logger.warning("%s does not fit the shards: they are indexed again", place)
    return None


def _fits(location: str, shards: Any, stamp: list[list[Any]]) -> bool:
    """Whether an index describes these shards: its lists are whole, and local shards have its first and last samples.

    A shard may be replaced by one of the same size and time; the shard is right then. An index of an older version has
    no checksum, so its lists are checked.
    """
    try:
        for (name, size, _), shard in zip(stamp, shards, strict=True):
            keys, starts, stops = shard["keys"], shard["starts"], shard["stops"]
            spans = [(0, 0), *zip(starts, stops, strict=True), (size, size)]
            if shard["name"] != name or len(keys) != len(starts) or not all_are(keys, str):
                return False
            if not all(all_are(list(values), int) for values in (starts, stops, shard["dropped"].values())):
                return False
            if any(a[1] > b[0] or b[0] > b[1] for a, b in pairwise(spans)):
                return False
            captions = shard.get("captions", [0] * len(keys))
            if not all_are(captions, int) or len(captions) != len(keys) or not 0 <= max(captions, default=0) < 2**31:
                return False
            if not storage.is_remote(location) and not all(
                _begins_at(storage.join(location, name), keys[k], starts[k], stops[k]) for k in (0, -1) if keys
            ):
                return False
    except (KeyError, TypeError, ValueError, AttributeError, OSError):
        return False
    return True


def _begins_at(path: str, key: str, start: int, stop: int) -> bool:
    """Whether the bytes [start, stop) of a local shard begin with a member of the sample `key`."""
    file = storage.LocalFile(path)
    try:
        member = next(walk(lambda a, b: file.read(start + a, start + b), stop - start), None)
    except BrokenTar:
        return False
    named = None if member is None else split_key(member)
    return named is not None and named[0] == key


def _checksum(shards: Any) -> str:
    return hashlib.sha256(json.dumps(shards).encode()).hexdigest()


def _store(location: str, index: dict[str, Any]) -> None:
    payload = json.dumps(index).encode()
    for place in _places(location):
        try:
            if not storage.is_remote(place):
                os.makedirs(os.path.dirname(place), exist_ok=True)
            storage.write_bytes(place, payload)
            return
        except (OSError, UserError) as error:
            logger.info("the index cannot be stored at %s: %s", place, error)
