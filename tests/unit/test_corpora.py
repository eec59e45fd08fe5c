"""The corpus readers on small copies of every layout, and on the real metadata."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from atr_scale.batch import caption_id, stable_id
from atr_scale.data.corpora import CORPORA, Clip, open_corpus
from atr_scale.data.exclusions import read_exclusions
from atr_scale.data.shard_builder import build_shards, plan_build
from atr_scale.data.shard_reader import open_shards
from atr_scale.errors import UserError
from atr_scale.losses.targets import positives_mask


def table(path: Path, *rows: list[str], encoding: str = "utf-8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding=encoding) as file:
        csv.writer(file).writerows(rows)


def audio(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, np.random.default_rng(0).integers(-999, 999, 800).astype(np.int16), 8000)


def found(name: str, root: Path, split: str) -> dict[str, str]:
    """clip id -> audio path relative to root."""
    corpus = open_corpus(name, root)
    clips = corpus.read_clips(split)
    paths = corpus.find_audio(split, clips)
    return {c.clip_id: str(Path(p).relative_to(root)) if p else "" for c, p in zip(clips, paths, strict=True)}


OFFICIAL = ["audiocap_id", "youtube_id", "start_time", "caption"]


def test_audiocaps_official_rows_become_clips(tmp_path: Path) -> None:
    table(
        tmp_path / "dataset" / "val.csv",
        OFFICIAL,
        ["1", "abc", "30", "A dog, barking"],
        ["2", "-Yx_", "0", 'A "loud"\nbang'],
        ["3", "abc", "30", "Ein Hund – wau"],
    )
    clips = open_corpus("audiocaps", tmp_path).read_clips("val")
    assert clips == [
        Clip(
            "audioset/abc",
            ["A dog, barking", "Ein Hund – wau"],
            "val",
            meta={"youtube_id": "abc", "start_time": "30"},
        ),
        Clip("audioset/-Yx_", ['A "loud" bang'], "val", meta={"youtube_id": "-Yx_", "start_time": "0"}),
    ]


def test_audiocaps_audio_is_found_under_every_usual_name(tmp_path: Path) -> None:
    rows = [["1", name, "30", "x"] for name in ("aaa", "bbb", "ccc", "Yddd", "eee")]
    table(tmp_path / "test.csv", OFFICIAL, *rows)
    audio(
        tmp_path / "audio" / "deep" / "Yaaa.wav",
        tmp_path / "audio" / "bbb.flac",
        tmp_path / "evaluation" / "ccc_30.ogg",
        tmp_path / "test" / "YYddd.wav",
        tmp_path / "elsewhere" / "Yeee.wav",
    )
    assert found("audiocaps", tmp_path, "test") == {
        "audioset/aaa": "audio/deep/Yaaa.wav",
        "audioset/bbb": "audio/bbb.flac",
        "audioset/ccc": "evaluation/ccc_30.ogg",
        "audioset/Yddd": "test/YYddd.wav",
        "audioset/eee": "",
    }
    plan = plan_build(open_corpus("audiocaps", tmp_path), "testing", [])
    assert len(plan.clips) == 4 and [clip.reason for clip in plan.dropped] == ["missing_audio"]


def test_audiocaps_derivative(tmp_path: Path) -> None:
    table(tmp_path / "train.csv", ["file_name", "caption"], ["Yabc.wav", "one"])
    table(tmp_path / "val.csv", ["file_name", "caption_2", "caption_1"], ["YYbc.wav", "second", "first"])
    assert open_corpus("audiocaps", tmp_path).read_clips("train")[0].clip_id == "audioset/abc"
    val = open_corpus("audiocaps", tmp_path).read_clips("val")[0]
    assert (val.clip_id, val.captions, val.meta) == ("audioset/Ybc", ["first", "second"], {"youtube_id": "Ybc"})


def test_two_cuts_of_a_video_are_two_clips(tmp_path: Path) -> None:
    table(tmp_path / "train.csv", OFFICIAL, ["1", "abc", "30", "x"], ["2", "abc", "50", "y"], ["3", "d", "30", "z"])
    audio(*(tmp_path / "audio" / name for name in ("Yabc.wav", "abc_30.wav", "Yabc_50.wav", "Yd.wav")))
    assert found("audiocaps", tmp_path, "train") == {
        "audioset/abc_30": "audio/abc_30.wav",  # Yabc.wav may be either of them
        "audioset/abc_50": "audio/Yabc_50.wav",
        "audioset/d": "audio/Yd.wav",
    }


def test_a_clip_of_audiocaps_and_wavcaps_is_one_clip(tmp_path: Path) -> None:
    """Read back from the shards of both corpora: in a global batch its two samples are positives of each other."""
    table(tmp_path / "ac" / "train.csv", OFFICIAL, ["1", "abc", "30", "A dog barks"], ["2", "zzz", "0", "Rain falls"])
    table(tmp_path / "mei" / "train.csv", ["file_name", "caption"], ["Yabc.wav", "A dog barks"], ["Yzzz.wav", "Rain"])
    for folder in ("ac", "mei"):
        audio(tmp_path / folder / "audio" / "Yabc.wav", tmp_path / folder / "audio" / "Yzzz.wav")
    make_wavcaps(tmp_path / "wc")
    ids = {}
    for name, root in (("audiocaps", "ac"), ("audiocaps", "mei"), ("wavcaps", "wc")):
        build_shards(name, tmp_path / root, tmp_path / "shards" / root, split="train", sample_rate=8000, workers=1)
        shards = open_shards(str(tmp_path / "shards" / root))
        ids[root] = {shards.read_text(i)[0]: shards.read_text(i)[1] for i in range(len(shards))}
    assert ids["ac"].keys() == ids["mei"].keys() == {"audioset/abc", "audioset/zzz"}
    assert ids["ac"].keys() & ids["wc"].keys() == {"audioset/abc"}

    rows = [*sorted(ids["ac"].items()), ("audioset/abc", ids["wc"]["audioset/abc"])]
    batch_ids = torch.tensor([[stable_id(clip), caption_id(captions[0])] for clip, captions in rows])
    mask = positives_mask(batch_ids, batch_ids)
    assert mask.tolist() == [[True, False, True], [False, True, False], [True, False, True]]


CLOTHO = ["file_name", *(f"caption_{n}" for n in range(1, 6))]


@pytest.mark.parametrize("folder", ["", "metadata", "clotho_csv_files"])
@pytest.mark.parametrize("parent", ["", "clotho_audio_files", "audio"])
def test_clotho_layouts(tmp_path: Path, folder: str, parent: str) -> None:
    for split, name in (("development", "a b.c (1).wav"), ("evaluation", " Räin.wav")):
        table(tmp_path / folder / f"clotho_captions_{split}.csv", CLOTHO, [name, *"vwxyz"])
        audio(tmp_path / parent / split / name)
    details = ["file_name", "keywords", "sound_id", "license"]
    table(
        tmp_path / folder / "clotho_metadata_development.csv",
        details,
        ["a b.c (1).wav", "é", "77", "CC0"],
        encoding="iso-8859-1",
    )
    clip = open_corpus("clotho", tmp_path).read_clips("development")[0]
    assert clip.captions == list("vwxyz") and clip.meta == {"sound_id": "77", "license": "CC0"}
    where = f"{parent}/" if parent else ""
    assert found("clotho", tmp_path, "development") == {"clotho/a b.c (1).wav": f"{where}development/a b.c (1).wav"}
    assert found("clotho", tmp_path, "evaluation") == {"clotho/ Räin.wav": f"{where}evaluation/ Räin.wav"}


def test_clotho_notes_sounds_that_are_also_in_another_split(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table(tmp_path / "clotho_captions_development.csv", CLOTHO, ["a.wav", *"vwxyz"], ["b.wav", *"vwxyz"])
    table(tmp_path / "clotho_captions_evaluation.csv", CLOTHO, ["a.wav", *"vwxyz"], ["c.wav", *"vwxyz"])
    for split, name in (("development", "b.wav"), ("evaluation", "c.wav")):
        table(tmp_path / f"clotho_metadata_{split}.csv", ["file_name", "sound_id"], [name, "9"])
    clips = open_corpus("clotho", tmp_path).read_clips("development")
    assert [clip.meta.get("also_in") for clip in clips] == [["evaluation"], ["evaluation"]]
    assert "2 of 2 clips are also in another split" in caplog.text


def wavcaps_json(path: Path, *rows: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"num_captions_per_audio": 1, "data": list(rows)}))


def make_wavcaps(root: Path, json_folder: str = "json_files") -> None:
    place = root / json_folder
    wavcaps_json(place / "FreeSound" / "fsd_final.json", *({"id": str(n), "caption": f"f{n}"} for n in (7, 8)))
    wavcaps_json(place / "FreeSound" / "fsd_final_2s.json", {"id": "7", "caption": "f7"})
    wavcaps_json(place / "BBC_Sound_Effects" / "bbc_final.json", {"id": "NHU1", "caption": "b"})
    wavcaps_json(place / "SoundBible" / "sb_final.json", {"id": "7", "caption": "s", "title": "T", "href": "h"})
    names = ("Yabc.wav", "YVcu0pVF1npM.wav")
    wavcaps_json(place / "AudioSet_SL" / "as_final.json", *({"id": name, "caption": "a"} for name in names))
    audio(
        root / "Waveforms" / "FreeSound_flac" / "7.flac",
        root / "Waveforms" / "FreeSound_flac" / "8.flac",
        root / "BBC_Sound_Effects_flac" / "NHU1.flac",
        root / "mnt" / "deep" / "SoundBible_flac" / "7.flac",
        root / "Waveforms" / "AudioSet_SL_flac" / "Yabc.flac",
        root / "Waveforms" / "AudioSet_SL_flac" / "YVcu0pVF1npM.flac",
    )


@pytest.mark.parametrize("json_folder", ["json_files", "."])
def test_wavcaps_four_sources(tmp_path: Path, json_folder: str) -> None:
    make_wavcaps(tmp_path, json_folder)
    assert found("wavcaps", tmp_path, "train") == {
        "wavcaps/freesound/7": "Waveforms/FreeSound_flac/7.flac",
        "wavcaps/freesound/8": "Waveforms/FreeSound_flac/8.flac",
        "wavcaps/bbc/NHU1": "BBC_Sound_Effects_flac/NHU1.flac",
        "wavcaps/soundbible/7": "mnt/deep/SoundBible_flac/7.flac",
        "audioset/abc": "Waveforms/AudioSet_SL_flac/Yabc.flac",
        "audioset/Vcu0pVF1npM": "Waveforms/AudioSet_SL_flac/YVcu0pVF1npM.flac",
    }
    metas = {clip.clip_id: clip.meta for clip in open_corpus("wavcaps", tmp_path).read_clips("train")}
    assert metas["audioset/abc"]["youtube_id"] == "abc" and metas["wavcaps/freesound/7"]["sound_id"] == "7"
    assert metas["wavcaps/soundbible/7"] == {"source": "soundbible", "title": "T", "href": "h"}


def test_exclusions_are_applied_and_recorded(tmp_path: Path) -> None:
    root = tmp_path / "WavCaps"
    make_wavcaps(root)
    (root / "blacklist").mkdir()
    default = {"AudioSet": ["Yabc.wav", "Yzzz.wav"], "FreeSound": []}
    (root / "blacklist" / "blacklist_exclude_test_ac.json").write_text(json.dumps(default))
    dcase = tmp_path / "dcase.csv"
    table(dcase, ["file_name", "sound_id"], ["x", "8"], ["y", "Not found"], ["z", "123"])
    manifest = build_shards("wavcaps", root, tmp_path / "out", sample_rate=8000, workers=1, exclude=[dcase])
    recorded = [(e["name"], e["entries"], e["excluded"]) for e in manifest["exclusions"]]
    assert recorded == [
        ("unreadable AudioSet files", 6, 1),
        ("blacklist_exclude_test_ac.json", 2, 1),
        ("dcase.csv", 3, 1),
    ]
    assert all(len(e["sha256"]) == 64 for e in manifest["exclusions"]) and manifest["num_samples"] == 3
    assert manifest["split"] == "train" and manifest["dropped"] == {}


def test_exclusions_match_every_corpus_that_names_its_sources(tmp_path: Path) -> None:
    table(tmp_path / "captions.csv", ["file_name", "caption", "youtube_id"], ["a.wav", "x", "abc"], ["b.wav", "y", "d"])
    audio(tmp_path / "audio" / "a.wav", tmp_path / "audio" / "b.wav")
    blacklist = tmp_path / "b.json"
    blacklist.write_text(json.dumps({"AudioSet": ["Yabc.wav"], "FreeSound": []}))
    plan = plan_build(open_corpus("folder", tmp_path), None, [blacklist])
    assert [clip.captions for clip in plan.clips] == [["y"]]
    blacklist.write_text(json.dumps({"AudioSet": ["Yabc.wav", "Yd.wav"], "FreeSound": []}))
    with pytest.raises(UserError, match="leave none of the 2 clips"):
        plan_build(open_corpus("folder", tmp_path), None, [blacklist])


@pytest.mark.parametrize("ids", [["401", "402"], ["401.0", "402.0"], [401.0, 402], ["401.0", None, "402"]])
def test_ids_match_also_if_a_table_made_them_floats(tmp_path: Path, ids: list[Any]) -> None:
    rows = [["a.wav", "x", "401"], ["b.wav", "y", "402.0"], ["c.wav", "z", "403.0"]]
    table(tmp_path / "captions.csv", ["file_name", "caption", "sound_id"], *rows)
    audio(*(tmp_path / "audio" / f"{name}.wav" for name in "abc"))
    table(tmp_path / "list.csv", ["n", "sound_id"], *([str(n), str(entry or "")] for n, entry in enumerate(ids)))
    (tmp_path / "list.json").write_text(json.dumps({"FreeSound": ids}))
    for name in ("list.csv", "list.json"):
        plan = plan_build(open_corpus("folder", tmp_path), None, [tmp_path / name])
        assert [clip.captions for clip in plan.clips] == [["z"]] and plan.exclusions[0]["entries"] == 2


def test_a_list_that_can_exclude_nothing_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table(tmp_path / "captions.csv", ["file_name", "caption", "freesound", "youtube_id"], ["a.wav", "x", "401", "abc"])
    audio(tmp_path / "audio" / "a.wav")
    for content in ("sound_id\n401\n", '{"FreeSound": ["401"]}'):
        (tmp_path / "list").write_text(content)
        with pytest.raises(UserError, match=r"list cannot exclude anything: no clip of .* has a sound_id; add"):
            plan_build(open_corpus("folder", tmp_path), None, [tmp_path / "list"])
    (tmp_path / "list").write_text('{"FreeSound": ["401"], "AudioSet": ["Yzzz.wav"]}')
    plan_build(open_corpus("folder", tmp_path), None, [tmp_path / "list"])
    assert "list covers none of the 1 clips" in caplog.text
    (tmp_path / "list").write_text("sound_id,x\n,1\nNone,2\n")
    with pytest.raises(UserError, match="has no ids"):
        read_exclusions(tmp_path / "list")


@pytest.mark.parametrize("content", ["[]", "{", '{"other": []}', '{"AudioSet": 3}'])
def test_a_list_of_another_kind_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "list.json").write_text(content)
    with pytest.raises(UserError, match="WavCaps blacklist"):
        read_exclusions(tmp_path / "list.json")
    table(tmp_path / "list.csv", ["id"], ["1"])
    with pytest.raises(UserError, match="CSV with a column sound_id"):
        read_exclusions(tmp_path / "list.csv")


def test_git_lfs_pointer_is_named(tmp_path: Path) -> None:
    make_wavcaps(tmp_path)
    (tmp_path / "json_files" / "FreeSound" / "fsd_final.json").write_text(
        "version https://git-lfs.github.com/spec/v1\n"
    )
    with pytest.raises(UserError, match="git-LFS pointer"):
        open_corpus("wavcaps", tmp_path).read_clips("train")


def test_folder_splits_labels_and_meta(tmp_path: Path) -> None:
    columns = ["file_name", "caption", "split", "label", "place"]
    rows = [["sub/a.wav", "one", "train", "dog", "garden"], ["b.wav", "two", "test", "", ""]]
    table(tmp_path / "captions.csv", columns, *rows, ["sub/a.wav", "more", "train", "dog", "garden"])
    audio(tmp_path / "audio" / "sub" / "a.wav", tmp_path / "audio" / "b.wav", tmp_path / "b.wav")
    corpus = open_corpus("folder", tmp_path)
    with pytest.raises(UserError, match="has splits test, train, all: choose one with --split"):
        corpus.choose_split(None)
    with pytest.raises(UserError, match="no split 'dev': choose one of test, train, all"):
        corpus.choose_split("dev")
    assert corpus.choose_split("evaluation") == "test"
    clip = corpus.read_clips("train")[0]
    prefix = tmp_path.resolve().name
    assert clip == Clip(f"{prefix}/sub/a.wav", ["one", "more"], "train", label="dog", meta={"place": "garden"})
    assert [c.split for c in corpus.read_clips("all")] == ["train", "test"]
    assert found("folder", tmp_path, "test") == {f"{prefix}/b.wav": "audio/b.wav"}


def test_folder_never_reads_outside_its_audio(tmp_path: Path) -> None:
    audio(tmp_path / "secret.wav", tmp_path / "set" / "audio" / "a.wav")
    rows = [["../../secret.wav", "x"], [str(tmp_path / "secret.wav"), "y"], ["a.wav", "z"]]
    table(tmp_path / "set" / "captions.csv", ["file_name", "caption"], *rows)
    assert list(found("folder", tmp_path / "set", "").values()) == ["", "", "audio/a.wav"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"file_name,caption\na.wav,one,two\n", "line 2: more fields"),
        (b"file_name,caption\na.wav\n", "line 2: fewer fields"),
        (b"file_name,caption\na.wav,\xff\xfe\n", "is not utf-8"),
        (b"file_name,caption\n", "has no rows"),
        (b"name,caption\na.wav,x\n", "has no column file_name"),
        (b"file_name,text\na.wav,x\n", "has no column caption or caption_1"),
    ],
)
def test_damaged_tables_are_named_with_their_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "captions.csv").write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_corpus("folder", tmp_path).read_clips("")


@pytest.mark.parametrize(
    ("corpus", "given", "official"),
    [
        ("audiocaps", "validation", "val"),
        ("audiocaps", "development", "train"),
        ("clotho", "train", "development"),
        ("clotho", "val", "validation"),
        ("clotho", "test", "evaluation"),
        ("wavcaps", None, "train"),
        ("wavcaps", "train", "train"),
    ],
)
def test_split_names(corpus: str, given: str | None, official: str, tmp_path: Path) -> None:
    assert open_corpus(corpus, tmp_path).choose_split(given) == official


@pytest.mark.parametrize(
    ("corpus", "given"), [("audiocaps", None), ("clotho", None), ("clotho", "x"), ("wavcaps", "val")]
)
def test_wrong_splits_name_the_known_ones(corpus: str, given: str | None, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=", ".join(CORPORA[corpus].splits)):
        open_corpus(corpus, tmp_path).choose_split(given)


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("folder", "split", "clips", "captions"),
    [
        ("official_v1", "train", 49_838, 49_838),
        ("official_v1", "val", 495, 2_475),
        ("official_v1", "test", 975, 4_875),
        ("wavcaps_repo_csv", "train", 49_274, 49_274),
        ("wavcaps_repo_csv", "val", 494, 5 * 494),
        ("wavcaps_repo_csv", "test", 957, 5 * 957),
    ],
)
def test_every_row_of_audiocaps(real_data: Path, folder: str, split: str, clips: int, captions: int) -> None:
    rows = open_corpus("audiocaps", real_data / "metadata" / "audiocaps" / folder).read_clips(split)
    assert len(rows) == len({clip.clip_id for clip in rows}) == clips
    assert sum(len(clip.captions) for clip in rows) == captions


@pytest.mark.real_data
@pytest.mark.parametrize(("split", "clips"), [("development", 3839), ("validation", 1045), ("evaluation", 1045)])
def test_every_row_of_clotho(real_data: Path, split: str, clips: int) -> None:
    rows = open_corpus("clotho", real_data / "metadata" / "clotho" / "official_v2.1_layout").read_clips(split)
    assert len(rows) == len({clip.clip_id for clip in rows}) == clips
    assert {len(clip.captions) for clip in rows} == {5}


@pytest.mark.real_data
def test_every_row_of_soundbible(real_data: Path) -> None:
    rows = open_corpus("wavcaps", real_data / "metadata" / "wavcaps").read_clips("train")
    assert len(rows) == 1232 and all(len(clip.captions) == 1 for clip in rows)


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "youtube", "freesound"),
    [("test_ac", 1_451, 2_078), ("all_ac", 50_725, 5_905), ("ub8k_esc50_vggsound", 15_510, 2_219)],
)
def test_real_blacklists(real_data: Path, name: str, youtube: int, freesound: int) -> None:
    path = real_data / "metadata" / "wavcaps" / "blacklist" / f"blacklist_exclude_{name}.json"
    entries = read_exclusions(path)
    lists = json.loads(path.read_text())
    assert entries.entries == youtube + freesound
    assert (len(entries.youtube_ids), len(entries.sound_ids)) == (youtube, freesound)
    assert entries.sound_ids == set(lists["FreeSound"])  # distinct: a few are listed twice
    if name == "test_ac":  # the list is AudioCaps val and test of the derivative tables, exactly
        root = real_data / "metadata" / "audiocaps" / "wavcaps_repo_csv"
        clips = [clip for split in ("val", "test") for clip in open_corpus("audiocaps", root).read_clips(split)]
        assert {clip.meta["youtube_id"] for clip in clips} == entries.youtube_ids
