"""Readers of captioned audio corpora in their official on-disk formats, by name.

A plug-in adds a class derived from `Corpus` to `CORPORA`. docs/data.md lists the corpora and their folders.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from atr_scale.data.corpora.audiocaps import AudioCaps
from atr_scale.data.corpora.clotho import Clotho
from atr_scale.data.corpora.corpus import Clip, Corpus
from atr_scale.data.corpora.folder import Folder
from atr_scale.data.corpora.wavcaps import WavCaps
from atr_scale.errors import UserError
from atr_scale.sections import check_options

CORPORA: dict[str, type[Corpus]] = {
    "audiocaps": AudioCaps,
    "clotho": Clotho,
    "wavcaps": WavCaps,
    "folder": Folder,
}

__all__ = ["CORPORA", "Clip", "Corpus", "open_corpus"]


def open_corpus(name: str, root: str | Path, options: Mapping[str, Any] | None = None) -> Corpus:
    """The reader of the corpus `name` in the folder `root`. Raises UserError for an unknown corpus or option."""
    if name not in CORPORA:
        known = ", ".join(CORPORA)
        raise UserError(f"unknown corpus '{name}': choose one of {known}, or name the module that adds it by --plugins")
    reader, given = CORPORA[name], dict(options or {})
    unknown = sorted(given.keys() - reader.Options.model_fields.keys())
    if unknown:
        known = (
            f"its options are {', '.join(reader.Options.model_fields)}"
            if reader.Options.model_fields
            else "it has none"
        )
        raise UserError(f"the corpus {name} has no option {', '.join(unknown)}: {known}")
    return reader(name, Path(root), check_options(reader.Options, given, f"the corpus {name}"))
