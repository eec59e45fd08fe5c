"""Building and checking shards: counts, bytes, resume, faults."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import webdataset
from typer.testing import CliRunner

from atr_scale.cli import app
from atr_scale.data import shard_builder
from atr_scale.data.decode import decode
from atr_scale.data.shard_builder import build_shards
from atr_scale.data.shard_check import check_shards
from atr_scale.data.shard_reader import open_shards
from atr_scale.errors import Failure, UserError

RATE = 8000
BUILD: dict[str, Any] = {"shard_size": 4, "sample_rate": RATE, "workers": 1}


def make_folder(root: Path, count: int = 14, rate: int = RATE) -> Path:
    """A `folder` corpus of short noises; the caption of each clip is its file name."""
    (root / "audio").mkdir(parents=True)
    rng = np.random.default_rng(0)
    with open(root / "captions.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "caption_1", "caption_2", "label", "place"])
        for n in range(count):
            name = f"clip {n}.wav"
            soundfile.write(root / "audio" / name, rng.integers(-32768, 32768, rate // 4).astype(np.int16), rate)
            table.writerow([name, name, f'"{name}",\nagain – ümläut', f"label{n % 3}", "here"])
    return root


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("corpora") / "tiny")


@pytest.fixture(scope="module")
def reference(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards built without interruption by one process."""
    out = tmp_path_factory.mktemp("reference") / "out"
    build_shards("folder", corpus, out, **BUILD)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def test_manifest_and_samples(corpus: Path, reference: Path) -> None:
    manifest = json.loads((reference / "manifest.json").read_text())
    assert (manifest["num_samples"], manifest["num_captions"], manifest["seconds"]) == (14, 28, 3.5)
    assert [shard["samples"] for shard in manifest["shards"]] == [4, 4, 4, 2]
    assert (manifest["corpus"], manifest["encoding"], manifest["sample_rate"]) == ("tiny", "flac", RATE)
    shards = open_shards(str(reference))
    assert manifest["shards"][3]["captions"] == [2, 2] and shards.num_captions == 28
    for i in range(len(shards)):
        sample = shards.read(i)
        name = sample.captions[0]
        assert sample.clip_id == f"tiny/{name}" and sample.label == f"label{int(name[5:-4]) % 3}"
        assert sample.captions[1] == f'"{name}", again – ümläut' and sample.meta["place"] == "here"
        original, _ = soundfile.read(corpus / "audio" / name, dtype="float32")
        np.testing.assert_array_equal(decode(sample.audio, sample.extension, RATE), original)
    assert shards.keys == sorted(shards.keys)
    assert [int(shards.read(i).captions[0][5:-4]) for i in range(14)] != list(range(14))
    assert check_shards(str(reference), deep=True) == []


def test_webdataset_reads_the_shards(reference: Path) -> None:
    names = [str(path) for path in sorted(reference.glob("*.tar"))]
    samples = list(webdataset.WebDataset(names, shardshuffle=False))
    assert len(samples) == 14
    assert [sample["__key__"] for sample in samples] == open_shards(str(reference)).keys
    assert {"flac", "json"} <= set(samples[0])


def test_rebuild_is_byte_identical_with_more_processes(
    corpus: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_builder, "MIN_CLIPS_PER_WORKER", 1)
    build_shards("folder", corpus, tmp_path / "out", **{**BUILD, "workers": 2})
    assert contents(tmp_path / "out") == contents(reference)


def test_a_killed_build_goes_on_where_it_stopped(corpus: Path, reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    script = f"""
        import os, signal
        from atr_scale.data import shard_builder, shard_writer
        encode, calls = shard_writer.encode, []
        def deadly(*arguments):
            calls.append(1)
            if len(calls) == 11:
                os.kill(os.getpid(), signal.SIGKILL)
            return encode(*arguments)
        shard_writer.encode = deadly
        shard_builder.build_shards("folder", {str(corpus)!r}, {str(out)!r}, **{BUILD!r})
    """
    died = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False, timeout=240)
    assert died.returncode == -signal.SIGKILL
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*.tar")}
    assert sorted(kept) == ["shard-000000.tar", "shard-000001.tar"] and list(out.glob(".*.tmp"))
    assert any("not finished" in problem for problem in check_shards(str(out)))
    with pytest.raises(UserError, match="encoding differ"):
        build_shards("folder", corpus, out, **{**BUILD, "encoding": "pcm16"})
    build_shards("folder", corpus, out, **BUILD)
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept
    assert contents(out) == contents(reference) and check_shards(str(out)) == []


def test_a_complete_build_is_not_repeated(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build_shards("folder", corpus, tmp_path / "out", **BUILD)
    monkeypatch.setattr(shard_builder, "write_shard", lambda task: pytest.fail("built again"))
    assert build_shards("folder", corpus, tmp_path / "out", **BUILD) == first
    for changed in ({"sample_rate": 16_000}, {"shard_size": 5}):
        with pytest.raises(UserError, match=f"{next(iter(changed))} differ.*another --out"):
            build_shards("folder", corpus, tmp_path / "out", **{**BUILD, **changed})


def test_changed_captions_are_another_build(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "tiny", 3)
    build_shards("folder", root, tmp_path / "out", **BUILD)
    (root / "captions.csv").write_text((root / "captions.csv").read_text().replace("again", "changed"))
    with pytest.raises(UserError, match="clips differ"):
        build_shards("folder", root, tmp_path / "out", **BUILD)


@pytest.mark.parametrize(("encoding", "extension"), [("pcm16", "pcm"), ("keep", "wav")])
def test_encodings(encoding: str, extension: str, corpus: Path, tmp_path: Path) -> None:
    build_shards("folder", corpus, tmp_path, **{**BUILD, "encoding": encoding})
    shards = open_shards(str(tmp_path))
    for i in range(len(shards)):
        sample = shards.read(i)
        original = corpus / "audio" / sample.captions[0]
        assert sample.extension == extension and sample.sample_rate == RATE
        if encoding == "keep":
            assert sample.audio == original.read_bytes()
        waveform = decode(sample.audio, sample.extension, RATE, pcm_rate=sample.sample_rate)
        np.testing.assert_array_equal(waveform, soundfile.read(original, dtype="float32")[0])
    assert check_shards(str(tmp_path), deep=True) == []


def test_resampled_to_the_asked_rate(corpus: Path, tmp_path: Path) -> None:
    manifest = build_shards("folder", corpus, tmp_path, **{**BUILD, "sample_rate": 12_000})
    sample = open_shards(str(tmp_path)).read(0)
    assert manifest["sample_rate"] == sample.sample_rate == 12_000
    assert len(decode(sample.audio, "flac", 12_000)) == 3000


def test_bad_audio_is_left_out_and_counted(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "tiny", 9)
    audio = root / "audio"
    (audio / "clip 0.wav").write_bytes(b"<html>")
    (audio / "clip 1.wav").write_bytes(b"")
    soundfile.write(audio / "clip 2.wav", np.zeros(100, np.int16), RATE)
    soundfile.write(audio / "clip 3.wav", np.array([0.1, np.nan]), RATE, subtype="FLOAT")
    (audio / "clip 4.wav").unlink()
    manifest = build_shards("folder", root, tmp_path / "out", **BUILD)
    reasons = ("empty_audio", "missing_audio", "nonfinite_audio", "silent_audio", "undecodable_audio")
    assert manifest["dropped"] == dict.fromkeys(reasons, 1)
    assert manifest["num_samples"] == 4 and check_shards(str(tmp_path / "out")) == []


def test_nothing_usable_is_one_clear_error(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "tiny", 2)
    for path in (root / "audio").iterdir():
        path.write_bytes(b"junk")
    with pytest.raises(UserError, match=r"none of the 2 clips of tiny can be used.*undecodable_audio"):
        build_shards("folder", root, tmp_path / "out", **BUILD)
    shutil.rmtree(root / "audio")
    with pytest.raises(UserError, match="no audio for any of the 2 clips"):
        build_shards("folder", root, tmp_path / "out2", **BUILD)


def test_user_mistakes_are_one_line(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "x.tar").write_bytes(b"")
    cases: list[tuple[tuple[str, Path, Path | str], str]] = [
        (("audiocap", corpus, tmp_path), "unknown corpus 'audiocap': choose one of audiocaps"),
        (("folder", corpus / "nowhere", tmp_path), "there is no folder"),
        (("folder", corpus / "audio", tmp_path), "no table of captions"),
        (("folder", corpus, "https://example.org/shards"), "'https:' is not supported"),
        (("folder", corpus, tmp_path / "foreign"), "choose an empty --out"),
    ]
    for (name, root, out), message in cases:
        with pytest.raises(UserError, match=message) as caught:
            build_shards(name, root, out, **BUILD)
        assert "\n" not in str(caught.value)


def test_check_names_what_is_wrong(reference: Path, tmp_path: Path) -> None:
    def problems_after(damage: Any) -> str:
        folder = tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(reference, folder)
        damage(folder)
        return "\n".join(check_shards(str(folder)))

    def cut_at(path: Path, offset: int) -> None:
        path.write_bytes(path.read_bytes()[:offset])

    manifest = json.loads((reference / "manifest.json").read_text())
    first = manifest["shards"][0]
    name, boundary = first["name"], first["offsets"][2]

    assert problems_after(lambda folder: None) == ""
    # No tar reader notices this one: the members that are left are whole.
    found = problems_after(lambda folder: cut_at(folder / name, boundary))
    assert f"{name}: no end marker at byte {boundary}: the tar is cut at a member boundary" in found
    assert f"{name}: {boundary} bytes, the manifest says {first['bytes']}" in found
    assert f"{name}: 2 samples, the manifest says 4" in found
    assert "cut member at byte" in problems_after(lambda folder: cut_at(folder / name, boundary - 1))
    assert f"{name}: missing" in problems_after(lambda folder: (folder / name).unlink())
    copied = problems_after(lambda folder: shutil.copy(folder / name, folder / "other.tar"))
    assert copied == "other.tar: not in the manifest"

    def flip(folder: Path) -> None:
        raw = bytearray((folder / name).read_bytes())
        raw[700] ^= 1
        (folder / name).write_bytes(raw)

    assert problems_after(flip) == f"{name}: sha256 differs from the manifest's: its content was changed"
    exchanged = problems_after(lambda f: (f / name).write_bytes((f / "shard-000001.tar").read_bytes()))
    assert f"{name}: keys differ from the manifest's" in exchanged
    unmanifested = problems_after(lambda f: ((f / "manifest.json").unlink(), cut_at(f / name, boundary)))
    assert unmanifested == f"{name}: no end marker at byte {boundary}: the tar is cut at a member boundary"


def test_deep_check_decodes(corpus: Path, tmp_path: Path) -> None:
    build_shards("folder", corpus, tmp_path, **BUILD)
    shards = open_shards(str(tmp_path))
    raw = bytearray((tmp_path / "shard-000000.tar").read_bytes())
    raw[600 : 600 + 400] = b"\xff" * 400
    (tmp_path / "shard-000000.tar").write_bytes(raw)
    (tmp_path / "manifest.json").unlink()
    assert check_shards(str(tmp_path)) == []
    problems = check_shards(str(tmp_path), deep=True)
    assert len(problems) == 1 and f"sample {shards.keys[0]}: undecodable_audio" in problems[0]


def test_verbs(corpus: Path, tmp_path: Path) -> None:
    run = CliRunner()
    out = tmp_path / "out"
    arguments = ["--root", str(corpus), "--out", str(out), "--shard-size", "4", "--workers", "1"]
    done = run.invoke(app, ["shards", "build", "folder", *arguments])
    assert done.exit_code == 0 and "14 clips, 28 captions" in done.output
    assert run.invoke(app, ["shards", "check", str(out)]).exit_code == 0
    os.truncate(out / "shard-000003.tar", 512)
    bad = run.invoke(app, ["shards", "check", str(out)])
    assert bad.exit_code == 2 and all(line.startswith("shard-000003.tar: ") for line in bad.output.splitlines())
    for verb in ("build", "check"):
        assert f"  atr-scale shards {verb}" in run.invoke(app, ["shards", verb, "--help"]).output
    mistake = [
        sys.executable,
        "-m",
        "atr_scale.cli",
        "shards",
        "build",
        "clotho",
        "--root",
        str(corpus),
        "--out",
        str(out),
    ]
    failed = subprocess.run(mistake, capture_output=True, text=True, check=False)
    assert failed.returncode == 2 and failed.stderr.startswith("error: clotho at") and failed.stderr.count("\n") == 1


@pytest.mark.real_data
@pytest.mark.parametrize(("name", "clips"), [("audiocaps_clips", 43), ("clotho_clips", 9)])
def test_real_clips(real_data: Path, tmp_path: Path, name: str, clips: int) -> None:
    manifest = build_shards("folder", real_data / name, tmp_path, split="all" if clips == 9 else "val", shard_size=10)
    assert (manifest["num_samples"], manifest["num_captions"], manifest["dropped"]) == (clips, 5 * clips, {})
    assert check_shards(str(tmp_path), deep=True) == []


@pytest.mark.real_data
def test_real_esc50(real_data: Path, tmp_path: Path) -> None:
    root = tmp_path / "esc50"
    root.mkdir()
    (root / "audio").symlink_to(real_data / "esc50" / "audio")
    with open(real_data / "esc50" / "manifest.csv", newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["fold"] == "5"][::8]
    with open(root / "captions.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "caption", "label", "split"])
        for row in rows:
            words = row["category"].replace("_", " ")
            table.writerow([row["filename"], f"The sound of {words}", words, "test"])
    manifest = build_shards("folder", root, tmp_path / "out", encoding="keep", workers=1)
    assert (manifest["num_samples"], manifest["split"], manifest["dropped"]) == (50, "test", {})
    shards = open_shards(str(tmp_path / "out"))
    assert all((s := shards.read(i)).captions == [f"The sound of {s.label}"] for i in range(50))


def test_a_full_disk_is_one_line(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with (
        monkeypatch.context() as context,
        pytest.raises(Failure, match=r"the disk .+ is full: make space there for .*out"),
    ):
        context.setattr(shard_builder, "_run", full)
        build_shards("folder", corpus, tmp_path / "out", **BUILD)
    assert build_shards("folder", corpus, tmp_path / "out", **BUILD)["shards"]
