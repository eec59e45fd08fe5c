"""The demo corpora on disk: official formats, no shared scenes, the same bytes from the same seed; the text encoder."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile as sf
from typer.testing import CliRunner

from atr_scale.cli import app
from atr_scale.data.corpora import open_corpus
from atr_scale.demo import corpora, scenes
from atr_scale.demo.clips import DemoClip, Sizes, plan_clips
from atr_scale.demo.corpora import training_captions, write_demo_corpora
from atr_scale.demo.lexicon import LEXICON
from atr_scale.demo.scenes import render
from atr_scale.errors import UserError
from atr_scale.evaluation.relevance import read_relevance

TINY = Sizes(6, 3, 4, 3, 2, 2, 14, shared=1)
RATE = 16_000


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "corpora"
    write_demo_corpora(out, seed=3, sample_rate=RATE, workers=1, sizes=TINY)
    return out


def table(path: Path, encoding: str = "utf-8") -> list[dict[str, str]]:
    with path.open(encoding=encoding, newline="") as file:
        return list(csv.DictReader(file))


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_same_bytes_again_with_two_processes(demo: Path, tmp_path: Path) -> None:
    write_demo_corpora(tmp_path / "again", seed=3, sample_rate=RATE, workers=2, sizes=TINY)
    assert digests(tmp_path / "again") == digests(demo)


def test_another_seed_gives_other_scenes() -> None:
    first, second = plan_clips(0, TINY), plan_clips(1, TINY)
    assert not {c.scene.signature for c in first} & {c.scene.signature for c in second}


def test_audiocaps_format(demo: Path) -> None:
    for split, clips, captions in (("train", 6, 1), ("val", 3, 5), ("test", 4, 5)):
        rows = table(demo / "audiocaps" / "dataset" / f"{split}.csv")
        assert list(rows[0]) == ["audiocap_id", "youtube_id", "start_time", "caption"]
        assert len(rows) == clips * captions
        ids = {row["youtube_id"] for row in rows}
        assert len(ids) == clips and all(len(youtube_id) == 11 for youtube_id in ids)
        for youtube_id in ids:
            info = sf.info(demo / "audiocaps" / "audio" / split / f"Y{youtube_id}.wav")
            assert (info.duration, info.samplerate, info.channels, info.subtype) == (10.0, RATE, 1, "PCM_16")


def test_clotho_format(demo: Path) -> None:
    columns = ["file_name", "keywords", "sound_id", "sound_link", "start_end_samples", "manufacturer", "license"]
    for split in ("development", "validation", "evaluation"):
        rows = table(demo / "clotho" / f"clotho_captions_{split}.csv")
        assert list(rows[0]) == ["file_name", *(f"caption_{k}" for k in range(1, 6))]
        details = table(demo / "clotho" / f"clotho_metadata_{split}.csv", "ISO-8859-1")
        assert list(details[0]) == columns
        assert [row["file_name"] for row in rows] == [row["file_name"] for row in details]
        with pytest.raises(UnicodeDecodeError):
            table(demo / "clotho" / f"clotho_metadata_{split}.csv")
        for row in rows:
            assert 15 <= sf.info(demo / "clotho" / split / row["file_name"]).duration <= 30
            assert len({row[f"caption_{k}"] for k in range(1, 6)}) == 5


def test_wavcaps_format_and_blacklists(demo: Path) -> None:
    root = demo / "wavcaps"
    blacklist = {
        name: json.loads((root / "json_files" / "blacklist" / f"blacklist_exclude_{name}_ac.json").read_text())
        for name in ("test", "all")
    }
    assert len(blacklist["test"]["AudioSet"]) == 3 + 4 and len(blacklist["test"]["FreeSound"]) == 2 + 2
    assert len(blacklist["all"]["AudioSet"]) == 13 and len(blacklist["all"]["FreeSound"]) == 7
    ids = {}
    for source, name in corpora.WAVCAPS_JSON.items():
        content = json.loads((root / "json_files" / source / name).read_text())
        assert content["num_captions_per_audio"] == 1
        for row in content["data"]:
            assert {"id", "caption", "duration", "audio"} <= set(row) and isinstance(row["id"], str)
            info = sf.info(root / "Waveforms" / source / f"{row['id'].removesuffix('.wav')}.flac")
            assert info.format == "FLAC" and info.duration == pytest.approx(row["duration"], abs=1 / RATE)
        ids[source] = {row["id"] for row in content["data"]}
    assert sum(map(len, ids.values())) == TINY.wavcaps_train
    assert len(ids["AudioSet_SL"] & set(blacklist["test"]["AudioSet"])) == 2
    assert len(ids["FreeSound"] & set(blacklist["test"]["FreeSound"])) == 2
    assert all(name.startswith("Y") and name.endswith(".wav") for name in ids["AudioSet_SL"])


def test_a_shared_clip_is_the_same_sound(demo: Path) -> None:
    val = demo / "audiocaps" / "audio" / "val"
    shared = [path for path in val.iterdir() if (demo / "wavcaps/Waveforms/AudioSet_SL" / f"{path.stem}.flac").exists()]
    assert len(shared) == 1
    twin = demo / "wavcaps" / "Waveforms" / "AudioSet_SL" / f"{shared[0].stem}.flac"
    assert (sf.read(shared[0])[0] == sf.read(twin)[0]).all()


def test_the_projects_own_readers_read_every_clip(demo: Path) -> None:
    splits = [("audiocaps", split, n) for split, n in (("train", 6), ("val", 3), ("test", 4))]
    splits += [("clotho", split, n) for split, n in (("development", 3), ("validation", 2), ("evaluation", 2))]
    splits += [("wavcaps", "train", 14)]
    for corpus, split, count in splits:
        reader = open_corpus(corpus, demo / corpus)
        clips = reader.read_clips(split)
        found = reader.find_audio(split, clips)
        assert len(clips) == count and all(Path(path).is_file() for path in found)
        with np.load(demo / "relevance" / f"{corpus}-{split}.npz") as truth:
            assert sorted(clip.clip_id for clip in clips) == sorted(truth["clip_ids"].tolist())
        texts = json.loads((demo / "contents.json").read_text())["splits"][f"{corpus}/{split}"]["captions"]
        stated = {(row["clip_id"], row["caption_index"]): row["text"] for row in texts}
        for clip in clips:
            assert list(clip.captions) == [stated[clip.clip_id, k] for k in range(len(clip.captions))]


def test_relevance_is_read_by_evaluation_and_one_for_a_captions_own_clip(demo: Path) -> None:
    clips = open_corpus("audiocaps", demo / "audiocaps").read_clips("test")
    embedded: Any = SimpleNamespace(
        captions=[caption for clip in clips for caption in clip.captions],
        owner=np.repeat(np.arange(4), 5),
        clip_ids=[clip.clip_id for clip in clips],
    )
    shards: Any = SimpleNamespace(location="somewhere")
    grades = read_relevance(demo / "relevance" / "audiocaps-test.npz", shards, embedded)
    assert grades.shape == (20, 4) and 0 <= grades.min() < 0.5
    assert grades[np.arange(20), embedded.owner].tolist() == [1.0] * 20
    with pytest.raises(UserError, match="give the file of this split"):
        read_relevance(demo / "relevance" / "clotho-evaluation.npz", shards, embedded)


def test_contents_stand_in_the_order_of_the_grades(demo: Path) -> None:
    splits = json.loads((demo / "contents.json").read_text())["splits"]
    assert {name.replace("/", "-") for name in splits} == {path.stem for path in (demo / "relevance").iterdir()}
    for name, contents in splits.items():
        with np.load(demo / "relevance" / f"{name.replace('/', '-')}.npz") as truth:
            assert [clip["clip_id"] for clip in contents["clips"]] == truth["clip_ids"].tolist()
            captions = zip(truth["caption_clip"].tolist(), truth["caption_index"].tolist(), strict=True)
            assert [(row["clip_id"], row["caption_index"]) for row in contents["captions"]] == list(captions)


def test_moments_are_where_the_sounds_are(demo: Path) -> None:
    splits: dict[str, list[DemoClip]] = {}
    for clip in plan_clips(3, TINY):
        splits.setdefault(clip.name, []).append(clip)
    assert {name.replace("/", "-") for name in splits} == {path.stem for path in (demo / "moments").iterdir()}
    for name, clips in splits.items():
        file = demo / "moments" / f"{name.replace('/', '-')}.jsonl"
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        assert len(rows) == sum(len(clip.scene.events) for clip in clips)
        assert len({row["qid"] for row in rows}) == len(rows)
        for row in rows:
            clip = next(clip for clip in clips if clip.clip_id == row["vid"])
            event = clip.scene.events[int(row["qid"].rpartition("#")[2]) - 1]
            samples, rate = sf.read(file.parent / row["path"])
            assert len(samples) / rate == pytest.approx(row["duration"], abs=1 / RATE)
            [(start, stop)] = row["relevant_windows"]
            assert 0 <= start < stop <= row["duration"]
            assert start == pytest.approx(event.onset, abs=1e-3)
            words = LEXICON[event.sound.label]
            known = [text.partition("|")[2] for text in words.subjects] + [
                noun for pair in words.nouns for noun in pair
            ]
            assert any(word in row["query"] for word in known), row["query"]
            alone = render(replace(clip.scene, events=(event,), background=None), RATE)
            heard = np.flatnonzero(np.abs(alone) > 2 * scenes.NOISE_FLOOR) / RATE
            assert start - 0.01 <= heard.min() < start + 0.3 and heard.max() <= stop + 0.3, row["query"]


def test_no_scene_is_shared_except_the_blacklisted_ones() -> None:
    clips = plan_clips(0, Sizes().scaled(0.3))
    by_signature: dict[str, list[DemoClip]] = {}
    for clip in clips:
        by_signature.setdefault(clip.scene.signature, []).append(clip)
    shared = [group for group in by_signature.values() if len(group) > 1]
    assert len(shared) == 6 * Sizes().scaled(0.3).shared
    for first, second in shared:
        assert second.corpus == "wavcaps" and first.corpus != "wavcaps"
        assert second.native_id in (f"Y{first.native_id}.wav", first.sound_id)
    one_id = [group for group in shared if group[0].clip_id == group[1].clip_id]
    assert {first.corpus for first, _ in one_id} == {"audiocaps"}  # the same video; one of Clotho is a cut of its sound
    assert len({clip.clip_id for clip in clips}) == len(clips) - len(one_id)


def test_a_split_does_not_depend_on_the_size_of_the_next() -> None:
    def train(sizes: Sizes) -> list[str]:
        return [clip.captions[0].text for clip in plan_clips(0, sizes) if clip.name == "audiocaps/train"]

    assert train(TINY) == train(replace(TINY, audiocaps_test=9, wavcaps_train=20))


def test_an_interrupted_folder_is_completed_and_a_finished_one_left(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "demo"
    rendered = 0
    whole: Callable[..., Any] = scenes.render

    def breaking(*args: Any) -> Any:
        nonlocal rendered
        rendered += 1
        if rendered == 9:
            raise KeyboardInterrupt
        return whole(*args)

    def write() -> None:
        write_demo_corpora(out, seed=3, sample_rate=RATE, workers=1, sizes=TINY)

    monkeypatch.setattr(corpora, "render", breaking)
    with pytest.raises(KeyboardInterrupt):
        write()
    write()
    total = 13 + 7 + 14
    assert rendered == total + 1
    assert digests(out) == digests(demo)
    write()
    assert rendered == total + 1


@pytest.mark.parametrize("folder", ["relevance", "moments"])
def test_a_folder_from_before_relevance_or_moments_gets_them_and_keeps_its_audio(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    out = tmp_path / "demo"
    shutil.copytree(demo, out)
    shutil.rmtree(out / folder)
    monkeypatch.setattr(corpora, "render", lambda *args: pytest.fail("made again"))
    for _ in range(2):
        write_demo_corpora(out, seed=3, sample_rate=RATE, workers=1, sizes=TINY)
        assert digests(out) == digests(demo)


def test_other_settings_and_foreign_folders_are_refused(demo: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="made with another seed"):
        write_demo_corpora(demo, seed=4, sample_rate=RATE, workers=1, sizes=TINY)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        write_demo_corpora(tmp_path, workers=1, sizes=TINY)
    with pytest.raises(UserError, match="16000"):
        write_demo_corpora(tmp_path / "new", sample_rate=8000, workers=1, sizes=TINY)


def test_the_verb_writes_corpora_and_a_text_encoder_that_loads_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "demo"
    arguments = ["demo-data", "--out", str(out), "--clips-scale", "0.01", "--workers", "1"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(out / "text_encoder")
    model = AutoModel.from_pretrained(out / "text_encoder", add_pooling_layer=False)
    assert model.config.model_type == "bert" and model.config.hidden_dropout_prob == 0.1
    held_out = [row["caption"] for row in table(out / "audiocaps" / "dataset" / "test.csv")]
    for caption in training_captions(out) + held_out:
        tokens = tokenizer(caption)["input_ids"]
        assert tokenizer.unk_token_id not in tokens
        assert tokens[0] == tokenizer.cls_token_id and tokens[-1] == tokenizer.sep_token_id
    batch = tokenizer(held_out[:3], padding=True, return_tensors="pt")
    assert model(**batch).last_hidden_state.shape[2] == 192


def test_the_text_encoder_is_the_same_from_the_same_seed(demo: Path, tmp_path: Path) -> None:
    from atr_scale.demo.text_encoder import build_demo_text_encoder

    captions = training_captions(demo)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        build_demo_text_encoder(captions, tmp_path / name, seed=seed, layers=1, dim=32, heads=2)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert digests(tmp_path / "a") != digests(tmp_path / "c")
