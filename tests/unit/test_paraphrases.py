"""Paraphrases: read from answers, chosen, stored beside the shards, drawn by the training stream."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from atr_scale.batch import Batch, caption_id, stable_id
from atr_scale.config import parse_config
from atr_scale.data.options import DataSection, TrainingSource
from atr_scale.data.paraphrases.choose import Chooser
from atr_scale.data.paraphrases.endpoint import Unanswered, parse_answer
from atr_scale.data.paraphrases.stored import FILE, Appender, Paraphrases, make_record
from atr_scale.data.shard_reader import open_shards
from atr_scale.data.stream import TrainingStream, read_batches
from atr_scale.distributed.world import World
from atr_scale.errors import UserError
from tests.coded import CAPTIONS, CROP, QUANTUM, RATE, NumberTokenizer, clip_and_start, write_shards

pytestmark = pytest.mark.timeout(300)
CLIPS = 20
ORIGIN = {"model": "m", "text_encoder": "e", "prompt_version": 1}


@pytest.mark.parametrize(
    "content",
    [
        '{"paraphrases": ["a", "b"]}',
        '["a", "b"]',
        'Here you are:\n```json\n{"paraphrases": ["a", "b"]}\n```\nAnything else?',
        '<think>Perhaps ["x", "y"]? No [it is {odd].</think> {"count": 2, "paraphrases": ["a", "b", 3, null]}',
        '{"paraphrases": ["a", "b"]} [1, 2]',
    ],
)
def test_answers_that_can_be_read(content: str) -> None:
    assert parse_answer(content) == ["a", "b"]


@pytest.mark.parametrize(
    "content", [None, "", "I cannot.", '{"paraphrases": ["a", "b"', '{"paraphrases": []}', "[" * 500]
)
def test_answers_that_cannot(content: str | None) -> None:
    with pytest.raises(Unanswered, match="no list of paraphrases"):
        parse_answer(content)


def embed_angles(texts: Sequence[str]) -> Tensor:
    """The angle to the caption is 30 degrees for each "far" in the text."""
    angles = [math.radians(30 * text.lower().split().count("far")) for text in texts]
    return torch.tensor([[math.cos(a), math.sin(a)] for a in angles])


def test_the_closest_are_kept_and_the_rest_counted() -> None:
    candidates = [
        "dogs bark far far", "dogs bark far", "Dogs bark!", "some dogs barking", "Some dogs, barking.",
        "3 dogs bark", "dogs bark far away", " ", " ".join(["dog"] * 21), "barking of  dogs",
    ]  # fmt: skip
    kept, rejected = Chooser(embed_angles, "e", keep=3, threshold=0.7).choose("dogs bark", candidates)
    assert [text for text, _ in kept] == ["some dogs barking", "barking of dogs", "dogs bark far"]
    assert [round(cosine, 3) for _, cosine in kept] == [1, 1, 0.866]
    assert rejected == {
        "copy": 1, "duplicate": 1, "new_number": 1, "empty": 1, "too_long": 1, "too_far": 1, "surplus": 1,
    }  # fmt: skip


def test_what_the_caption_has_may_stay() -> None:
    """Its own numbers, and as many words as it has."""
    caption = " ".join(["word"] * 24) + " 12"
    candidates = [caption.replace("12", "and 12"), caption.replace("word word", "phrase", 1)]
    kept, rejected = Chooser(embed_angles, "e", keep=5, threshold=0.7).choose(caption, candidates)
    assert [text for text, _ in kept] == candidates[1:] and rejected == {"too_long": 1}


def test_nothing_to_choose_from_is_not_embedded() -> None:
    chooser = Chooser(lambda texts: pytest.fail("embedded"), "e", keep=5, threshold=0.7)
    assert chooser.choose("a dog", ["A dog."])[0] == []


def store(location: str, *records: dict) -> None:
    with Appender(location) as file:
        for record in records:
            file.append(record)


def test_what_is_stored_is_found_by_clip_index_and_wording(tmp_path: Path) -> None:
    place = str(tmp_path)
    store(
        place,
        *(
            make_record(f"c/{n}", 1, "a dog", [(f"a hound {n}", 0.9), ("ein Hündchen", 0.8)], **ORIGIN)
            for n in range(50)
        ),
    )
    store(place, make_record("c/7", 1, "a dog", [("newer", 0.9)], **ORIGIN), make_record("c/8", 0, "b", [], **ORIGIN))
    found = Paraphrases(place)
    assert len(found) == 50
    for n in (0, 13, 49):
        assert found.of(f"c/{n}", 1, "a dog") == [f"a hound {n}", "ein Hündchen"]
    assert found.of("c/7", 1, "a dog") == ["newer"]
    for absent in [("c/3", 0, "a dog"), ("c/3", 1, "a cat"), ("c/50", 1, "a dog"), ("c/8", 0, "b")]:
        assert found.of(*absent) == []
    assert len(Paraphrases(str(tmp_path / "nowhere"))) == 0
    line = json.loads((tmp_path / FILE).read_text().splitlines()[0])
    assert line == {
        "clip_id": "c/0", "caption_index": 1, "caption": "a dog",
        "paraphrases": [{"text": "a hound 0", "cosine": 0.9}, {"text": "ein Hündchen", "cosine": 0.8}], **ORIGIN,
    }  # fmt: skip


def test_an_interrupted_write_costs_its_line_alone(tmp_path: Path) -> None:
    place = str(tmp_path)
    records = [make_record("c/0", k, "a dog", [(f"hound {k}", 0.9)], **ORIGIN) for k in range(3)]
    store(place, *records[:2])
    path = tmp_path / FILE
    os.truncate(path, path.stat().st_size - 9)
    assert len(Paraphrases(place)) == 1
    store(place, *records[1:])
    assert [json.loads(line)["caption_index"] for line in path.read_text().splitlines()] == [0, 1, 2]


@pytest.mark.parametrize("line", ["words", "[1]", '{"clip_id": "a"}', '{"paraphrases": [{"text": 3}]}'])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    store(str(tmp_path), make_record("c/0", 0, "a dog", [("a hound", 0.9)], **ORIGIN))
    with open(tmp_path / FILE, "a", encoding="utf-8") as file:
        file.write(f"{line}\n")
    with pytest.raises(UserError, match=r"captions.augmented.jsonl, line 2: ") as caught:
        Paraphrases(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write"), Appender(str(tmp_path / "nowhere")):
        pass


def test_captions_are_read_without_the_audio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = open_shards(write_shards(tmp_path, range(5)))
    whole = [shards.read(i) for i in range(5)]
    sizes: list[int] = []
    original = type(shards)._bytes
    monkeypatch.setattr(type(shards), "_bytes", lambda self, i, a, b: (sizes.append(b - a), original(self, i, a, b))[1])
    assert [shards.read_text(i) for i in range(5)] == [(s.clip_id, s.captions, s.meta) for s in whole]
    assert max(sizes) < 1000 < min(len(s.audio) for s in whole)


# The stream. Clip n's caption k has paraphrases 10 (k + 1) + j; its third caption has none.
PARAPHRASES = (2, 4, 0)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = write_shards(tmp_path_factory.mktemp("augmented") / "left", range(CLIPS))
    records = [
        make_record(
            f"left/{n:02}.wav", k, f"clip {n} take {k}",
            [(f"reworded {n} as {10 * (k + 1) + j}", 0.9) for j in range(PARAPHRASES[k])], **ORIGIN,
        )
        for n in range(CLIPS) for k in range(CAPTIONS)
    ]  # fmt: skip
    store(place, *records)
    return place


def open_stream(*shards: str, share: float, world: World | None = None) -> TrainingStream:
    data = DataSection(
        train=[TrainingSource(shards=place) for place in shards],
        crop_seconds=CROP / RATE,
        crop_quantum=QUANTUM / RATE,
        augmented_captions=share,
    )
    return TrainingStream(
        data, tokenizer=NumberTokenizer(), sample_rate=RATE, global_batch_size=10, seed=3, world=world or World()
    )


def read(stream: TrainingStream, first: int, last: int, workers: int = 0) -> list[Batch]:
    return list(read_batches(stream.between(first, last), workers))


def rows_of(batches: list[Batch]) -> list[tuple[int, int, int, int, int]]:
    """(clip, first sample, index of the original caption, take or paraphrase number, id of the text) of every row."""
    rows = []
    for batch in batches:
        for row in range(len(batch.keys)):
            clip, start = clip_and_start(batch, row)
            told, number = batch.input_ids[row].tolist()
            index = int(batch.caption_index[row])
            assert told == clip and int(batch.stored_ids[row]) == stable_id(f"clip {clip} take {index}")
            rows.append((clip, start, index, number, int(batch.caption_ids[row])))
    return rows


def test_a_fraction_of_visits_takes_paraphrases(shards: str) -> None:
    """Of the visits whose caption has one; the crop and the original caption of a visit stay the same."""
    plain, mixed, reworded = (rows_of(read(open_stream(shards, share=share), 0, 40)) for share in (0, 0.4, 1))
    assert all(number == index for _, _, index, number, _ in plain)
    for rows in (mixed, reworded):
        assert [row[:3] for row in rows] == [row[:3] for row in plain]
        for clip, _, index, number, text_id in rows:
            if number < 10:
                assert number == index and text_id == caption_id(f"clip {clip} take {index}")
            else:
                assert number // 10 == index + 1 and number % 10 < PARAPHRASES[index]
                assert text_id == caption_id(f"reworded {clip} as {number}")
    assert all((number >= 10) == (index < 2) for _, _, index, number, _ in reworded)
    having = [number for _, _, index, number, _ in mixed if index < 2]
    assert abs(sum(number >= 10 for number in having) / len(having) - 0.4) < 0.1
    drawn = Counter(number for _, _, index, number, _ in reworded if index == 1)
    assert sorted(drawn) == [20, 21, 22, 23] and min(drawn.values()) > 0.5 * max(drawn.values())


def test_any_start_ranks_and_workers_draw_the_same(shards: str) -> None:
    multiprocessing.set_forkserver_preload(["atr_scale.data.stream", "tests.coded"])
    whole = rows_of(read(open_stream(shards, share=0.5), 0, 6))
    assert rows_of(read(open_stream(shards, share=0.5), 4, 6)) == whole[40:]
    assert rows_of(read(open_stream(shards, share=0.5), 0, 6, workers=2)) == whole
    ranks = [read(open_stream(shards, share=0.5, world=World(r, 2)), 0, 6) for r in range(2)]
    assert [row for pair in zip(*ranks, strict=True) for row in rows_of(list(pair))] == whole


def test_a_source_without_paraphrases_is_read_beside_one_with(shards: str, tmp_path: Path) -> None:
    bare = write_shards(tmp_path / "right", range(40, 60))
    rows = rows_of(read(open_stream(bare, shards, share=1), 0, 20))
    assert {clip < 40 for clip, *_ in rows} == {True, False}
    assert all((number >= 10) == (clip < 40 and index < 2) for clip, _, index, number, _ in rows)
    with pytest.raises(UserError, match="atr-scale augment-captions"):
        open_stream(bare, share=0.1)
    assert not open_stream(shards, share=0).paraphrases, "not even read"


def test_training_on_paraphrases_of_an_evaluation_split_is_refused(shards: str, tmp_path: Path) -> None:
    manifest = json.loads(Path(shards, "manifest.json").read_text())
    copy = tmp_path / "test"
    copy.mkdir()
    for name in os.listdir(shards):
        (copy / name).write_bytes(Path(shards, name).read_bytes())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "split": "evaluation"}))
    with pytest.raises(UserError, match="of the split 'evaluation'"):
        open_stream(str(copy), share=0.5)
    open_stream(str(copy), share=0)


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_the_share_is_a_probability(share: float) -> None:
    with pytest.raises(UserError, match="augmented_captions"):
        parse_config({"data": {"train": [{"shards": "x"}], "augmented_captions": share}}, "run.yaml")
