"""Write the demo corpora in the official on-disk formats of AudioCaps, Clotho and WavCaps.

    OUT/audiocaps/  dataset/{train,val,test}.csv (audiocap_id, youtube_id, start_time, caption)
                    audio/{train,val,test}/Y<youtube_id>.wav, 10 s
    OUT/clotho/     clotho_{captions,metadata}_{development,validation,evaluation}.csv
                    {development,validation,evaluation}/<file_name>, wav of 15-30 s
    OUT/wavcaps/    json_files/<source>/*_final.json, json_files/blacklist/*.json
                    Waveforms/<source>/<id>.flac
    OUT/relevance/  <corpus>-<split>.npz: the relevance of every clip to every caption
    OUT/moments/    <corpus>-<split>.jsonl: when the sounds of every clip are heard
    OUT/contents.json (content of clips and captions), README.txt, demo.json (seed, sizes and sample rate)

Formats: https://github.com/cdjkim/audiocaps (MIT), Clotho v2.1 (Zenodo 4783391), WavCaps (arXiv 2303.17395).
"""

from __future__ import annotations

import csv
import json
import logging
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import soundfile as sf
from tqdm import tqdm

from atr_scale.data.corpora.audiocaps import AudioCaps
from atr_scale.data.corpora.clotho import Clotho
from atr_scale.data.splits import is_held_out
from atr_scale.demo.clips import DemoClip, Sizes, plan_clips
from atr_scale.demo.moments import MOMENTS, write_moments
from atr_scale.demo.relevance import GRADES, write_relevance
from atr_scale.demo.scenes import Scene, render
from atr_scale.distributed.lifeline import end_with
from atr_scale.errors import UserError
from atr_scale.files import atomic_write

logger = logging.getLogger(__name__)

VERSION = 2  # goes up when the same seed begins to give other audio, captions or clip ids
WAVCAPS_JSON = {
    "AudioSet_SL": "as_final.json",
    "BBC_Sound_Effects": "bbc_final.json",
    "FreeSound": "fsd_final.json",
    "SoundBible": "sb_final.json",
}
_STAMP = "demo.json"
_README = """\
Synthetic soundscapes with captions: demo corpora in the on-disk formats of AudioCaps, Clotho and WavCaps.
Everything is generated (demo.json: seed, sizes, sample rate); nothing is taken from those corpora.

audiocaps/dataset/{train,val,test}.csv   audiocap_id, youtube_id, start_time, caption: 1 a clip in train, else 5
audiocaps/audio/<split>/Y<youtube_id>.wav   the clips, 10 s
clotho/clotho_captions_<split>.csv       file_name, caption_1 ... caption_5
clotho/clotho_metadata_<split>.csv       file_name, keywords, sound_id, ... in ISO-8859-1
clotho/<split>/<file_name>               the clips, 15-30 s; <split>: development, validation, evaluation
wavcaps/json_files/<source>/*.json       one caption a clip; AudioSet_SL, BBC_Sound_Effects, FreeSound, SoundBible
wavcaps/json_files/blacklist/*.json      exclusion lists: clips of AudioCaps and Clotho that are in WavCaps too
wavcaps/Waveforms/<source>/<id>.flac     the clips
relevance/<corpus>-<split>.npz           for `atr-scale evaluate --relevance`: grades [captions, clips], float16, the
                                         fraction of the caption's facts that are true of the clip; clip_ids [clips];
                                         caption_clip and caption_index [captions]
moments/<corpus>-<split>.jsonl           for `atr-scale evaluate --moments`: a row for each sound that does not last for
                                         the whole clip: query, vid (the clip's id), path, relevant_windows in seconds
contents.json                            the facts of each caption and each clip, in the order of those
text_encoder/                            a tokenizer for these captions and a small untrained BERT (atr-scale demo-data)
"""


def write_demo_corpora(
    out: Path, *, seed: int = 0, sample_rate: int = 16000, workers: int | None = None, sizes: Sizes | None = None
) -> None:
    """Write the three demo corpora, the relevance of their clips to their captions and the times of their sounds.

    The same seed, sizes and sample rate (Hz) give the same bytes for any number of worker processes (None: one for each
    core). A finished folder `out` stays unchanged. An unfinished one is completed, and so is one of a version that did
    not write relevance/ or moments/; existing audio is kept. Raises UserError if `out` has other files, or demo corpora
    of other settings.
    """
    sizes = sizes or Sizes()
    if sample_rate < 16000:
        raise UserError(f"sample rate {sample_rate} Hz is too low for the demo's sounds: give 16000 or more")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: give a folder for the demo corpora")
    made_with = {"version": VERSION, "seed": seed, "sample_rate": sample_rate, "sizes": asdict(sizes)}
    if _finished(out, made_with):
        logger.info("demo corpora in %s are complete: nothing to do", out)
        return
    _write_json(out / _STAMP, {**made_with, "complete": False})
    clips = plan_clips(seed, sizes)
    _write_audio(out, clips, sample_rate, workers or len(os.sched_getaffinity(0)))
    _write_audiocaps(out / "audiocaps", [clip for clip in clips if clip.corpus == "audiocaps"])
    _write_clotho(out / "clotho", [clip for clip in clips if clip.corpus == "clotho"], sample_rate)
    _write_wavcaps(out / "wavcaps", clips)
    write_relevance(out, clips)
    write_moments(out, clips)
    (out / "README.txt").write_text(_README, encoding="utf-8")
    _write_json(out / _STAMP, {**made_with, "complete": True})


def training_captions(out: Path) -> list[str]:
    """The captions of the training splits of the finished demo corpora in `out`, from their official files."""
    captions = [row["caption"] for row in _read_csv(out / "audiocaps" / "dataset" / "train.csv")]
    for row in _read_csv(out / "clotho" / "clotho_captions_development.csv"):
        captions += [row[f"caption_{k}"] for k in range(1, 6)]
    for source, file_name in WAVCAPS_JSON.items():
        rows = json.loads((out / "wavcaps" / "json_files" / source / file_name).read_text(encoding="utf-8"))["data"]
        captions += [row["caption"] for row in rows]
    return captions


def _finished(out: Path, made_with: dict[str, Any]) -> bool:
    stamp = out / _STAMP
    if not stamp.exists():
        if out.exists() and any(out.iterdir()):
            raise UserError(f"{out} is not empty and has no demo corpora: give a new folder")
        return False
    found = json.loads(stamp.read_text(encoding="utf-8"))
    complete = found.pop("complete") and all((out / name).is_dir() for name in (GRADES, MOMENTS))
    if found != made_with:
        other = ", ".join(key for key in made_with if found.get(key) != made_with[key])
        raise UserError(f"{out} has demo corpora made with another {other}: give a new folder, or remove this one")
    return complete


def _write_audio(out: Path, clips: Sequence[DemoClip], sample_rate: int, workers: int) -> None:
    todo = [(out / clip.path, clip.scene) for clip in clips if not (out / clip.path).exists()]
    for folder in {path.parent for path, _ in todo}:
        folder.mkdir(parents=True, exist_ok=True)
    chunks = [todo[i : i + 16] for i in range(0, len(todo), 16)]
    with tqdm(total=len(todo), desc="demo audio", unit=" clips", disable=None) as progress:
        if workers == 1:
            for chunk in chunks:
                progress.update(_render_chunk(chunk, sample_rate))
            return
        # spawn: forking a process that runs threads (torch's, for one) can deadlock
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, context, initializer=end_with, initargs=(os.getpid(),)) as pool:
            for done in as_completed([pool.submit(_render_chunk, chunk, sample_rate) for chunk in chunks]):
                progress.update(done.result())


def _render_chunk(chunk: Sequence[tuple[Path, Scene]], sample_rate: int) -> int:
    for path, scene in chunk:
        with atomic_write(path) as temporary:
            # Rounded here: libsndfile scales floats to one 16-bit value in wav and to another in flac.
            samples = np.rint(render(scene, sample_rate) * 32767).astype(np.int16)
            sf.write(temporary, samples, sample_rate, format=path.suffix[1:], subtype="PCM_16")
    return len(chunk)


def _write_audiocaps(root: Path, clips: Sequence[DemoClip]) -> None:
    number = 0
    for split in AudioCaps.splits:
        members = [clip for clip in clips if clip.split == split]
        rows = []
        for k in range(len(members[0].captions)):  # as in the official files, the captions of a clip are not neighbours
            for clip in members:
                number += 1
                rows.append([number, clip.native_id, clip.start_time, clip.captions[k].text])
        header = ["audiocap_id", "youtube_id", "start_time", "caption"]
        _write_csv(root / "dataset" / f"{split}.csv", header, rows)


def _write_clotho(root: Path, clips: Sequence[DemoClip], sample_rate: int) -> None:
    columns = ["file_name", "keywords", "sound_id", "sound_link", "start_end_samples", "manufacturer", "license"]
    for split in Clotho.splits:
        members = [clip for clip in clips if clip.split == split]
        _write_csv(
            root / f"clotho_captions_{split}.csv",
            ["file_name", *(f"caption_{k}" for k in range(1, 6))],
            [[clip.native_id, *(caption.text for caption in clip.captions)] for clip in members],
        )
        rows = []
        for clip in members:
            keywords = ";".join([*(sound.label for sound in clip.scene.content.sounds), "synthèse"])
            extent = f"[0, {round(clip.scene.seconds * sample_rate)}]"
            rows.append([clip.native_id, keywords, clip.sound_id, "Not found", extent, "atr-scale demo", "Apache-2.0"])
        _write_csv(root / f"clotho_metadata_{split}.csv", columns, rows, encoding="ISO-8859-1")


def _write_wavcaps(root: Path, clips: Sequence[DemoClip]) -> None:
    for source, file_name in WAVCAPS_JSON.items():
        rows = [_wavcaps_row(clip) for clip in clips if clip.source == source]
        _write_json(root / "json_files" / source / file_name, {"num_captions_per_audio": 1, "data": rows})
    held_out = [clip for clip in clips if is_held_out(clip.split)]
    for name, listed in (("test", held_out), ("all", [clip for clip in clips if clip.corpus != "wavcaps"])):
        blacklist = {
            "AudioSet": [f"Y{clip.native_id}.wav" for clip in listed if clip.corpus == "audiocaps"],
            "FreeSound": [clip.sound_id for clip in listed if clip.corpus == "clotho"],
        }
        _write_json(root / "json_files" / "blacklist" / f"blacklist_exclude_{name}_ac.json", blacklist)


def _wavcaps_row(clip: DemoClip) -> dict[str, Any]:
    """A row with the fields that its source has in the official file."""
    title = " ".join(sound.label for sound in clip.scene.content.sounds)
    common = {
        "id": clip.native_id,
        "caption": clip.captions[0].text,
        "audio": "wav_path",
        "duration": clip.scene.seconds,
    }
    described = {"description": f"A synthetic recording: {title}.", "download_link": ""}
    match clip.source:
        case "BBC_Sound_Effects":
            return {**described, "category": "Synthetic", **common}
        case "FreeSound":
            extra = {
                "file_name": f"{clip.native_id}.wav",
                "href": "",
                "tags": title.split(),
                "author": "atr-scale demo",
            }
            return {**extra, **described, **common}
        case "SoundBible":
            return {"title": title, "author": "atr-scale demo", "href": "", **described, **common}
    return common


def _write_csv(path: Path, header: list[str], rows: Sequence[Sequence[Any]], encoding: str = "utf-8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary, temporary.open("w", encoding=encoding, newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def _read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
