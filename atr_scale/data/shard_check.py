"""Compare shards with their manifest and name every difference."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from atr_scale.data import storage
from atr_scale.data.audio_source import open_audio
from atr_scale.data.decode import decode_source
from atr_scale.data.manifest import MANIFEST, read_manifest
from atr_scale.data.sample import BadSample
from atr_scale.data.shard_index import ShardScan, scan_shard
from atr_scale.data.shard_reader import check_permissions, no_shards, open_shards, tars_among
from atr_scale.data.shard_writer import RECORDS
from atr_scale.data.tar import BrokenTar, split_key, walk


def check_shards(location: str, deep: bool = False) -> list[str]:
    """Every problem of the shards in a folder or under an s3:// prefix, one line each; empty if there is none.

    Compared with the manifest: missing and extra shards, bytes, sha256, sample count, keys and offsets. Checked with
    and without a manifest: broken, cut (also between two members, if the end marker is missing) and compressed
    archives, incomplete samples, duplicate clip ids, duplicate and dotted keys, names that leave the archive, links and
    devices. `deep` also decodes every sample. Raises UserError if this user may not read a shard, which is not a fault
    of the shard.
    """
    files = storage.list_files(location)
    tars = tars_among(files)
    check_permissions(location, [*tars, *([MANIFEST] if MANIFEST in files else [])])
    expected: dict[str, Any] = {}
    problems = []
    if MANIFEST in files:
        expected = {shard["name"]: shard for shard in read_manifest(location)["shards"]}
        problems += [f"{name}: missing, but in the manifest" for name in expected if name not in tars]
        problems += [f"{name}: not in the manifest" for name in tars if name not in expected]
    elif not tars:
        raise no_shards(location)
    elif storage.list_files(storage.join(location, RECORDS)):
        problems.append(f"{MANIFEST}: missing, the build is not finished; run the same `shards build` again")
    ids: dict[str, str] = {}
    for name, size in tqdm(tars.items(), "checking shards", unit=" shards", disable=None):
        known = ids if name in expected or not expected else {}  # what is not in the manifest is never read
        problems += [
            f"{name}: {problem}" for problem in _shard_problems(location, name, size, expected.get(name), known)
        ]
    return problems + (_deep_problems(location) if deep and not problems else [])


def _shard_problems(
    location: str, name: str, size: int, expected: dict[str, Any] | None, ids: dict[str, str]
) -> Iterator[str]:
    """The problems of one shard; its clip ids are added to `ids`, with their places, and compared with them."""
    path = storage.join(location, name)
    scan = scan_shard(path, size)
    if scan.fault:
        yield f"broken tar: {scan.fault}"
    elif not scan.end_marker:
        yield f"no end marker at byte {size}: the tar is cut at a member boundary"
    for reason, count in scan.dropped.items():
        if reason != "cut_shard":
            yield f"{count} samples with {reason.replace('_', ' ')}"
    for key, clip_id in zip(scan.keys, scan.clip_ids, strict=True):
        place = f"sample {key} of {name}"
        if clip_id and (first := ids.setdefault(clip_id, place)) != place:
            yield f"sample {key}: its clip id {clip_id!r} is also that of {first}"
    yield from _odd_members(path, size)
    if expected is not None:
        yield from _differences(path, size, scan, expected)


def _differences(path: str, size: int, scan: ShardScan, expected: dict[str, Any]) -> Iterator[str]:
    if size != expected["bytes"]:
        yield f"{size} bytes, the manifest says {expected['bytes']}"
    elif _sha256(path, size) != expected.get("sha256"):
        yield "sha256 differs from the manifest's: its content was changed"
    if len(scan.keys) != expected.get("samples"):
        yield f"{len(scan.keys)} samples, the manifest says {expected.get('samples')}"
    elif scan.keys != expected["keys"]:
        yield "keys differ from the manifest's"
    elif scan.offsets != expected["offsets"]:
        yield "offsets differ from the manifest's"


def _odd_members(path: str, size: int) -> Iterator[str]:
    """Members that cannot be part of a sample, and dotted keys, whose extension no reader knows."""
    try:
        with storage.range_reader(path, size) as read:
            for member in walk(read, size):
                if member is None or member.folder:
                    continue
                named = split_key(member)
                if named is None:
                    yield f"member {member.name!r} cannot be part of a sample: a link, a device or an unsafe name"
                elif "." in named[1]:
                    yield f"member {member.name!r} has a dotted key: readers cut it at the first dot"
    except BrokenTar:
        return


def _deep_problems(location: str) -> list[str]:
    shards = open_shards(location)
    problems = []
    for i in tqdm(range(len(shards)), "decoding", unit=" samples", disable=None):
        try:
            sample = shards.read(i)
            source = open_audio(sample.audio, sample.extension, sample.sample_rate)
            decode_source(source, source.rate)
        except BadSample as error:
            problems.append(f"{shards.names[shards.shard_of[i]]}: sample {shards.keys[i]}: {error}")
    return problems


def _sha256(path: str, size: int) -> str:
    """Hex digest of a shard, read in blocks: unlike `files.sha256_of` also from S3."""
    digest = hashlib.sha256()
    for start in range(0, size, storage.BLOCK_BYTES):
        digest.update(storage.read_range(path, start, min(size, start + storage.BLOCK_BYTES)))
    return digest.hexdigest()
