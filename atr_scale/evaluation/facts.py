"""What is known of the queries of a split besides their ranks, for results by duration, caption length or a field.

Shape suffixes: T texts, A clips.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atr_scale.batch import caption_id
from atr_scale.data.sample import RawSample

LONGEST = 80  # characters of a text that may be a category; longer ones are descriptions
FIELD = "field/"  # before the name of a field in the file of ranks


@dataclass(frozen=True)
class Facts:
    """clip_ids str [A]; caption_ids int64 [T]; caption_words int64 [T].

    fields: of the clips, by name: float64 [A] (NaN: unknown) or str [A] ("": unknown). They are the numbers and short
    texts of the samples' JSON, their duration in seconds and, if they have one, their label.
    """

    clip_ids: NDArray[np.str_]
    caption_ids: NDArray[np.int64]
    caption_words: NDArray[np.int64]
    fields: dict[str, NDArray[Any]]

    @classmethod
    def of(cls, clip_ids: Sequence[str], captions: Sequence[str], fields: Sequence[Mapping[str, Any]]) -> Facts:
        """clip_ids [A], captions [T], fields [A]: `clip_fields` of every clip."""
        names = sorted({name for one in fields for name in one})
        return cls(
            np.array(clip_ids, dtype=np.str_),
            np.array([caption_id(caption) for caption in captions], dtype=np.int64),
            np.array([len(caption.split()) for caption in captions], dtype=np.int64),
            {name: _column([one.get(name) for one in fields]) for name in names},
        )

    def arrays(self) -> dict[str, NDArray[Any]]:
        """For `numpy.savez_compressed`."""
        own = {"clip_ids": self.clip_ids, "caption_ids": self.caption_ids, "caption_words": self.caption_words}
        return own | {FIELD + name: values for name, values in self.fields.items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Facts | None:
        """The inverse of `arrays`; None for a file of version 0.2 or earlier, which had no facts."""
        if "clip_ids" not in arrays:
            return None
        fields = {name.removeprefix(FIELD): arrays[name] for name in arrays if name.startswith(FIELD)}
        return cls(arrays["clip_ids"], arrays["caption_ids"], arrays["caption_words"], fields)

    def test_set(self, clip: NDArray[np.int64], grades: NDArray[np.floating] | None) -> dict[str, str | None]:
        """Fingerprints of the clips, of the captions with their clips, and of their graded relevance.

        They do not depend on the order. clip [T]: index of each text's clip. grades [T, A]: relevance.
        """
        rows, columns = np.lexsort((self.caption_ids, self.clip_ids[clip])), np.argsort(self.clip_ids)
        pairs = (f"{self.clip_ids[clip[row]]}\t{self.caption_ids[row]}" for row in rows)
        graded = None if grades is None else _digest([grades[np.ix_(rows, columns)].astype(np.float32).tobytes()])
        return {
            "clips": _digest(f"{clip_id}\n".encode() for clip_id in self.clip_ids[columns]),
            "captions": _digest(f"{pair}\n".encode() for pair in pairs),
            "relevance": graded,
        }


def clip_fields(sample: RawSample, seconds: float) -> dict[str, Any]:
    """The numbers and short texts of a sample's JSON. seconds: the duration, if the JSON does not say it."""
    known = {"duration": seconds, **sample.meta, **({"label": sample.label} if sample.label else {})}
    return {name: value for name, value in known.items() if _is_short(value)}


def _is_short(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, str) and 0 < len(value) <= LONGEST)


def _column(values: list[Any]) -> NDArray[Any]:
    """Numbers if every known value is one, also one that is written as text, as all values of a CSV file are."""
    try:
        numbers = np.array([math.nan if value is None else float(value) for value in values])
        if not np.isinf(numbers).any():
            return numbers
    except ValueError:
        pass
    return np.array(["" if value is None else str(value) for value in values], dtype=np.str_)


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
