"""manifest.json, the description of a folder of shards. docs/data.md lists its fields."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any, TypeGuard, TypeVar

from atr_scale.data import storage
from atr_scale.errors import UserError

T = TypeVar("T")

MANIFEST = "manifest.json"
FORMAT = 1  # goes up if older versions can no longer read the shards


def read_manifest(location: str) -> dict[str, Any]:
    """The manifest of the shards in a folder or under an s3:// prefix.

    Raises UserError if the file is not a manifest, is damaged, or has another format. FileNotFoundError if there is
    none.
    """
    path = storage.join(location, MANIFEST)
    try:
        manifest = json.loads(storage.read_bytes(path))
    except (ValueError, RecursionError) as error:
        fault: str | None = f"no JSON: {error}"
    else:
        fault = _fault(manifest)
        if fault is None and manifest["format"] != FORMAT:
            raise UserError(f"{path} has format {manifest['format']}, this version reads {FORMAT}: rebuild the shards")
    if fault:
        raise UserError(
            f"{path} is damaged, or no shard manifest ({fault}): copy it anew, rebuild the shards, or remove it: "
            "shards without a manifest are indexed"
        )
    found: dict[str, Any] = manifest
    return found


def _fault(manifest: Any) -> str | None:
    """What of the fields that are read is missing, or has another shape."""
    if not isinstance(manifest, dict):
        return f"a {type(manifest).__name__}"
    if not isinstance(manifest.get("format"), int):
        return "no format"
    if not isinstance(manifest.get("corpus"), str) or not isinstance(manifest.get("split", ""), str | None):
        return "no names of corpus and split"
    if "split" not in manifest:
        return "no split"
    shards, lists = manifest.get("shards"), manifest.get("exclusions", [])
    if not all_are(lists, dict) or not all(isinstance(each.get("name"), str) for each in lists):
        return "odd exclusions"
    if not all(isinstance(manifest.get(key, 0), int) for key in ("num_samples", "num_captions")):
        return "odd counts"
    if not all_are(shards, dict):
        return "no list of shards"
    names = [shard.get("name") for shard in shards]
    if not all_are(names, str) or len(set(names)) < len(names):
        return "shards without a name of their own"
    return next((f"the entry of {shard['name']}" for shard in shards if not _is_whole(shard)), None)


def _is_whole(shard: dict[str, Any]) -> bool:
    keys: Any
    offsets: Any
    size: Any
    keys, offsets, size = (shard.get(name) for name in ("keys", "offsets", "bytes"))
    captions: Any = shard.get("captions", [0] * len(keys) if isinstance(keys, list) else None)
    return (
        type(size) is int
        and all_are(keys, str)
        and all_are(offsets, int)
        and all_are(captions, int)
        and len(captions) == len(keys) == len(offsets) - 1
        and all(0 <= start <= stop <= size for start, stop in pairwise(offsets))
        and min(captions, default=0) >= 0
        and max(captions, default=0) < 2**31
    )


def all_are(values: Any, kind: type[T]) -> TypeGuard[list[T]]:
    """Whether `values` is a list of values of exactly this type."""
    return isinstance(values, list) and all(type(value) is kind for value in values)
