"""What a reader of a corpus is: the base class that it is derived from, and the clips that it gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from atr_scale.data.exclusions import ExclusionList
from atr_scale.errors import UserError
from atr_scale.sections import Section

CANONICAL_SPLITS = {
    "train": "train", "training": "train", "development": "train",
    "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test", "evaluation": "test", "eval": "test",
}  # fmt: skip


@dataclass(frozen=True)
class Clip:
    """One audio clip of a corpus with its captions. `path` is empty until the audio is found, or if it is missing.

    `meta` goes into the shard as it is; `youtube_id` and `sound_id` (Freesound) in it are what exclusion lists match.
    """

    clip_id: str
    captions: list[str]
    split: str
    path: str = ""
    label: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)


class Corpus(ABC):
    """A reader of one corpus. A subclass is entered in `CORPORA` under the name of the corpus.

    name: what shards call the corpus. root: the folder of the corpus as it was downloaded. options: the values of
    `Options`, the section of what this reader can be told.
    """

    licence: ClassVar[str] = "not stated"
    splits: ClassVar[Sequence[str]] = ()
    Options: ClassVar[type[Section]] = Section
    # What is wrong with shards of this corpus that were built without an overlap list; empty: nothing.
    overlap_warning: ClassVar[str] = ""

    def __init__(self, name: str, root: Path, options: Section | None = None) -> None:
        self.name, self.root = name, root
        self.options = self.Options() if options is None else options

    @abstractmethod
    def read_clips(self, split: str) -> list[Clip]:
        """Every clip of `split`, one of `find_splits`, with its captions in order, from the metadata alone."""

    @abstractmethod
    def find_audio(self, split: str, clips: list[Clip]) -> list[str]:
        """The path of the audio of each clip, "" if it is missing."""

    def find_splits(self) -> Sequence[str]:
        """The names of the splits: the official ones, unless the metadata has to be asked."""
        return self.splits

    def own_exclusions(self) -> list[ExclusionList]:
        """Lists of clips that are always left out."""
        return []

    def choose_split(self, split: str | None) -> str:
        """The corpus's own name of `split`; a corpus with one split needs none. UserError with the known names."""
        known = self.find_splits()
        if split is None:
            if len(known) > 1:
                raise UserError(f"{self.name} at {self.root} has splits {', '.join(known)}: choose one with --split")
            return known[0] if known else ""
        for name in known:
            if split == name or canonical_split(split) == canonical_split(name):
                return name
        names = ", ".join(known) or "(none)"
        raise UserError(f"{self.name} at {self.root} has no split '{split}': choose one of {names}")


def canonical_split(name: str) -> str:
    """train, val or test for the common synonyms; any other name as it is."""
    return CANONICAL_SPLITS.get(name.lower(), name)
