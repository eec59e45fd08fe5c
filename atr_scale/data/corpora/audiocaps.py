"""AudioCaps (Kim et al. 2019): clips of 10 s from YouTube, with one caption in train and five in val and test.

Reads the official CSV files (audiocap_id, youtube_id, start_time, caption; one caption in a row) and those that the
code of Mei et al. and WavCaps uses (file_name `Y<youtube id>.wav` with caption or caption_1 ... caption_5). Videos are
removed from YouTube over time, so some audio is usually missing.
"""

from __future__ import annotations

import re
from collections import Counter

from atr_scale.data.corpora.corpus import Clip, Corpus
from atr_scale.data.corpora.files import (
    TableRow,
    audioset_clip_id,
    by_stem,
    first_file,
    group_captions,
    need_columns,
    read_table,
    walk_audio,
    youtube_id,
)
from atr_scale.data.splits import synonyms


class AudioCaps(Corpus):
    """Splits train, val and test; clip ids `audioset/<youtube id>`, as WavCaps' AudioSet clips have them.

    If a table has several cuts of a video, their ids and audio files have the start: `audioset/<youtube id>_<start>`.
    """

    licence = "captions: MIT; audio: YouTube, research use only"
    splits = ("train", "val", "test")

    def read_clips(self, split: str) -> list[Clip]:
        names = [f"{folder}{name}.csv" for folder in ("", "dataset/", "metadata/") for name in synonyms(split)]
        path = first_file(self.root, names, "AudioCaps CSV")
        rows = read_table(path, self.reject)
        official = "youtube_id" in rows[0]
        need_columns(path, rows[0], *(["start_time"] if official else ["file_name"]))
        read = _official if official else _derivative
        groups = group_captions(path, rows, lambda row: "_".join(filter(None, read(row).values())), self.reject)
        found = [(read(row), captions) for row, captions in groups.values()]
        cuts = Counter(meta["youtube_id"] for meta, _ in found)
        return [Clip(_clip_id(meta, cuts), captions, split, meta=meta) for meta, captions in found]

    def find_audio(self, split: str, clips: list[Clip]) -> list[str]:
        """`<id>` or `<id>_<start>`, perhaps with a Y before it, with any audio extension, below audio/ or <split>/."""
        files = by_stem(walk_audio(self.root / name for name in ("audio", *synonyms(split))))

        def find(clip: Clip) -> str:
            video, start = clip.meta["youtube_id"], clip.meta.get("start_time", "")
            of_the_video = (f"Y{video}", video) if clip.clip_id == audioset_clip_id(video) else ()
            stems = (*of_the_video, f"{video}_{start}", f"Y{video}_{start}")
            return next((files[stem] for stem in stems if stem in files), "")

        return [find(clip) for clip in clips]


def _official(row: TableRow) -> dict[str, str]:
    start = row["start_time"].strip()
    if re.fullmatch(r"\d+\.0*", start):  # a table that went through floats
        start = start.partition(".")[0]
    video = row["youtube_id"].strip()
    return {"youtube_id": video, "start_time": start if video else ""}


def _derivative(row: TableRow) -> dict[str, str]:
    return {"youtube_id": youtube_id(row["file_name"].strip())}


def _clip_id(meta: dict[str, str], cuts: Counter[str]) -> str:
    video = meta["youtube_id"]
    return audioset_clip_id(video if cuts[video] == 1 else f"{video}_{meta['start_time']}")
