"""The file of paraphrases beside the shards: one JSON line a caption that was asked.

A line counts once its newline is there, so an interrupted write costs at most the line being written. A caption of
which nothing was kept has a line too, so that it is not asked again. Of two lines on one caption the later counts.
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
from atr_scale.data.corpora.corpus import canonical_split
from atr_scale.data.sample import clean_captions
from atr_scale.errors import UserError

FILE = "captions.augmented.jsonl"
# On S3 the whole object is written again: not more often than this, and for at most a twentieth of the time.
UPLOAD_EVERY_S, UPLOAD_SHARE = 10.0, 1 / 20


def refuse_evaluation_split(place: str, split: str) -> None:
    """UserError where `split` is one that models are measured on."""
    if canonical_split(split) in ("val", "test"):
        raise UserError(f"{place} is of the split '{split}': paraphrases are for training captions only")


def caption_key(clip_id: str, caption_index: int, caption: str) -> int:
    """Id of one caption of one clip. It holds the text: what was asked for another wording is never found."""
    return stable_id(f"{clip_id}\n{caption_index}\n{caption}")


def make_record(clip_id: str, caption_index: int, caption: str, kept: list[tuple[str, float]], **origin: Any) -> dict:
    """One line of the file. kept: (paraphrase, cosine with the caption); origin: model, text_encoder, prompt_version"""
    paraphrases = [{"text": text, "cosine": round(cosine, 4)} for text, cosine in kept]
    place = {"clip_id": clip_id, "caption_index": caption_index, "caption": caption}
    return {**place, "paraphrases": paraphrases, **origin}


def read_records(location: str) -> Iterator[tuple[int, list[str]]]:
    """(caption key, paraphrases) of each line beside the shards at `location`; nothing where there is no file.

    UserError with the line where it is none of ours.
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
            raise UserError(f"{path}, line {number}: no paraphrases ({error!r}): delete that line") from None


class Paraphrases:
    """The stored paraphrases of one shard set, packed: hundreds of thousands of captions go to every reading process.

    keys int64 [N] sorted; texts[bounds[k] : bounds[k + 1]] is the JSON list of caption k's paraphrases.
    """

    def __init__(self, location: str) -> None:
        lists = {key: json.dumps(texts, ensure_ascii=False).encode() for key, texts in read_records(location) if texts}
        self.keys = np.array(sorted(lists), np.int64)
        ordered = [lists[key] for key in self.keys.tolist()]
        self.bounds = np.cumsum([0, *map(len, ordered)], dtype=np.int64)
        self.texts = b"".join(ordered)

    def __len__(self) -> int:
        """Captions that have a paraphrase."""
        return len(self.keys)

    def of(self, clip_id: str, caption_index: int, caption: str) -> list[str]:
        """The paraphrases of one caption, none where it has none."""
        key = caption_key(clip_id, caption_index, caption)
        k = int(np.searchsorted(self.keys, key))
        if k == len(self.keys) or self.keys[k] != key:
            return []
        return json.loads(self.texts[self.bounds[k] : self.bounds[k + 1]])


class Appender:
    """Adds lines to the file beside the shards, as a context.

    Locally each is on disk when `append` returns. On S3 they are visible from time to time, and when the context ends.
    UserError where the file cannot be written, before the first line.
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
