"""AudioCaps (Kim et al. 2019): clips of 10 s from YouTube, with one caption in train and five in val and test.

Reads the official CSV files (audiocap_id, youtube_id, start_time, caption; one caption in a row) and those that the
code of Mei et al. and WavCaps uses (file_name `Y<youtube id>.wav` with caption or caption_1 ... caption_5). Videos are
removed from YouTube over time, so some audio is usually missing.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from atr_scale.data.corpora.audio_files import AudioFiles, walk_audio
from atr_scale.data.corpora.corpus import Clip, Corpus
from atr_scale.data.corpora.files import (
    TableRow,
    audioset_clip_id,
    first_file,
    group_captions,
    need_columns,
    read_table,
    youtube_id,
)
from atr_scale.data.splits import synonyms
from atr_scale.data.values import id_text
from atr_scale.sections import Section

SECONDS = 10  # length of every clip


class AudioCaps(Corpus):
    """Splits train, val and test; clip ids `audioset/<youtube id>`, as WavCaps' AudioSet clips have them.

    If a table has several cuts of a video, their ids and audio files have the start: `audioset/<youtube id>_<start>`.
    """

    licence = "captions: MIT; audio: YouTube, research use only"
    splits = ("train", "val", "test")

    def __init__(self, name: str, root: Path, options: Section | None = None) -> None:
        super().__init__(name, root, options)
        self._row_ids: dict[str, list[str]] = {}  # audiocap_id of the rows of a clip, by its id

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
        clips = [Clip(_clip_id(meta, cuts), captions, split, meta=meta) for meta, captions in found]
        self._row_ids = {}
        for row in rows if official else ():
            name = id_text(row.get("audiocap_id"))
            self._row_ids.setdefault(_clip_id(read(row), cuts), []).extend([name] if name else [])
        return clips

    def find_audio(self, split: str, clips: list[Clip]) -> list[str]:
        """Files with the names that downloaders write, with any audio extension, below audio/ or <split>/.

        The most exact name wins: video and time, row of the table (audiocap_id), video alone. Ids have a letter case.
        """
        files = AudioFiles(walk_audio(self.root / name for name in ("audio", *synonyms(split))), ignore_case=False)

        def find(clip: Clip) -> str:
            video = clip.meta["youtube_id"]
            of_the_video = [f"Y{video}", video]
            names = [*_timed_names(video, clip.meta.get("start_time", "")), *self._row_ids.get(clip.clip_id, ())]
            only_cut = clip.clip_id == audioset_clip_id(video)
            path = files.find([*names, *of_the_video] if only_cut else names)
            if not path:
                shared = "" if only_cut else files.find(of_the_video)
                several = f"; {shared} may be any of the video's cuts" if shared else ""
                self.missing[clip.clip_id] = files.explain([*names, *of_the_video] if only_cut else names) + several
            return path

        return [find(clip) for clip in clips]


def _timed_names(video: str, start: str) -> list[str]:
    """Names with the start of the clip, or with start and end: whole seconds, with decimals, or milliseconds."""
    if not re.fullmatch(r"\d{1,9}(\.\d+)?", start):
        return []
    first = float(start)
    times = [(start, f"{first + SECONDS:.3f}".rstrip("0").rstrip("."))]
    times += [(f"{first:.{n}f}", f"{first + SECONDS:.{n}f}") for n in (1, 3)]
    times += [(f"{1000 * first:.0f}", f"{1000 * (first + SECONDS):.0f}")]
    exact = [f"{video}_{a}_{b}" for a, b in times]
    return [f"{y}{name}" for name in (*exact, *(f"{video}_{a}" for a, _ in times[:3])) for y in ("", "Y")]


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
