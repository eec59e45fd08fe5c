"""The base class of corpus readers, and the clips that they return."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from atr_scale.data.exclusions import ExclusionList
from atr_scale.data.splits import canonical_split
from atr_scale.errors import UserError
from atr_scale.sections import Section


@dataclass(frozen=True)
class Clip:
    """One audio clip of a corpus with its captions.

    path: its audio file, empty if that is missing or not yet looked for. label: its class in a labelled corpus.
    meta: copied to the JSON in the shard; exclusion lists are matched with its `youtube_id` and `sound_id` (Freesound).
    """

    clip_id: str
    captions: list[str]
    split: str
    path: str = ""
    label: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)


class Corpus(ABC):
    """A reader of one corpus. Subclasses are entries of `CORPORA`.

    name: name of the corpus in manifests and clip ids. root: folder of the corpus as it was downloaded. options: values
    of `Options`, the section with the reader's own options.
    """

    licence: ClassVar[str] = "not stated"
    splits: ClassVar[Sequence[str]] = ()
    Options: ClassVar[type[Section]] = Section
    # End of the warning about shards of this corpus that were built without an exclusion list; empty: no warning.
    overlap_warning: ClassVar[str] = ""
    # Rows of the metadata that are no clip: file and line, and what is wrong. Filled by `read_clips` with `reject`.
    bad_rows: dict[str, str]
    # Names that were looked for, by the ids of clips without audio. Filled by `find_audio`, for the report.
    missing: dict[str, str]

    def __init__(self, name: str, root: Path, options: Section | None = None) -> None:
        self.name, self.root = name, root
        self.options = self.Options() if options is None else options
        self.bad_rows, self.missing = {}, {}

    def reject(self, place: str, detail: str) -> None:
        """Note that the row at `place` cannot be used; the build leaves it out, counts it and goes on."""
        self.bad_rows[place] = detail

    @abstractmethod
    def read_clips(self, split: str) -> list[Clip]:
        """Every clip of `split` (one of `find_splits`) with its captions in order, from the metadata alone."""

    @abstractmethod
    def find_audio(self, split: str, clips: list[Clip]) -> list[str]:
        """The path of the audio of each clip, or "" if it is missing."""

    def find_splits(self) -> Sequence[str]:
        """The names of the splits: the official ones, unless a reader overrides this to read them from the metadata."""
        return self.splits

    def own_exclusions(self) -> list[ExclusionList]:
        """Exclusion lists that always apply."""
        return []

    def choose_split(self, split: str | None) -> str:
        """The corpus's own name of `split`, which may be None if there is only one. UserError for an unknown name."""
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
