"""One sample of a shard: its audio bytes undecoded, its captions cleaned, its JSON checked."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from atr_scale.data import storage

# Reasons of samples that may be whole: the store, the network or the permissions are at fault.
READ_FAULTS = ("missing_shard", "no_permission", "read_error")
AUDIO_EXTENSIONS = ("flac", "wav", "ogg", "mp3", "opus", "pcm", "m4a")

CAPTION_FIELDS = ("captions", "text", "caption")  # of a JSON; the first one that is not empty
INVISIBLE = "\ufffd\u2800\u3164\u115f\u1160\uffa0"  # the replacement character, and letters that show nothing


class BadSample(Exception):
    """A sample that cannot be used. `reason` is a short snake_case name to count by, `detail` describes this case."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


def read_fault(path: str, error: OSError) -> BadSample:
    """The error of a read from the shard at `path` as a BadSample: cut_shard or one of READ_FAULTS."""
    if isinstance(error, storage.ShortRead):
        return BadSample("cut_shard", str(error))
    if isinstance(error, FileNotFoundError):
        return BadSample("missing_shard", path)
    if isinstance(error, PermissionError):
        return BadSample("no_permission", f"{path}: {error}")
    return BadSample("read_error", str(error))


class FileSlice:
    """Bytes [start, stop) of a local shard, read only when they are needed, and perhaps only in part.

    It behaves like a memoryview: slicing copies nothing, bytes() reads everything. `head` holds the first bytes, which
    are already read. Raises BadSample if reading fails.
    """

    __slots__ = ("_file", "_head", "_start", "_stop")

    def __init__(self, file: storage.LocalFile, start: int, stop: int, head: bytes = b"") -> None:
        self._file, self._start, self._stop, self._head = file, start, stop, head

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, part: slice) -> memoryview | FileSlice:
        if part.stop <= len(self._head):
            return memoryview(self._head)[part]
        return FileSlice(self._file, self._start + part.start, self._start + part.stop)

    def __bytes__(self) -> bytes:
        try:
            return self._file.read(self._start, self._stop)
        except OSError as error:
            raise read_fault(self._file.path, error) from None

    def read_into(self, memory: memoryview, first: int) -> None:
        """Fill `memory` (bytes) with the slice's bytes from `first` on, without an intermediate copy."""
        assert first + len(memory) <= len(self)
        try:
            self._file.read_into(memory, self._start + first)
        except OSError as error:
            raise read_fault(self._file.path, error) from None


Bytes = bytes | memoryview | FileSlice


@dataclass(frozen=True)
class RawSample:
    """A sample before decoding.

    `sample_rate` is the JSON's, in Hz, None if it has none. `meta` holds the JSON's other fields.
    """

    key: str
    clip_id: str
    captions: list[str]
    label: str | None
    audio: Bytes
    extension: str
    sample_rate: int | None
    meta: dict[str, Any] = field(default_factory=dict)


def group_fault(extensions: Sequence[str]) -> str | None:
    """The reason why members with these extensions are not a sample, or None if they are one.

    A sample has one audio member, and a JSON or a text file; members with other extensions are ignored.
    """
    if len(set(extensions)) < len(extensions):
        return "duplicate_key"
    audio = sum(e in AUDIO_EXTENSIONS for e in extensions)
    if audio > 1:
        return "several_audios"
    return "missing_audio" if audio == 0 else None if has_text(extensions) else "missing_json"


def has_text(extensions: Iterable[str]) -> bool:
    """Whether members with these extensions have one that can hold the captions: a JSON or a text file."""
    return not {"json", "txt"}.isdisjoint(extensions)


def clean_caption(text: str) -> str:
    """`text` in NFC and stripped, with each run of white space as one space and without control characters."""
    if text.isascii() and text.isprintable():  # true of most captions: only spaces are left to clean
        return " ".join(text.split()) if "  " in text else text.strip()
    text = " ".join(unicodedata.normalize("NFC", text).split())
    return "".join(c for c in text if unicodedata.category(c) != "Cc").strip()


def clean_captions(texts: Iterable[str]) -> list[str]:
    """The cleaned captions, without those that are empty, show nothing, or are not valid Unicode."""
    cleaned = [clean_caption(text) for text in texts if text.isascii() or _is_unicode(text)]
    return [caption for caption in cleaned if is_visible(caption)]


def is_visible(text: str) -> bool:
    """Whether any character of `text` can be seen: none of zero-width ones, soft hyphens, U+FFFD for unknown ones."""
    if text.isascii():
        return not text.isspace() and text != ""
    return any(unicodedata.category(c)[0] in "LNPS" and c not in INVISIBLE for c in text)


def parse_texts(key: str, parts: Mapping[str, Bytes], set_name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The JSON and the text file of a sample, members by extension, as (text fields of RawSample, all other fields).

    Reads this project's layout ("captions", "clip_id") and that of LAION's audio-dataset ("text" or "caption", "tag").
    The text file is the caption if the JSON has none. A sample without a clip id gets `set_name/key`. Raises BadSample
    bad_json or no_caption.
    """
    try:
        record = json.loads(str(bytes(parts.get("json", b"{}")), "utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadSample("bad_json", f"{key}: {error}") from None
    if not isinstance(record, dict):
        raise BadSample("bad_json", f"{key}: not an object")
    used = next((name for name in CAPTION_FIELDS if record.get(name)), "text")
    captions = clean_captions(_strings(key, record, used))
    if not captions and "txt" in parts:
        captions = clean_captions([str(bytes(parts["txt"]), "utf-8", "surrogateescape")])
    if not captions:
        raise BadSample("no_caption", key)
    tags = clean_captions(_strings(key, record, "label" if "label" in record else "tag"))
    clip_id = record.get("clip_id", f"{set_name}/{key}")
    sample_rate = record.get("sample_rate")
    if not (isinstance(clip_id, str) and clip_id and _is_unicode(clip_id)):
        raise BadSample("bad_json", f"{key}: clip_id is not a text")
    if sample_rate is not None and (type(sample_rate) is not int or sample_rate <= 0):
        raise BadSample("bad_json", f"{key}: sample_rate is not a positive integer")
    known = ("clip_id", "captions", "text", used, "label", "tag", "sample_rate")
    fields = {"clip_id": clip_id, "captions": captions, "label": tags[0] if tags else None, "sample_rate": sample_rate}
    return fields, {name: value for name, value in record.items() if name not in known}


def _strings(key: str, record: dict[str, Any], name: str) -> list[str]:
    value = record.get(name)
    values = [] if value is None else [value] if isinstance(value, str) else value
    if isinstance(values, list):
        values = [text for text in values if text is not None]
    if not (isinstance(values, list) and all(isinstance(v, str) for v in values)):
        raise BadSample("bad_json", f"{key}: {name} is neither a text nor a list of texts")
    return values


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate, which JSON can carry as an escape
        return False
    return True
