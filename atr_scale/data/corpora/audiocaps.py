"""AudioCaps (Kim et al. 2019): 10 s clips of YouTube; one caption in train, five in val and test.

Reads the official CSV (audiocap_id, youtube_id, start_time, caption; one caption a row) and the derivative of Mei and
WavCaps (file_name `Y<youtube id>.wav` with caption or caption_1 ... caption_5). Videos vanish, so missing audio is
normal.
"""

from __future__ import annotations

from atr_scale.data.corpora.corpus import CANONICAL_SPLITS, Clip, Corpus, canonical_split
from atr_scale.data.corpora.files import (
    by_stem,
    first_file,
    group_captions,
    need_columns,
    read_table,
    walk_audio,
    youtube_id,
)


class AudioCaps(Corpus):
    """train, val or test; clip ids `audiocaps/<youtube id>_<start>` (no start in the derivative)."""

    licence = "captions: MIT; audio: YouTube, research use only"
    splits = ("train", "val", "test")

    def read_clips(self, split: str) -> list[Clip]:
        names = [f"{folder}{name}.csv" for folder in ("", "dataset/", "metadata/") for name in _names(split)]
        path = first_file(self.root, names, "AudioCaps CSV")
        rows = read_table(path)
        official = "youtube_id" in rows[0]
        need_columns(path, rows[0], *(["start_time"] if official else ["file_name"]))
        clips = []
        groups = group_captions(
            path, rows, lambda r: f"{r['youtube_id']}_{r['start_time']}" if official else r["file_name"]
        )
        for key, (row, captions) in groups.items():
            video = row["youtube_id"] if official else youtube_id(key)
            meta = {"youtube_id": video, **({"start_time": row["start_time"]} if official else {})}
            clips.append(Clip(f"audiocaps/{key if official else video}", captions, split, meta=meta))
        return clips

    def find_audio(self, split: str, clips: list[Clip]) -> list[str]:
        """`Y<id>`, `<id>` or `<id>_<start>` with any audio extension, anywhere below audio/ or the split's folder."""
        files = by_stem(walk_audio(self.root / name for name in ("audio", *_names(split))))

        def find(meta: dict[str, str]) -> str:
            video, start = meta["youtube_id"], meta.get("start_time", "")
            stems = (f"Y{video}", video, f"{video}_{start}", f"Y{video}_{start}")
            return next((files[stem] for stem in stems if stem in files), "")

        return [find(clip.meta) for clip in clips]


def _names(split: str) -> list[str]:
    return [split, *(n for n, canonical in CANONICAL_SPLITS.items() if canonical == canonical_split(split) != n)]
