"""Readers of captioned audio corpora in their official on-disk formats, by name."""

from __future__ import annotations

from atr_scale.data.corpora import audiocaps, clotho, folder, wavcaps
from atr_scale.data.corpora.rows import Clip, Corpus

CORPORA: dict[str, Corpus] = {
    "audiocaps": audiocaps.CORPUS,
    "clotho": clotho.CORPUS,
    "wavcaps": wavcaps.CORPUS,
    "folder": folder.CORPUS,
}

__all__ = ["CORPORA", "Clip", "Corpus"]
