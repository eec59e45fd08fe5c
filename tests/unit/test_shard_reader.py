"""Reading shards: grouping, faults, LAION's layout. The audio and the caption of a sample both have its id."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atr_scale.data.sample import BadSample
from atr_scale.data.shard_check import check_shards
from atr_scale.data.shard_reader import ShardSet, open_shards
from atr_scale.data.tar import BrokenTar, Member, walk
from atr_scale.errors import UserError

KEYS = [f"{i:03d}" for i in range(6)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE) -> None:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def members(shard: str, keys: Iterable[str] = KEYS) -> list[tuple[str, bytes]]:
    """Samples whose sizes vary around a block, in webdataset's order (audio first)."""
    found = []
    for n, key in enumerate(keys):
        identity = f"{shard}/{key}"
        found.append((f"{key}.flac", identity.encode() + b"\0" * (300 * n)))
        found.append((f"{key}.json", json.dumps({"clip_id": identity, "captions": [identity]}).encode()))
    return found


def write_tar(path: Path, entries: Iterable[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in entries:
            add(tar, name, data)


def write_manifest(folder: Path) -> None:
    """The manifest that the builder would write for the shards that are there now."""
    shards = []
    for path in sorted(folder.glob("*.tar")):
        offsets, keys = [], []
        for member in walk_bytes(path.read_bytes()):
            if member is not None and member.name.endswith(".flac"):
                keys.append(member.name.split(".")[0])
                offsets.append(member.start)
            elif member is not None:
                last = member.stop
        size = path.stat().st_size
        offsets.append(last)
        shards.append(
            {"name": path.name, "samples": len(keys), "bytes": size, "sha256": "", "keys": keys, "offsets": offsets}
        )
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "corpus": "c", "split": "train", "shards": shards}))


def walk_bytes(data: bytes) -> list[Member | None]:
    return list(walk(lambda start, stop: data[start:stop], len(data)))


def read_all(shards: ShardSet) -> tuple[list[str], Counter[str]]:
    """Clip ids read, and failures by reason; asserts that no audio came with another clip's caption."""
    good, bad = [], Counter[str]()
    for i in range(len(shards)):
        try:
            sample = shards.read(i)
        except BadSample as error:
            bad[error.reason] += 1
            continue
        audio_id = bytes(sample.audio).rstrip(b"\0").decode()
        assert sample.captions == [audio_id] and sample.clip_id == audio_id and audio_id.endswith(sample.key)
        good.append(audio_id)
    return good, bad


@pytest.fixture
def two_shards(tmp_path: Path) -> Path:
    """Two shards with the same keys: grouping must not go beyond a shard's end."""
    folder = tmp_path / "set"
    folder.mkdir()
    for shard in ("a", "b"):
        write_tar(folder / f"{shard}.tar", members(shard))
    return folder


@pytest.mark.parametrize("with_manifest", [False, True])
def test_a_shard_cut_anywhere_never_pairs_audio_with_another_caption(two_shards: Path, with_manifest: bool) -> None:
    if with_manifest:
        write_manifest(two_shards)
    whole = (two_shards / "a.tar").read_bytes()
    counts = []
    for block in range(0, len(whole), 512):
        for cut in {max(0, block - 1), block, block + 1}:
            (two_shards / "a.tar").write_bytes(whole[:cut])
            (two_shards / ".index.json").unlink(missing_ok=True)
            shards = open_shards(str(two_shards))
            good, bad = read_all(shards)
            assert [g for g in good if g.startswith("b/")] == [f"b/{key}" for key in KEYS]
            kept = [g for g in good if g.startswith("a/")]
            assert kept == [f"a/{key}" for key in KEYS][: len(kept)]
            if with_manifest:
                assert len(good) + sum(bad.values()) == 2 * len(KEYS)
            counts.append(len(kept))
    assert min(counts) == 0 and max(counts) == len(KEYS) and sorted(set(counts)) == list(range(len(KEYS) + 1))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_shards_never_mispair_or_crash(two_shards: Path, data: st.DataObject) -> None:
    folder = two_shards.parent / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(two_shards, folder)
    if data.draw(st.booleans()):
        write_manifest(folder)
    for name in ("a.tar", "b.tar"):
        whole = (two_shards / name).read_bytes()
        at, length = data.draw(st.integers(0, len(whole))), data.draw(st.integers(0, 3000))
        filler = data.draw(st.sampled_from([b"", b"<html>502 Bad Gateway</html>", b"\0" * 512, b"\xff" * 700]))
        (folder / name).write_bytes(whole[:at] + filler + whole[at + length :])
    ids = {f"{shard}/{key}" for shard in "ab" for key in KEYS}
    try:
        shards = open_shards(str(folder))
    except UserError:
        return
    for i in range(len(shards)):
        try:
            sample = shards.read(i)
        except BadSample:
            continue
        # Damage to the id's own bytes inside the audio is the decoder's to notice.
        audio_id = bytes(sample.audio[:5]).decode("latin-1")
        if audio_id in ids:
            assert sample.clip_id == audio_id and sample.captions == [audio_id]


def test_shard_edited_after_the_manifest(two_shards: Path) -> None:
    write_manifest(two_shards)
    write_tar(two_shards / "a.tar", members("a", reversed(KEYS)))
    good, bad = read_all(open_shards(str(two_shards)))
    assert [g for g in good if g.startswith("b/")] == [f"b/{key}" for key in KEYS]
    assert set(bad) <= {"mismatched_key", "cut_shard", "missing_audio", "missing_json"} and bad["mismatched_key"] > 0


def test_all_missing_shards_are_named_at_once(two_shards: Path) -> None:
    write_manifest(two_shards)
    for name in ("a.tar", "b.tar"):
        (two_shards / name).unlink()
    with pytest.raises(UserError, match=r"2 of 2 shards are missing.*a\.tar, b\.tar"):
        open_shards(str(two_shards))


def test_shard_deleted_after_opening_is_a_bad_sample(two_shards: Path) -> None:
    shards = open_shards(str(two_shards))
    (two_shards / "b.tar").unlink()
    good, bad = read_all(shards)
    assert len(good) == len(KEYS) and bad == {"missing_shard": len(KEYS)}


def test_empty_and_html_shards_are_left_out_and_counted(two_shards: Path) -> None:
    (two_shards / "c.tar").write_bytes(b"")
    (two_shards / "d.tar").write_bytes(b"<html>not found</html>" * 100)
    shards = open_shards(str(two_shards))
    assert len(shards) == 2 * len(KEYS) and shards.dropped == {"cut_shard": 2}


def test_no_shards_names_the_folders_that_hold_some(two_shards: Path) -> None:
    write_manifest(two_shards)
    with pytest.raises(UserError, match=r"no shards in .*; did you mean .*set\?"):
        open_shards(str(two_shards.parent))
    with pytest.raises(UserError, match="no such folder"):
        open_shards(str(two_shards / "nowhere"))


def test_names_that_leave_the_archive_links_and_devices_are_never_used(tmp_path: Path) -> None:
    secret = tmp_path / "secret.flac"
    secret.write_bytes(b"secret")
    folder = tmp_path / "set"
    folder.mkdir()
    with tarfile.open(folder / "x.tar", "w") as tar:
        for name, data in members("x", ["000"]):
            add(tar, name, data)
        for prefix in ("../up", "/abs", "a/../../up"):
            for name, data in members("x", ["evil"]):
                add(tar, f"{prefix}/{name}", data)
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            link = tarfile.TarInfo("link.flac")
            link.type, link.linkname = kind, str(secret)
            tar.addfile(link)
            add(tar, "link.json", b'{"captions": ["x"]}')
        for kind in (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
            add(tar, "dev.flac", kind=kind)
            add(tar, "dev.json", b'{"captions": ["x"]}')
    shards = open_shards(str(folder))
    assert shards.keys == ["000"] and read_all(shards) == (["x/000"], Counter())
    assert shards.dropped["missing_audio"] + shards.dropped["duplicate_key"] == 6
    problems = "\n".join(check_shards(str(folder)))
    for name in ("../up/evil.flac", "/abs/evil.flac", "a/../../up/evil.flac", "link.flac", "dev.flac"):
        assert repr(name) in problems


def test_link_inside_an_indexed_range_is_refused(two_shards: Path) -> None:
    """The manifest stays, the audio member becomes a symbolic link of the same name."""
    write_manifest(two_shards)
    path = two_shards / "a.tar"
    raw = bytearray(path.read_bytes())
    info = tarfile.TarInfo("000.flac")
    info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
    raw[:512] = info.tobuf(tarfile.USTAR_FORMAT)
    path.write_bytes(raw)
    with pytest.raises(BadSample):
        open_shards(str(two_shards)).read(0)


def test_duplicate_and_dotted_keys_are_rejected_by_the_validator(tmp_path: Path) -> None:
    entries = [*members("x", ["000", "001", "000"]), ("a.b.flac", b"x"), ("a.b.json", b"{}")]
    write_tar(tmp_path / "x.tar", entries)
    assert open_shards(str(tmp_path)).keys == ["000", "001"]
    problems = check_shards(str(tmp_path))
    assert any("duplicate key" in p for p in problems)
    assert sum("dotted key" in p for p in problems) == 2


def test_same_keys_in_two_foreign_shards_are_two_clips(tmp_path: Path) -> None:
    folder = tmp_path / "esc" / "train"
    folder.mkdir(parents=True)
    for shard in ("0", "1"):
        write_tar(folder / f"{shard}.tar", [("k.flac", b"x"), ("k.json", b'{"text": "a dog"}')])
    shards = open_shards(str(folder))
    assert [shards.read(i).clip_id for i in range(2)] == ["esc/train/0/k", "esc/train/1/k"]
    (folder / "1.tar").unlink()
    shards = open_shards(str(folder))
    assert shards.read(0).clip_id == "esc/train/k" and (shards.corpus, shards.split) == ("esc", "train")


def test_long_names_of_gnu_and_pax_tars(tmp_path: Path) -> None:
    for n, form in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        with tarfile.open(tmp_path / f"{n}.tar", "w", format=form) as tar:
            for name, data in members("x", ["k" * 150 + str(n), "größe" + str(n)]):
                add(tar, name, data)
    shards = open_shards(str(tmp_path))
    assert [len(key) for key in shards.keys] == [151, 6, 151, 6]
    assert len(read_all(shards)[0]) == 4


def test_index_is_kept_and_renewed_when_a_shard_changes(two_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_shards(str(two_shards))
    assert (two_shards / ".index.json").is_file()
    with monkeypatch.context() as patch:
        patch.setattr("atr_scale.data.shard_index.scan_shard", lambda *a: pytest.fail("scanned again"))
        again = open_shards(str(two_shards))
    assert again.keys == first.keys and np.array_equal(again.start, first.start)
    write_tar(two_shards / "b.tar", members("b", KEYS[:2]))
    assert len(open_shards(str(two_shards))) == len(KEYS) + 2


def replace_with_another(folder: Path) -> None:
    shard = folder / "b.tar"
    stat = shard.stat()
    write_tar(shard, members("b", [f"9{key[1:]}" for key in KEYS]))
    assert shard.stat().st_size == stat.st_size
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def change_index(folder: Path, change: Callable[[dict], object]) -> None:
    index = json.loads((folder / ".index.json").read_text())
    index.pop("sha256", None)  # which tells of every change
    change(index)
    (folder / ".index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "damage",
    [
        replace_with_another,
        lambda folder: change_index(folder, lambda index: index["shards"].reverse()),
        lambda folder: change_index(folder, lambda index: index["shards"][0]["starts"].pop()),
        lambda folder: change_index(folder, lambda index: index["shards"][0]["keys"].reverse()),
        lambda folder: change_index(folder, lambda index: index["shards"][1].update(stops=[10**9] * len(KEYS))),
        lambda folder: change_index(folder, lambda index: index.update(shards=None)),
        lambda folder: change_index(folder, lambda index: index["shards"][0].update(starts="x")),
    ],
)
def test_an_index_that_disagrees_with_its_shards_is_made_anew(
    two_shards: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    open_shards(str(two_shards))
    damage(two_shards)
    shards = open_shards(str(two_shards))
    good, bad = read_all(shards)
    assert len(good) == 2 * len(KEYS) and not bad and not shards.dropped
    assert ".index.json does not fit the shards: they are indexed again" in caplog.text


def test_index_of_a_read_only_folder_goes_to_the_cache(two_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from atr_scale.data import storage

    write = storage.write_bytes

    def refuse_beside(location: str, data: bytes) -> None:
        if location.startswith(str(two_shards)):
            raise PermissionError(location)
        write(location, data)

    monkeypatch.setattr(storage, "write_bytes", refuse_beside)
    open_shards(str(two_shards))
    assert len(list(Path(os.environ["XDG_CACHE_HOME"]).glob("atr-scale/*.json"))) == 1
    monkeypatch.setattr("atr_scale.data.shard_index.scan_shard", lambda *a: pytest.fail("scanned again"))
    assert len(open_shards(str(two_shards))) == 2 * len(KEYS)


def write_captions(path: Path, *captions: object) -> None:
    """A shard of LAION's layout, whose samples have these captions."""
    entries = [(f"{n}.json", json.dumps({"text": texts}).encode()) for n, texts in enumerate(captions)]
    write_tar(path, [entry for n, json_file in enumerate(entries) for entry in ((f"{n}.flac", b"x"), json_file)])


def test_captions_are_counted_with_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_captions(tmp_path / "a.tar", ["one", "two", "  "], "three", 4)  # one is empty, 4 is no caption
    write_captions(tmp_path / "b.tar", ["x"] * 5)
    shards = open_shards(str(tmp_path))
    assert shards.captions is not None and shards.captions.tolist() == [2, 1, 0, 5]
    assert shards.num_captions == shards.count_captions() == 8

    # As version 0.2 stored it.
    change_index(tmp_path, lambda index: [shard.pop("captions") for shard in index["shards"]])
    with monkeypatch.context() as patch:
        patch.setattr("atr_scale.data.shard_index.scan_shard", lambda *a: pytest.fail("scanned although not asked"))
        old = open_shards(str(tmp_path))
    assert old.num_captions is None and old.count_captions() == 8
    monkeypatch.setattr("atr_scale.data.shard_index.scan_shard", lambda *a: pytest.fail("scanned again"))
    assert old.count_captions() == open_shards(str(tmp_path)).num_captions == 8


def test_captions_of_an_older_manifest(two_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their sum is there; those of some of the samples are counted."""
    write_manifest(two_shards)
    assert open_shards(str(two_shards)).num_captions is None  # not even the sum
    manifest = json.loads((two_shards / "manifest.json").read_text())
    manifest |= {"num_samples": 12, "num_captions": 99}
    (two_shards / "manifest.json").write_text(json.dumps(manifest))
    shards = open_shards(str(two_shards))
    assert shards.count_captions() == 99 and not (two_shards / ".index.json").exists()
    some = replace(shards, keys=shards.keys[3:8], shard_of=shards.shard_of[3:8])
    assert some.num_captions is None and some.count_captions() == 5
    monkeypatch.setattr("atr_scale.data.shard_index.scan_shard", lambda *a: pytest.fail("scanned again"))
    assert some.count_captions() == 5


TAR_FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


@pytest.mark.parametrize("form", TAR_FORMATS)
@settings(max_examples=25, deadline=None)
@given(
    names=st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=30), max_size=5
    ),
    folder=st.sampled_from(["", "a/", "deep/" * 25]),
    kind=st.sampled_from([tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE]),
    size=st.integers(0, 1500),
)
def test_walker_agrees_with_tarfile(form: str, names: list[str], folder: str, kind: bytes, size: int) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=TAR_FORMATS[form]) as tar:
        for name in names:
            for member_kind in (tarfile.REGTYPE, kind):
                add(tar, folder + name, b"x" * size if member_kind in tarfile.REGULAR_TYPES else b"", member_kind)
    data = stream.getvalue()
    found = [m for m in walk_bytes(data) if m is not None]
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = [(m.name, m.isreg(), m.isdir(), m.offset, m.offset_data, m.size) for m in tar]
    assert [(m.name.rstrip("/"), *m[1:3], m.start, m.data_start, m.size) for m in found] == expected


def test_walker_names_where_an_archive_is_broken(two_shards: Path) -> None:
    data = (two_shards / "a.tar").read_bytes()
    for damaged, message in [
        (data[:700], "cut member at byte 0"),
        (data[:1324], "cut header at byte 1024"),
        (data[:1024] + b"x" + data[1025:], "bad header checksum at byte 1024"),
        (data[:1024] + b"x" * 512, "no tar header at byte 1024"),
        (data[:124] + b"-0000000001\0" + data[136:], "byte 0"),
    ]:
        with pytest.raises(BrokenTar, match=message):
            walk_bytes(damaged)


def test_walker_reads_the_old_file_type() -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        add(tar, "folder/", kind=tarfile.AREGTYPE)
        add(tar, "deep/" * 25 + "x.flac", b"x" * 600, kind=tarfile.AREGTYPE)
    found = [m for m in walk_bytes(stream.getvalue()) if m is not None]
    assert [(m.regular, m.folder, m.size) for m in found] == [(False, True, 0), (True, False, 600)]


def test_walker_reads_sizes_in_base_256() -> None:
    info = tarfile.TarInfo("big.flac")
    info.size = 9 << 33
    header = info.tobuf(tarfile.GNU_FORMAT)
    first = next(iter(walk(lambda start, stop: header[start:stop], info.size + 512)))
    assert first is not None and first.size == info.size


@pytest.mark.real_data
def test_laion_sidecars_read_as_they_are(real_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "esc50" / "train"
    folder.mkdir(parents=True)
    files = sorted((real_data / "esc50_fold1_hq" / "audio").iterdir())
    for n in range(2):
        with tarfile.open(folder / f"{n}.tar", "w") as tar:
            for path in files[n * 400 : (n + 1) * 400]:
                tar.add(path, arcname=path.name)
    shards = open_shards(str(folder))
    assert len(shards) == 400 and not shards.dropped and check_shards(str(folder)) == []
    for i in range(0, 400, 7):
        sample = shards.read(i)
        sidecar = json.loads((real_data / "esc50_fold1_hq" / "audio" / f"{sample.key}.json").read_text())
        assert sample.captions == sidecar["text"] and sample.label == sidecar["tag"][0]
        assert sample.audio == (real_data / "esc50_fold1_hq" / "audio" / f"{sample.key}.ogg").read_bytes()
        assert sample.clip_id == f"esc50/train/{sample.key}" and sample.extension == "ogg"
