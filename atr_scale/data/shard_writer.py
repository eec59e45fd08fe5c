"""Write one shard: encode its clips into a tar of `<key>.<audio>` + `<key>.json`, and store a record of it."""

from __future__ import annotations

import io
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile

from atr_scale.data import storage
from atr_scale.data.audio_source import open_audio
from atr_scale.data.corpora import Clip
from atr_scale.data.decode import decode_source
from atr_scale.data.dropped import DroppedClip
from atr_scale.data.sample import AUDIO_EXTENSIONS, BadSample
from atr_scale.data.shard_index import scan_shard
from atr_scale.files import sha256_of

ENCODINGS = ("flac", "pcm16", "keep")
RECORDS = ".build"  # folder beside the shards of an unfinished build


@dataclass(frozen=True)
class Task:
    """One shard to write. `first` is the number of its first clip in the split, `sample_rate` is in Hz.

    keep_cut: keep files that are shorter than their header says.
    """

    name: str
    out: str
    corpus: str
    encoding: str
    sample_rate: int | None
    first: int
    clips: list[Clip]
    keep_cut: bool = False


def write_shard(task: Task) -> dict[str, Any]:
    """Encode the clips of one shard and write it. Returns and stores its record; unusable clips are listed there."""
    from webdataset.writer import TarWriter

    path = storage.join(task.out, task.name)
    dropped: list[DroppedClip] = []
    scaled: list[str] = []
    captions, seconds = 0, 0.0
    with storage.atomic_file(path) as local:
        with open(local, "wb") as stream, TarWriter(stream, encoder=False, mtime=0, user="", group="") as writer:
            for number, clip in enumerate(task.clips, task.first):
                try:
                    made = encode(clip.path, task.encoding, task.sample_rate, task.keep_cut)
                except BadSample as error:
                    dropped.append(DroppedClip(clip.clip_id, clip.path, error.reason, error.detail))
                    continue
                if made.gain < 1:
                    scaled.append(clip.clip_id)
                sidecar = _sidecar(task, clip, made.rate, made.seconds)
                writer.write({"__key__": f"{number:09d}", made.extension: made.audio, "json": sidecar})
                captions += len(clip.captions)
                seconds += made.seconds
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
    left_out = [asdict(clip) for clip in dropped]
    record = {"shard": shard, "captions": captions, "seconds": seconds, "dropped": left_out, "scaled": scaled}
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


class StoredAudio(NamedTuple):
    """Audio as a shard stores it: bytes, extension, rate in Hz, seconds, and `AudioSource.gain`."""

    audio: bytes
    extension: str
    rate: int
    seconds: float
    gain: float


def encode(path: str, encoding: str, sample_rate: int | None, keep_cut: bool = False) -> StoredAudio:
    """A source file, which is decoded completely: its length is the number of samples that come out.

    `sample_rate` in Hz, None for the file's own. `keep_cut`: as in `open_audio`. What only torchcodec reads becomes
    flac also with the encoding `keep`, for training to seek in. Raises BadSample if the file cannot be decoded, or is
    silent at 16 bits.
    """
    extension = os.path.splitext(path)[1][1:].lower()
    try:
        original = Path(path).read_bytes()
    except OSError as error:
        raise BadSample("read_error", str(error)) from None
    source = open_audio(original, extension, keep_cut=keep_cut)
    rate = sample_rate or source.rate
    waveform = decode_source(source, rate)
    seconds = len(waveform) / rate
    if encoding == "keep" and source.stored is not None:
        # Readers know these extensions; libsndfile decides by the content.
        extension = extension if extension in AUDIO_EXTENSIONS else "wav"
        return StoredAudio(source.stored, extension, rate, seconds, source.gain)
    # The scale of `decode`, so that a 16-bit original at its own rate is stored unchanged.
    samples = np.clip(np.rint(waveform * 32768), -32768, 32767).astype("<i2")
    if not samples.any():
        raise BadSample("silent_audio", "all samples are zero at 16 bits")
    if encoding == "pcm16":
        return StoredAudio(samples.tobytes(), "pcm", rate, seconds, source.gain)
    buffer = io.BytesIO()
    try:
        soundfile.write(buffer, samples, rate, format="FLAC", subtype="PCM_16")
    except soundfile.SoundFileError:
        raise BadSample("undecodable_audio", f"flac cannot hold {rate} Hz: give --sample-rate") from None
    return StoredAudio(buffer.getvalue(), "flac", rate, seconds, source.gain)


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
