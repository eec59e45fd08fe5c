"""manifest.json, the description of a folder of shards. docs/data.md lists its fields."""

from __future__ import annotations

import json
from typing import Any

from atr_scale.data import storage
from atr_scale.errors import UserError

MANIFEST = "manifest.json"
FORMAT = 1  # goes up if older versions can no longer read the shards


def read_manifest(location: str) -> dict[str, Any]:
    """The manifest of the shards in a folder or under an s3:// prefix.

    Raises UserError if the file is not a manifest, or has another format. FileNotFoundError if there is none.
    """
    path = storage.join(location, MANIFEST)
    try:
        manifest: dict[str, Any] = json.loads(storage.read_bytes(path))
        if manifest["format"] != FORMAT:
            raise UserError(f"{path} has format {manifest['format']}, this version reads {FORMAT}: rebuild the shards")
        for shard in manifest["shards"]:
            if len(shard["offsets"]) != len(shard["keys"]) + 1:
                raise UserError(f"{path}: the offsets of {shard['name']} do not fit its keys: rebuild the shards")
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a shard manifest ({error!r}): rebuild the shards") from None
    return manifest
