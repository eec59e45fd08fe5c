"""Write one shard: encode its clips into a tar of `<key>.<audio>` + `<key>.json`, and store a record of it."""

from __future__ import annotations

import io
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from atr_scale.data import storage
from atr_scale.data.corpora import Clip
from atr_scale.data.decode import decode, probe
from atr_scale.data.dropped import DroppedClip
from atr_scale.data.sample import AUDIO_EXTENSIONS, BadSample
from atr_scale.data.shard_index import scan_shard
from atr_scale.files import sha256_of

ENCODINGS = ("flac", "pcm16", "keep")
RECORDS = ".build"  # folder beside the shards of an unfinished build


@dataclass(frozen=True)
class Task:
    """One shard to write. `first` is the number of its first clip in the split, `sample_rate` is in Hz."""

    name: str
    out: str
    corpus: str
    encoding: str
    sample_rate: int | None
    first: int
    clips: list[Clip]


def write_shard(task: Task) -> dict[str, Any]:
    """Encode the clips of one shard and write it. Returns and stores its record; unusable clips are listed there."""
    from webdataset.writer import TarWriter

    path = storage.join(task.out, task.name)
    dropped: list[DroppedClip] = []
    captions, seconds = 0, 0.0
    with storage.atomic_file(path) as local:
        with open(local, "wb") as stream, TarWriter(stream, encoder=False, mtime=0, user="", group="") as writer:
            for number, clip in enumerate(task.clips, task.first):
                try:
                    audio, extension, rate, duration = encode(clip.path, task.encoding, task.sample_rate)
                except BadSample as error:
                    dropped.append(DroppedClip(clip.clip_id, clip.path, error.reason, error.detail))
                    continue
                # Readers know these extensions; libsndfile decides by the content.
                stored = extension if extension in AUDIO_EXTENSIONS else "wav"
                writer.write({"__key__": f"{number:09d}", stored: audio, "json": _sidecar(task, clip, rate, duration)})
                captions += len(clip.captions)
                seconds += duration
        scan = scan_shard(str(local), local.stat().st_size)
        assert not scan.fault and not scan.dropped, f"{path} was not written as planned: {scan}"
        shard = {
            "name": task.name,
            "samples": len(scan.keys),
            "bytes": local.stat().st_size,
            "sha256": sha256_of(local),
            "keys": scan.keys,
            "offsets": scan.offsets,
            "captions": scan.captions,
        }
    record = {"shard": shard, "captions": captions, "seconds": seconds, "dropped": [asdict(clip) for clip in dropped]}
    storage.write_bytes(record_path(task.out, task.name), json.dumps(record).encode())
    return record


def finished_shards(location: str) -> dict[str, dict[str, Any]]:
    """The records of the shards that an unfinished build has written, by the name of the shard."""
    records = {}
    folder = storage.join(location, RECORDS)
    for name in storage.list_files(folder):
        if name.startswith("shard-"):
            record = json.loads(storage.read_bytes(storage.join(folder, name)))
            records[record["shard"]["name"]] = record
    return records


def record_path(location: str, name: str) -> str:
    """The file of an unfinished build's record `name`."""
    return storage.join(storage.join(location, RECORDS), f"{name}.json")


def encode(path: str, encoding: str, sample_rate: int | None) -> tuple[bytes, str, int, float]:
    """(audio bytes, extension, sample rate in Hz, seconds) of a source file, which is decoded completely.

    `sample_rate` in Hz, None for the file's own. Raises BadSample if the file cannot be decoded.
    """
    extension = os.path.splitext(path)[1][1:].lower()
    try:
        original = Path(path).read_bytes()
    except OSError as error:
        raise BadSample("read_error", str(error)) from None
    frames, own_rate = probe(original, extension)
    rate = sample_rate or own_rate
    waveform = decode(original, extension, rate)
    if encoding == "keep":
        return original, extension, own_rate, frames / own_rate
    # The scale of `decode`, so that a 16-bit original at its own rate is stored unchanged.
    samples = np.clip(np.rint(waveform * 32768), -32768, 32767).astype("<i2")
    if encoding == "pcm16":
        return samples.tobytes(), "pcm", rate, len(samples) / rate
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="FLAC", subtype="PCM_16")
    return buffer.getvalue(), "flac", rate, len(samples) / rate


def _sidecar(task: Task, clip: Clip, rate: int, duration: float) -> bytes:
    fields = {
        "clip_id": clip.clip_id,
        "corpus": task.corpus,
        "split": clip.split,
        "captions": clip.captions,
        "duration": round(duration, 6),
        "sample_rate": rate,
        **({"label": clip.label} if clip.label else {}),
    }
    return json.dumps({**clip.meta, **fields}, ensure_ascii=False).encode()
