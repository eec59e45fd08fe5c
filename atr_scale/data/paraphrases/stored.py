"""The file of paraphrases beside the shards: one JSON line for each caption that has been asked about.

A line without its newline is ignored, so an interrupted write costs at most one line. A caption without any kept
paraphrase has a line too, so that it is not asked about again. Of two lines about one caption the later one counts.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import numpy as np

from atr_scale.batch import stable_id
from atr_scale.data import storage
from atr_scale.data.sample import clean_captions
from atr_scale.data.splits import is_held_out
from atr_scale.errors import UserError

FILE = "captions.augmented.jsonl"
# On S3 each upload writes the whole object: not more often than this, and for at most a twentieth of the time.
UPLOAD_EVERY_S, UPLOAD_SHARE = 10.0, 1 / 20


def refuse_evaluation_split(place: str, split: str) -> None:
    """Raises UserError if `split` is one that models are evaluated on."""
    if is_held_out(split):
        raise UserError(f"{place} is of the split '{split}': paraphrases are for training captions only")


def caption_key(clip_id: str, caption_index: int, caption: str) -> int:
    """Id of one caption of one clip. It depends on the text: paraphrases of an earlier wording are not found."""
    return stable_id(f"{clip_id}\n{caption_index}\n{caption}")


def make_record(
    clip_id: str, caption_index: int, caption: str, kept: list[tuple[str, float]], **origin: Any
) -> dict[str, Any]:
    """One line of the file. kept: (paraphrase, cosine to the caption); origin: model, text_encoder, prompt_version."""
    paraphrases = [{"text": text, "cosine": round(cosine, 4)} for text, cosine in kept]
    place = {"clip_id": clip_id, "caption_index": caption_index, "caption": caption}
    return {**place, "paraphrases": paraphrases, **origin}


def read_records(location: str) -> Iterator[tuple[int, list[str]]]:
    """(caption key, paraphrases) of each line of the file beside the shards at `location`; nothing without a file.

    Raises UserError with the number of the first line that is not a record.
    """
    path = storage.join(location, FILE)
    try:
        lines = _whole_lines(storage.read_bytes(path)).splitlines()
    except FileNotFoundError:
        return
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            texts = clean_captions(paraphrase["text"] for paraphrase in record["paraphrases"])
            yield caption_key(record["clip_id"], record["caption_index"], record["caption"]), texts
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path}, line {number}: not a record ({error!r}); delete that line") from None


class Paraphrases:
    """The stored paraphrases of one shard set, packed because every reading process has a copy.

    keys int64 [N], sorted; texts[bounds[k] : bounds[k + 1]] is the JSON list of caption k's paraphrases.
    """

    def __init__(self, location: str) -> None:
        lists = {key: json.dumps(texts, ensure_ascii=False).encode() for key, texts in read_records(location) if texts}
        self.keys = np.array(sorted(lists), np.int64)
        ordered = [lists[key] for key in self.keys.tolist()]
        self.bounds = np.cumsum([0, *map(len, ordered)], dtype=np.int64)
        self.texts = b"".join(ordered)

    def __len__(self) -> int:
        """Number of captions that have a paraphrase."""
        return len(self.keys)

    def of(self, clip_id: str, caption_index: int, caption: str) -> list[str]:
        """The paraphrases of one caption; empty if it has none."""
        key = caption_key(clip_id, caption_index, caption)
        k = int(np.searchsorted(self.keys, key))
        if k == len(self.keys) or self.keys[k] != key:
            return []
        found: list[str] = json.loads(self.texts[self.bounds[k] : self.bounds[k + 1]])
        return found


class Appender:
    """Adds lines to the file beside the shards; a context manager.

    A local line is on disk when `append` returns. On S3 lines become visible from time to time, and at the end of the
    context. Raises UserError on entry if the file cannot be written.
    """

    def __init__(self, location: str) -> None:
        self.path = storage.join(location, FILE)
        self.remote = storage.is_remote(self.path)

    def __enter__(self) -> Appender:
        try:
            self.lines = _whole_lines(storage.read_bytes(self.path)) if storage.exists(self.path) else b""
            if self.remote:
                self._upload()
            else:
                self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
                os.ftruncate(self._file, len(self.lines))
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error}; check its permissions") from None
        return self

    def append(self, record: dict[str, Any]) -> None:
        line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        if not self.remote:
            written = os.write(self._file, line)
            os.fsync(self._file)
            if written < len(line):
                raise OSError(f"{self.path}: only {written} of {len(line)} bytes were written; is the disk full?")
            return
        self.lines += line
        if time.monotonic() >= self._next_upload:
            self._upload()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.remote:
            self._upload()
        else:
            os.close(self._file)

    def _upload(self) -> None:
        began = time.monotonic()
        storage.write_bytes(self.path, self.lines)
        now = time.monotonic()
        self._next_upload = now + max(UPLOAD_EVERY_S, (now - began) / UPLOAD_SHARE)


def _whole_lines(data: bytes) -> bytes:
    return data[: data.rfind(b"\n") + 1]
