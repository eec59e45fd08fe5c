"""Metadata with anything in it: one bad row never ends a build, and a file of another shape is one line."""

from __future__ import annotations

import copy
import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from atr_scale.data.corpora import open_corpus
from atr_scale.data.dropped import DroppedClip
from atr_scale.data.shard_builder import build_shards, plan_build
from atr_scale.data.shard_check import check_shards
from atr_scale.data.values import caption_texts, id_text, load_json, valid_unicode
from atr_scale.errors import UserError

ODD: list[Any] = [
    None, True, 0, -1.5, 1e308, float("nan"), float("inf"), 10**4000, "", " ", "\0", "\ud83d", "\ufeff", "nan",
    "x" * 70_000, [], {}, [None], ["a", None, "b"], [["a"]], {"a": {"b": [None]}}, "['a', 'b']", "../../etc/passwd",
]  # fmt: skip
BYTES = [b"\xef\xbb\xbf", b"\0", b"\xff", b'"', b"\n", b"\r", b",", b"\xed\xa0\xbd", b"'", b"[", b"9" * 5000, b""]
QUICK = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
IDS = ("101", "102", "103")


def write_audio(*paths: Path) -> None:
    noise = np.random.default_rng(0).integers(-999, 999, 400).astype(np.int16)
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, noise, 8000)


def csv_bytes(*rows: list[str]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()


def wavcaps(root: Path) -> dict[str, bytes]:
    write_audio(*(root / "FreeSound_flac" / f"{n}.flac" for n in IDS))
    rows = [{"id": n, "caption": f"caption {n}", "title": "T", "href": "h", "tags": ["t"]} for n in IDS]
    content = {"num_captions_per_audio": 1, "data": rows}
    blacklist = {"AudioSet": ["Yabc.wav"], "FreeSound": ["999"]}
    return {
        "FreeSound/fsd_final.json": json.dumps(content).encode(),
        "blacklist/blacklist_exclude_test_ac.json": json.dumps(blacklist).encode(),
    }


def audiocaps(root: Path) -> dict[str, bytes]:
    write_audio(*(root / "audio" / f"Y{n}.wav" for n in IDS))
    rows = [[f"{k}", n, "30", f"caption {n}"] for k, n in enumerate(IDS)]
    return {"train.csv": csv_bytes(["audiocap_id", "youtube_id", "start_time", "caption"], *rows)}


def clotho(root: Path) -> dict[str, bytes]:
    write_audio(*(root / "development" / f"{n}.wav" for n in IDS))
    captions = [[f"{n}.wav", *(f"caption {n} {k}" for k in range(5))] for n in IDS]
    header = ["file_name", *(f"caption_{k}" for k in range(1, 6))]
    details = [[f"{n}.wav", "a;b", n, "CC0"] for n in IDS]
    return {
        "clotho_captions_development.csv": csv_bytes(header, *captions),
        "clotho_metadata_development.csv": csv_bytes(["file_name", "keywords", "sound_id", "license"], *details),
        "clotho_captions_evaluation.csv": csv_bytes(header, ["x.wav", *"abcde"]),
    }


def folder(root: Path) -> dict[str, bytes]:
    write_audio(*(root / "audio" / f"{n}.wav" for n in IDS))
    rows = [[f"{n}.wav", f"caption {n}", "train", "label", "garden"] for n in IDS]
    return {"captions.csv": csv_bytes(["file_name", "caption", "split", "label", "place"], *rows)}


CORPUS_FILES: dict[str, Callable[[Path], dict[str, bytes]]] = {
    "wavcaps": wavcaps, "audiocaps": audiocaps, "clotho": clotho, "folder": folder,
}  # fmt: skip


def built(name: str, root: Path, out: Path) -> dict[str, Any] | None:
    """The manifest of a build without a finding; None if it is refused in one line."""
    try:
        manifest = build_shards(name, root, out, split="train", sample_rate=8000, workers=1)
    except UserError as error:
        assert "\n" not in str(error)
        str(error).encode()  # can be printed
        return None
    assert check_shards(str(out)) == []
    return manifest


@pytest.mark.parametrize("name", CORPUS_FILES)
def test_bytes_of_every_file(tmp_path: Path, name: str) -> None:
    files = CORPUS_FILES[name](tmp_path / "corpus")
    count = 0

    @QUICK
    @given(st.sampled_from(sorted(files)), st.data())
    def mutate(file: str, data: st.DataObject) -> None:
        nonlocal count
        count += 1
        changed = bytearray(files[file])
        for _ in range(data.draw(st.integers(1, 4))):
            start = data.draw(st.integers(0, len(changed)))
            stop = min(len(changed), start + data.draw(st.integers(0, 12)))
            changed[start:stop] = data.draw(st.sampled_from(BYTES))
        for other, content in {**files, file: bytes(changed)}.items():
            path = tmp_path / "corpus" / other
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        if built(name, tmp_path / "corpus", tmp_path / f"out-{count}") is not None:
            good.append(count)

    good: list[int] = []
    mutate()
    assert len(good) > 5  # damage of a header, or of the marks of a JSON, leaves nothing to build


def test_values_of_json_lines(tmp_path: Path) -> None:
    """Of three rows, at most one is odd: the other two are built."""
    root = tmp_path / "corpus"
    write_audio(*(root / "audio" / f"{n}.wav" for n in IDS))
    rows = [{"file_name": f"{n}.wav", "caption": f"caption {n}", "label": "x", "tags": ["t"]} for n in IDS]
    count = 0

    @QUICK
    @given(st.data())
    def mutate(data: st.DataObject) -> None:
        nonlocal count
        count += 1
        changed = copy.deepcopy(rows)
        odd_at_some_level(changed, data)
        (root / "t.jsonl").write_text("\n".join(map(json.dumps, changed)))
        options = {"captions": str(root / "t.jsonl")}
        out = tmp_path / f"out-{count}"
        manifest = build_shards("folder", root, out, options=options, sample_rate=8000, workers=1)
        assert check_shards(str(out)) == [] and manifest["num_samples"] >= 2

    mutate()


def test_values_of_every_json(tmp_path: Path) -> None:
    """Of WavCaps' three entries, at most one is odd: the other two are built."""
    files = wavcaps(tmp_path / "corpus")
    count = 0

    @QUICK
    @given(st.sampled_from(sorted(files)), st.data())
    def mutate(file: str, data: st.DataObject) -> None:
        nonlocal count
        count += 1
        content = json.loads(files[file])
        path = odd_at_some_level(content, data)
        for other, payload in files.items():
            place = tmp_path / "corpus" / other
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(json.dumps(content).encode() if other == file else payload)
        manifest = built("wavcaps", tmp_path / "corpus", tmp_path / f"out-{count}")
        if len(path) >= 2 and path[0] == "data":
            assert manifest is not None and manifest["num_samples"] >= 2
            left_out = sum(manifest["dropped"].values())
            assert manifest["num_samples"] + left_out == 3

    mutate()


def odd_at_some_level(content: Any, data: st.DataObject) -> list[Any]:
    """Replace a value, or remove a key, at a random place of a JSON; returns the keys that lead there."""
    path: list[Any] = []
    while True:
        keys = list(content) if isinstance(content, dict) else range(len(content))
        key = data.draw(st.sampled_from(keys))
        path.append(key)
        inner = content[key]
        if isinstance(inner, dict | list) and inner and data.draw(st.booleans()):
            content = inner
            continue
        if isinstance(content, dict) and data.draw(st.integers(0, 4)) == 0:
            del content[key]
        else:
            content[key] = copy.deepcopy(data.draw(st.sampled_from(ODD)))
        return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"data": None}, "`data` is null, not a list of entries"),
        ({"data": {}}, "`data` is an object"),
        ({"rows": []}, "`data` is missing"),
        ([], "is a list, not an object"),
        ({"data": [None]}, r"no entry .*data\[0\]: null, not an object"),
        ({"data": [{"id": True, "caption": "x"}]}, r"data\[0\]: its id is a boolean"),
    ],
)
def test_a_json_of_another_shape_names_file_and_field(tmp_path: Path, content: Any, message: str) -> None:
    write_audio(tmp_path / "FreeSound_flac" / "1.flac")
    path = tmp_path / "FreeSound" / "fsd_final.json"
    path.parent.mkdir()
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as caught:
        build_shards("wavcaps", tmp_path, tmp_path / "out")
    assert str(path) in str(caught.value)


def test_a_cut_emoji_is_cleaned_and_named_rows_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_audio(*(tmp_path / "corpus" / "FreeSound_flac" / f"{n}.flac" for n in range(30)))
    rows: list[Any] = [
        {"id": 0, "caption": "A bell rings.", "title": "my sound \ud83d"},
        {"id": 1.0, "caption": "Rain."},
    ]
    rows += [{"id": n, "caption": {"text": n}} for n in range(2, 30)]
    path = tmp_path / "corpus" / "FreeSound" / "fsd_final.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"data": rows}))
    manifest = build_shards("wavcaps", tmp_path / "corpus", tmp_path / "out", sample_rate=8000, workers=1)
    assert manifest["num_samples"] == 2 and manifest["dropped"] == {"bad_row": 28}
    lines = [DroppedClip(**json.loads(line)) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    assert lines[0] == DroppedClip("", f"{path}, data[2]", "bad_row", "a caption is an object, not a text")
    assert len(lines) == 28 and caplog.text.count("left out: bad_row") == 20
    assert "dropped.jsonl names all of them" in caplog.text
    plan = plan_build(open_corpus("wavcaps", tmp_path / "corpus"), None, [])
    assert sorted(clip.meta.get("title", "") for clip in plan.clips) == ["", "my sound \ufffd"]


def test_rows_of_tables_that_cannot_be_used_are_named_with_their_line(tmp_path: Path) -> None:
    write_audio(*(tmp_path / "corpus" / "audio" / f"{n}.wav" for n in range(9)))
    swallowed = "".join(f"8.wav,line {n}\n" for n in range(150))
    content = (
        "file_name,caption\n0.wav,fine\n1.wav\n2.wav,a,b\n\n,no name\n3.wav,None\n4.wav,\"['one', 'two']\"\n"
        f'5.wav,caf\udce9\n6.wav,also fine\n7.wav,"never closed\n{swallowed}'
    )
    table = tmp_path / "corpus" / "captions.csv"
    table.write_bytes(content.encode("utf-8", "surrogateescape"))
    manifest = build_shards("folder", tmp_path / "corpus", tmp_path / "out", sample_rate=8000, workers=1)
    assert (manifest["num_samples"], manifest["num_captions"]) == (3, 4)
    assert manifest["dropped"] == {"bad_row": 5, "no_caption": 1}
    lines = map(json.loads, (tmp_path / "out" / "dropped.jsonl").read_text().splitlines())
    assert {(line["path"].rpartition(", ")[2], line["detail"]) for line in lines if line["reason"] == "bad_row"} == {
        ("line 3", "fewer fields than the header; check its quotes"),
        ("line 4", "more fields than the header; check its quotes"),
        ("line 6", "names no file"),
        ("line 9", "is not utf-8-sig; convert the file to UTF-8"),
        ("line 11", "a row of 151 lines; check its quotes"),
    }


def test_captions_and_ids_of_other_types() -> None:
    assert caption_texts("['a dog', \"a cat's\"]") == ["a dog", "a cat's"]
    assert caption_texts("['a' 'b'\n 'c']") == ["a", "b", "c"]  # as numpy writes it
    assert caption_texts('["a", null]') == caption_texts(["a", None]) == ["a"]
    assert caption_texts("[Music] plays") == ["[Music] plays"] and caption_texts("[music]") == ["[music]"]
    assert [caption_texts(text) for text in (None, "None", "nan", " ", float("nan"))] == [[]] * 5
    ids: list[Any] = [7, 7.0, "7.0", " 07 ", True, None, "nan", 7.5, []]
    assert list(map(id_text, ids)) == [
        "7", "7", "7", "07", "", "", "", "", "",
    ]  # fmt: skip
    assert valid_unicode({"a\ud83d": ["\ud83d\ude00", 1]}) == {"a\ufffd": ["\U0001f600", 1]}
    assert load_json(b'{"a": ' + b"9" * 5000 + b"}") == {"a": "9" * 5000}
    with pytest.raises(ValueError, match="too deeply"):
        load_json(b"[" * 100_000)
