"""Shards to batches: exact local batches, any start, holes, faults. Each clip's audio and captions have its number."""

from __future__ import annotations

import multiprocessing
import shutil
import tarfile
from collections import Counter
from dataclasses import fields
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atr_scale.batch import Batch, caption_id, count_reasons, stable_id
from atr_scale.data.loader_memory import LoaderMemory
from atr_scale.data.options import TrainingSource
from atr_scale.data.shard_reader import ShardSet, open_shards
from atr_scale.data.stream import TrainingStream, _check_exclusions, _draws, describe, read_batches
from atr_scale.distributed.world import World
from atr_scale.errors import UserError
from tests.coded import (
    CAPTIONS,
    CROP,
    PER_CLIP,
    QUANTUM,
    clip_and_start,
    clip_id,
    duration,
    open_stream,
    rows_of,
    samples,
    waveform,
    write_laion,
    write_shards,
)

pytestmark = [pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore:This DataLoader will create")]
CLIPS = 30
Rows = list[tuple[str, int, int, int, int]]


@pytest.fixture(scope="module", autouse=True)
def _quick_workers() -> None:
    """Workers fork from a server that has imported what they need."""
    multiprocessing.set_forkserver_preload(["atr_scale.data.stream", "tests.coded"])


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shards(tmp_path_factory.mktemp("corpora") / "left", range(CLIPS))


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shards(tmp_path_factory.mktemp("corpora") / "right", range(40, 60), encoding="flac")


def read(
    stream: TrainingStream,
    first: int,
    last: int,
    workers: int = 0,
    *,
    keep_int16: bool = False,
    piece: int | None = None,
) -> list[Batch]:
    """piece: rows of a piece; by default all of the local batch, which is small."""
    size, memory = stream.local_batch_size, None
    if piece:
        prefetch = 2 if workers else 0
        memory = LoaderMemory(piece, -(-size // piece), prefetch, 3, 3 * workers, 4 * piece * stream.width, 0)
    return list(read_batches(stream.between(first, last), workers, keep_int16=keep_int16, memory=memory))


def all_rows(batches: list[Batch]) -> Rows:
    return [row for batch in batches for row in rows_of(batch)]


def equal(a: Batch, b: Batch) -> bool:
    names = [f.name for f in fields(Batch) if f.name not in ("keys", "dropped")]
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in names) and (a.keys, a.dropped) == (b.keys, b.dropped)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_local_batches_are_exactly_the_global_one(left: str, right: str, size: int) -> None:
    """They are disjoint, and joined they are the batch of one process, with the same clips, crops and captions."""
    whole = [rows_of(batch) for batch in read(open_stream(left, right), 0, 9)]
    ranks = [read(open_stream(left, right, world=World(r, size)), 0, 9) for r in range(size)]
    for number, rows in enumerate(whole):
        shares = [rows_of(rank[number]) for rank in ranks]
        assert [len(share) for share in shares] == [12 // size] * size
        assert [row for share in shares for row in share] == rows


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(left: str, right: str, workers: int) -> None:
    here = read(open_stream(left, right), 2, 9)
    there = read(open_stream(left, right), 2, 9, workers)
    assert len(here) == len(there) == 7 and all(equal(a, b) for a, b in zip(here, there, strict=True))


@pytest.mark.parametrize("piece", [1, 5, 6])
def test_pieces_change_nothing(left: str, right: str, tmp_path: Path, piece: int) -> None:
    """Not with unreadable clips, from the middle of a run, in 16 bits or not, nor with more workers than pieces."""
    folder = copy(left, tmp_path / "left")
    for number in (3, 8, 17):
        spoil(folder, number, "silent_audio")
    for workers, keep_int16 in ((0, True), (3, piece == 5)):
        world = World(piece % 2, 2) if piece == 5 else World()
        whole, there = (
            read(open_stream(str(folder), right, world=world), 2, 8, n, keep_int16=keep_int16, piece=rows)
            for n, rows in ((0, None), (workers, piece))
        )
        assert len(there) == 6 and all(equal(a, b) for a, b in zip(whole, there, strict=True))


@pytest.mark.parametrize("start", [1, 2, 7, 11])
def test_starting_anywhere_is_skipping(left: str, start: int) -> None:
    """Batch 2 has the end of the first epoch."""
    whole = read(open_stream(left), 0, 12)
    assert all(equal(a, b) for a, b in zip(whole[start:], read(open_stream(left), start, 12), strict=True))


def test_an_epoch_visits_every_clip_once(left: str) -> None:
    rows = all_rows(read(open_stream(left), 0, 5))
    assert sorted(row[1] for row in rows[:CLIPS]) == sorted(row[1] for row in rows[CLIPS:]) == list(range(CLIPS))


def test_ids_and_places(left: str) -> None:
    shards = open_shards(left)
    for batch in read(open_stream(left), 0, 3):
        for row, (place, number, _, _, take) in enumerate(rows_of(batch)):
            assert batch.clip_ids[row] == clip_id("left", number)
            assert batch.caption_ids[row] == caption_id(f"clip {number} take {take}")
            corpus, shard, key = place.split("/")
            assert corpus == "left" and shard in shards.names
            assert f"clip {number} take 0" in shards.read(shards.keys.index(key)).captions
        assert torch.equal(batch.ids, torch.stack([batch.clip_ids, batch.caption_ids], 1))


def test_crops_lie_inside_are_quantised_and_move(left: str) -> None:
    starts: dict[int, set[int]] = {}
    for _, number, start, length, _ in all_rows(read(open_stream(left), 0, 30)):
        assert length == min(CROP, duration(number) // QUANTUM * QUANTUM or duration(number))
        assert 0 <= start <= duration(number) - length
        starts.setdefault(number, set()).add(start)
    long = [n for n in range(CLIPS) if duration(n) > 2 * CROP]
    assert long and all(len(starts[n]) >= 6 for n in long), "every visit cuts at another place"
    places = [s / (duration(n) - CROP) for n in long for s in starts[n]]
    assert min(places) < 0.15 and max(places) > 0.85


def test_every_caption_is_drawn(left: str) -> None:
    takes = Counter((row[1], row[4]) for row in all_rows(read(open_stream(left), 0, 50)))
    assert len(takes) == CLIPS * CAPTIONS and sum(takes.values()) == 600
    by_take = Counter(take for (_, take), n in takes.items() for _ in range(n))
    assert all(150 < by_take[take] < 250 for take in range(CAPTIONS))


def test_the_seed_decides(left: str) -> None:
    def rows(seed: int) -> Rows:
        return all_rows(read(open_stream(left, seed=seed), 0, 4))

    assert rows(1) == rows(1)
    assert rows(1) != rows(2)


def test_a_mixture_of_encodings_follows_its_weights(left: str, right: str) -> None:
    stream = open_stream(TrainingSource(shards=left, weight=1), TrainingSource(shards=right, weight=3))
    batches = read(stream, 0, 20)
    counts = np.array([sum(key.startswith("left/") for key in batch.keys) for batch in batches])
    assert np.abs(counts - 3).max() <= 1 and abs(counts.mean() - 3) < 0.2
    rows = all_rows(batches)
    assert {row[1] for row in rows} == {*range(CLIPS), *range(40, 60)}
    by_default = all_rows(read(open_stream(left, right), 0, 25))
    assert abs(sum(row[1] < 40 for row in by_default) - 180) <= 3, "30 and 20 clips: three fifths"
    assert describe(stream.sources) == "left  (30 clips in 5 shards), right  (20 clips in 3 shards)"


def copy(location: str, to: Path) -> Path:
    shutil.copytree(location, to)
    return to


def spoil(folder: Path, number: int, how: str) -> None:
    """Make one sample's audio silent, its JSON unreadable, or a header that reads as the end of the archive."""
    shards = open_shards(str(folder))
    for i in range(len(shards)):
        if shards.read(i).clip_id.endswith(f"/{number:02}.wav"):
            break
    path = folder / shards.names[shards.shard_of[i]]
    data = bytearray(path.read_bytes())
    first, last = int(shards.start[i]), int(shards.stop[i])
    audio = waveform(number).tobytes()
    if how == "silent_audio":
        at = data.index(audio, first, last)
        data[at : at + len(audio)] = bytes(len(audio))
    elif how == "bad_json":
        data[data.index(b'"captions"', first, last)] = 0xFF
    else:
        data[first : first + 512] = bytes(512)
    path.write_bytes(data)


def test_holes_are_filled_with_good_rows_and_counted(left: str, tmp_path: Path) -> None:
    bad = {3: "silent_audio", 17: "silent_audio", 8: "bad_json", 29: "cut_shard"}
    folder = copy(left, tmp_path / "left")
    for number, how in bad.items():
        spoil(folder, number, how)
    whole = read(open_stream(left), 0, 10)
    for rank in (0, 1):
        holed = read(open_stream(str(folder), world=World(rank, 2)), 0, 10)
        for number, batch in enumerate(holed):
            wanted = rows_of(whole[number])[6 * rank : 6 * rank + 6]
            got = rows_of(batch)
            good = [row for row in wanted if row[1] not in bad]
            assert [sample[:2] for sample in batch.dropped] == [
                (row[0], bad[row[1]]) for row in wanted if row[1] in bad
            ]
            for row, (before, after) in enumerate(zip(wanted, got, strict=True)):
                assert after == before if before[1] not in bad else after in good
                assert batch.clip_ids[row] == clip_id("left", after[1]), "a copy has its own clip's id"
    assert count_reasons(s for b in read(open_stream(str(folder)), 0, 5) for s in b.dropped) == {
        "silent_audio": 4, "bad_json": 2, "cut_shard": 2,
    }  # fmt: skip


@pytest.mark.parametrize(("workers", "piece"), [(0, None), (2, None), (2, 5)])
def test_a_batch_without_a_good_sample_is_one_line(left: str, tmp_path: Path, workers: int, piece: int | None) -> None:
    folder = copy(left, tmp_path / "left")
    stream = open_stream(str(folder))
    for path in folder.glob("*.tar"):
        path.write_bytes(b"")
    read(open_stream(left), 0, 1, workers)  # starts the server that forks workers
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with pytest.raises(UserError) as caught:
        read(stream, 0, 10, workers, piece=piece)
    message = str(caught.value)
    assert message.startswith("all 12 samples of a batch are unreadable ({'cut_shard': 12})")
    assert "atr-scale shards check" in message and "\n" not in message and "Traceback" not in message
    assert not [child for child in psutil.Process().children(recursive=True) if child.pid not in before], "no worker"


def test_a_shard_that_goes_missing_is_counted(left: str, tmp_path: Path) -> None:
    folder = copy(left, tmp_path / "left")
    stream = open_stream(str(folder))
    (folder / "shard-000001.tar").unlink()
    batches = read(stream, 0, 5)
    assert count_reasons(sample for batch in batches for sample in batch.dropped) == {"missing_shard": 14}
    assert len({row[1] for row in all_rows(batches)}) == CLIPS - 7


def test_few_shards_and_many_readers(tmp_path: Path) -> None:
    """One shard, two ranks, four workers each; and fewer clips than a batch."""
    shards = write_shards(tmp_path / "few", range(5), shard_size=100)
    assert len(open_shards(shards).names) == 1
    whole = read(open_stream(shards, batch=8), 0, 6)
    ranks = [read(open_stream(shards, batch=8, world=World(r, 2)), 0, 6, workers=4) for r in range(2)]
    for batch, first, second in zip(whole, *ranks, strict=True):
        assert rows_of(batch) == rows_of(first) + rows_of(second)
    assert Counter(row[1] for row in all_rows(whole)[:40]) == dict.fromkeys(range(5), 8)


def test_memory_is_used_again_and_never_under_a_batch_that_is_held(left: str) -> None:
    """Workers reuse their buffers while some batches are kept and others are not."""
    whole = read(open_stream(left), 0, 30)
    kept = []
    for number, batch in enumerate(read_batches(open_stream(left).between(0, 30), 1)):
        assert equal(batch, whole[number])
        if number % 3 == 0:
            kept.append((number, batch))
    assert all(equal(batch, whole[number]) for number, batch in kept)
    places = [batch.waveform.data_ptr() for batch in read_batches(open_stream(left).between(0, 30), 0)]
    assert len(set(places)) <= 3, "one process goes on in the same memory"


def test_draws_depend_on_the_position_alone() -> None:
    draws = _draws(5, 100, 9)
    assert draws[3:6] == _draws(5, 103, 3) and draws != _draws(6, 100, 9)
    spread = np.array(_draws(0, 0, 20_000))
    assert np.abs(spread.mean(0) - 0.5).max() < 0.02 and (spread >= 0).all() and (spread < 1).all()
    assert np.abs(np.corrcoef(spread.T) - np.eye(4)).max() < 0.05


def test_more_workers_than_batches(left: str) -> None:
    assert len(read(open_stream(left), 0, 1, workers=3)) == 1
    assert read(open_stream(left), 4, 4, workers=1) == []


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_never_pairs_audio_with_another_caption(right: str, tmp_path: Path, data: st.DataObject) -> None:
    """Bytes cut out, put in or overwritten at random places, after the manifest was written or without one."""
    folder = tmp_path / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(right, folder)
    if data.draw(st.booleans(), "without a manifest"):
        (folder / "manifest.json").unlink()
    for path in sorted(folder.glob("*.tar")):
        whole = path.read_bytes()
        at, length = data.draw(st.integers(0, len(whole))), data.draw(st.integers(0, 8000))
        # A filler that is legal inside a JSON string would change a caption's words, which only a checksum can detect.
        filler = data.draw(
            st.sampled_from([b"", b"<html>\n502</html>", bytes(512), bytes(10240), b"\xff" * 700, whole[512:9000]])
        )
        kept = at + (len(filler) if data.draw(st.booleans(), "overwrite") else length)
        path.write_bytes(whole[:at] + filler + whole[kept:])
    try:
        batches = read(open_stream(str(folder)), 0, 4)
    except UserError:
        return
    for batch in batches:
        for row in range(len(batch.keys)):
            values = samples(batch, row)[: batch.lengths[row]]
            number = int(np.bincount(np.maximum(values - 1, 0) // PER_CLIP).argmax())
            clip, _ = batch.input_ids[row].tolist()
            assert clip == number and batch.clip_ids[row] in (clip_id("right", number), clip_id("damaged", number))


def test_samples_that_moved_by_one_member_never_mispair(right: str, tmp_path: Path) -> None:
    """One more JSON in front: every range except a shard's first now has a JSON and the next clip's audio."""
    folder = copy(right, tmp_path / "right")
    stream = open_stream(str(folder), batch=20)
    for path in folder.glob("*.tar"):
        whole = path.read_bytes()
        with tarfile.open(path) as tar:
            json_member = next(m for m in tar.getmembers() if m.name.endswith(".json"))
        end = json_member.offset_data + -(-json_member.size // 512) * 512
        path.write_bytes(whole[json_member.offset : end] + whole)
    (batch,) = read(stream, 0, 1)
    assert count_reasons(batch.dropped) == {"mismatched_key": 17} and len({row[1] for row in rows_of(batch)}) == 3


def test_laion_shards_train_as_they_are(tmp_path: Path) -> None:
    """The same key in two shards is two clips."""
    location = write_laion(tmp_path / "sounds" / "train", {"0": list(range(8)), "1": list(range(8, 14))})
    batches = read(open_stream(location, batch=7), 0, 4)
    rows = all_rows(batches)
    assert sorted(row[1] for row in rows[:14]) == sorted(row[1] for row in rows[14:]) == list(range(14))
    ids = {int(batch.clip_ids[k]): row[1] for batch in batches for k, row in enumerate(rows_of(batch))}
    expected = {stable_id(f"sounds/train/{n // 8}/{n % 8}"): n for n in range(14)}
    assert ids == expected
    assert {key.rsplit("/", 1)[0] for batch in batches for key in batch.keys} == {"sounds/0.tar", "sounds/1.tar"}


def test_laion_shards_cut_inside_their_first_sample_never_mispair(tmp_path: Path) -> None:
    """Shard 0 ends after its audio, and shard 1 continues with the same key."""
    location = write_laion(tmp_path / "sounds", {"0": [0], "1": [1], "2": [2, 3]})
    first = tmp_path / "sounds" / "0.tar"
    with tarfile.open(first) as tar:
        json_header = tar.getmember("0.json").offset
    first.write_bytes(first.read_bytes()[:json_header])
    rows = all_rows(read(open_stream(location, batch=6), 0, 3))
    assert {row[1] for row in rows} == {1, 2, 3}


def test_no_shards(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no shards in"):
        open_stream(str(tmp_path))


def test_the_code_is_sound() -> None:
    """The tests of this file rely on it: a swapped clip or a shifted crop is noticed."""
    values = torch.from_numpy(waveform(5)[123:2123].astype(np.float32) / 32768)
    batch = Batch(values[None], torch.tensor([2000]), *(torch.zeros(1, 2),) * 2, *(torch.zeros(1),) * 4)
    assert clip_and_start(batch, 0) == (5, 123)
    values[1000:] = torch.from_numpy(waveform(6)[1123:2123].astype(np.float32) / 32768)
    with pytest.raises(AssertionError, match="clips"):
        clip_and_start(batch, 0)


@pytest.mark.parametrize(
    ("exclusions", "words"),
    [
        ([{"name": "unreadable AudioSet files"}], "without an exclusion list"),
        ([{"name": "unreadable AudioSet files"}, {"name": "blacklist_exclude_test_ac.json"}], "without the clips of"),
    ],
)
def test_exclusion_lists_are_checked_when_read(
    caplog: pytest.LogCaptureFixture, exclusions: list[dict[str, str]], words: str
) -> None:
    """It is logged which lists WavCaps shards were built with, or that there was none."""
    shards = ShardSet(
        "somewhere", "wavcaps", "train", [], *(np.zeros(0, np.int64),) * 3, [], {"exclusions": exclusions}
    )
    with caplog.at_level("INFO"):
        _check_exclusions(shards)
    assert words in caplog.text
