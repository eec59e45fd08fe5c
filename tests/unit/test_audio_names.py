"""Audio files are found under the names that metadata, downloaders and file systems give them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from atr_scale.data.corpora import open_corpus
from atr_scale.data.corpora.audio_files import SOURCE_EXTENSIONS
from atr_scale.data.shard_builder import build_shards, plan_build
from atr_scale.data.shard_check import check_shards
from atr_scale.errors import UserError

RATE = 8000
OFFICIAL = ["audiocap_id", "youtube_id", "start_time", "caption"]
# Extensions of the formats of libsndfile. RAW needs parameters, SD2 keeps them in a second file.
FORMATS = {
    "AIFF": ".aiff .aif", "AU": ".au .snd", "AVR": ".avr", "CAF": ".caf", "FLAC": ".flac", "HTK": ".htk",
    "SVX": ".iff .8svx", "MAT4": ".mat", "MAT5": ".mat", "MPC2K": ".mpc", "MP3": ".mp3", "OGG": ".ogg .oga",
    "PAF": ".paf", "PVF": ".pvf", "RF64": ".rf64", "SDS": ".sds", "IRCAM": ".sf", "VOC": ".voc", "W64": ".w64",
    "WAV": ".wav .wave", "NIST": ".nist .sph", "WAVEX": ".wav", "WVE": ".wve", "XI": ".xi",
}  # fmt: skip


def write_csv(path: Path, *rows: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def noise(path: Path, kind: str = "WAV") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = np.random.default_rng(0).integers(-9999, 9999, RATE).astype(np.int16)
    with open(path, "wb") as file:
        soundfile.write(file, samples, RATE, format=kind)


def paths(name: str, root: Path, split: str) -> dict[str, str]:
    """Audio below the folder audio/ by the last part of the clip id."""
    corpus = open_corpus(name, root)
    clips = corpus.read_clips(split)
    found = corpus.find_audio(split, clips)
    return {
        clip.clip_id.partition("/")[2]: str(Path(path).relative_to(root / "audio")) if path else ""
        for clip, path in zip(clips, found, strict=True)
    }


@pytest.mark.parametrize("encoding", ["flac", "keep"])
def test_every_format_that_libsndfile_opens(tmp_path: Path, encoding: str) -> None:
    assert {*FORMATS, "RAW", "SD2"} == soundfile.available_formats().keys()
    names = [f"{kind}{extension}" for kind, extensions in FORMATS.items() for extension in extensions.split()]
    for name in names:
        noise(tmp_path / "corpus" / "audio" / name.upper(), kind=name.partition(".")[0])
    write_csv(tmp_path / "corpus" / "captions.csv", ["file_name", "caption"], *([name, name] for name in names))
    out = tmp_path / "out"
    manifest = build_shards("folder", tmp_path / "corpus", out, sample_rate=RATE, encoding=encoding, workers=1)
    assert (manifest["num_samples"], manifest["dropped"]) == (len(names), {})
    assert check_shards(str(out), deep=True) == []


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        (["101.wav"], "101.wav"),
        (["abcdefghijk_30.000.wav"], "abcdefghijk_30.000.wav"),
        (["Yabcdefghijk_30.0_40.0.flac"], "Yabcdefghijk_30.0_40.0.flac"),
        (["abcdefghijk_30000_40000.wav"], "abcdefghijk_30000_40000.wav"),
        (["Yabcdefghijk.wav", "101.wav", "abcdefghijk_30.wav", "abcdefghijk_30_40.wav"], "abcdefghijk_30_40.wav"),
        (["Yabcdefghijk.wav", "101.wav", "abcdefghijk_30.wav"], "abcdefghijk_30.wav"),
        (["Yabcdefghijk.wav", "101.wav"], "101.wav"),
        (["Yabcdefghijk.wav", "ABCDEFGHIJK_30_40.wav", "abcdefghijk_40_50.wav"], "Yabcdefghijk.wav"),
        (["abcdefghijk_40.wav", "abcdefghijk_30.json", "ABCDEFGHIJK.wav"], ""),
    ],
)
@pytest.mark.parametrize("start", ["30", "30.0"])
def test_audiocaps_as_downloaders_name_it(tmp_path: Path, files: list[str], wanted: str, start: str) -> None:
    write_csv(tmp_path / "train.csv", OFFICIAL, ["101", "abcdefghijk", start, "A bell rings"])
    for file in files:
        noise(tmp_path / "audio" / file)
    assert paths("audiocaps", tmp_path, "train") == {"abcdefghijk": wanted}


def test_cuts_of_one_video_never_share_a_file(tmp_path: Path) -> None:
    rows = [["101", "abc", "30", "x"], ["102", "abc", "50.0", "y"], ["103", "abc", "70", "z"], ["104", "d", "0", "w"]]
    write_csv(tmp_path / "train.csv", OFFICIAL, *rows)
    for name in ("Yabc.wav", "abc_30_40.wav", "102.wav", "d.wav"):
        noise(tmp_path / "audio" / name)
    assert paths("audiocaps", tmp_path, "train") == {
        "abc_30": "abc_30_40.wav", "abc_50": "102.wav", "abc_70": "", "d": "d.wav",
    }  # fmt: skip
    (dropped,) = plan_build(open_corpus("audiocaps", tmp_path), "train", []).dropped
    assert dropped.reason == "missing_audio" and "abc_70_80" in dropped.detail and "103" in dropped.detail
    assert dropped.detail.endswith("Yabc.wav may be any of the video's cuts")


def test_one_video_in_two_spellings_of_the_derivative_is_one_clip(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", ["file_name", "caption"], ["Yabc.wav", "x"], ["abc.wav", "y"])
    (clip,) = open_corpus("audiocaps", tmp_path).read_clips("train")
    assert (clip.clip_id, clip.captions) == ("audioset/abc", ["x", "y"])


def test_names_of_a_folder(tmp_path: Path) -> None:
    here = {
        "good.wav": "good.wav",
        "./dot.wav": "dot.wav",
        "audio/prefix.wav": "prefix.wav",
        "bare": "bare.wav",
        "CASE.WAV": "case.wav",
        "sub\\windows.wav": "sub/windows.wav",
        "sub//Slash.mp3": "sub/slash.flac",  # converted
        f"{tmp_path.resolve()}/audio/whole.wav": "whole.wav",
        "no_extension": "no_extension",
        "odd.xyz": "odd.xyz",
        "Two.wav": "",  # TWO.wav or two.wav
        "gone.wav": "",
        "../captions.csv": "",
    }
    write_csv(tmp_path / "captions.csv", ["file_name", "caption"], *([name, "x"] for name in here))
    for name in {*here.values(), "TWO.wav", "two.wav", "both.flac"} - {""}:
        noise(tmp_path / "audio" / name)
    assert paths("folder", tmp_path, "") == here
    plan = plan_build(open_corpus("folder", tmp_path), None, [])
    details = {clip.clip_id.rpartition("/")[2]: clip.detail for clip in plan.dropped}
    assert details["Two.wav"] == "tried Two.wav; several files fit: TWO.wav, two.wav"
    assert details["gone.wav"] == "tried gone.wav"


def test_rows_and_clips_with_the_same_file(tmp_path: Path) -> None:
    rows = [["a.wav", "one"], ["./a.wav", "two"], ["b.wav", "three"], ["B.wav", "four"], ["c.wav", "five"]]
    write_csv(tmp_path / "corpus" / "captions.csv", ["file_name", "caption"], *rows)
    for name in ("a.wav", "b.wav", "c.wav"):
        noise(tmp_path / "corpus" / "audio" / name)
    manifest = build_shards("folder", tmp_path / "corpus", tmp_path / "out", sample_rate=RATE, workers=1)
    assert (manifest["num_samples"], manifest["num_captions"], manifest["dropped"]) == (2, 3, {"shared_audio": 2})
    lines = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    assert lines[0]["detail"] == "the file is found for corpus/B.wav too"


def test_clotho_and_freesound_in_another_letter_case(tmp_path: Path) -> None:
    write_csv(tmp_path / "clotho_captions_development.csv", ["file_name", "caption_1"], ["Rain (1).wav", "x"])
    noise(tmp_path / "audio" / "development" / "rain (1).WAV")
    assert paths("clotho", tmp_path, "development") == {"Rain (1).wav": "development/rain (1).WAV"}


def test_if_nothing_is_found_the_names_are_in_the_error(tmp_path: Path) -> None:
    write_csv(tmp_path / "val.csv", OFFICIAL, ["7", "abc", "30.5", "x"])
    (tmp_path / "audio").mkdir()
    with pytest.raises(UserError, match=r"no audio for any of the 1 .*tried abc_30.5_40.5, Yabc_30.5_40.5,.* 7, Yabc"):
        plan_build(open_corpus("audiocaps", tmp_path), "val", [])


def test_common_extensions_come_first() -> None:
    assert SOURCE_EXTENSIONS[:5] == (".flac", ".wav", ".ogg", ".mp3", ".opus")
