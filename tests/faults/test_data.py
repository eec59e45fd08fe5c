"""Damaged shards, audio and captions cost their own samples, which are counted and named; no pair is ever wrong."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from atr_scale.run_files import DROPPED, read_json_lines
from tests.faults.audit import HOOKS, Row, read_audit
from tests.faults.runs import TinyRuns
from tests.tiny import RATE, read_training
from tests.tiny_run import tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
Outcome = Callable[[str], None]
CLIPS, PER_SHARD = 40, 5
NOBODY = 65534


class Data:
    """Trainings of one test on shards of its own, which it damages; every row that is trained on is audited."""

    def __init__(self, runs: TinyRuns) -> None:
        self.runs, self.shards, self.audit = runs, runs.place / "corpus", runs.place / "audit"
        tiny_config(runs.inputs, runs.folder())

    def copy(self) -> list[Path]:
        """Take a copy of the tiny shards, and return its tars."""
        shutil.copytree(self.runs.inputs / "train" / "shards", self.shards)
        return sorted(self.shards.glob("*.tar"))

    def start(self, steps: int, *overrides: str, hooks: str = "") -> subprocess.Popen[bytes]:
        return self.runs.start(
            steps=steps,
            overrides=(f"data.train[0].shards={self.shards}", "data.validation=null", *overrides),
            hooks=hooks + HOOKS,
            environment={"AUDIT": str(self.audit), "XDG_CACHE_HOME": str(self.runs.place / "cache")},
        )

    def train(self, steps: int, *overrides: str) -> int:
        return self.runs.ended(self.start(steps, *overrides))

    def rows(self) -> list[Row]:
        return read_audit(self.audit, self.runs.inputs / "train" / "text_encoder")

    def paired(self) -> set[int]:
        """The clips that were trained on; asserts that none had the caption of another one."""
        rows = self.rows()
        assert rows and all(row.tone == row.caption for row in rows), [row for row in rows if row.tone != row.caption]
        return {row.tone for row in rows}

    def named(self) -> dict[str, str]:
        """The reasons of dropped samples, by their keys in the shard; asserts that all visits are counted."""
        lines = read_json_lines(self.runs.folder() / DROPPED)
        counted = {name: n for name, n in read_training(self.runs.folder())[-1].items() if name.startswith("dropped/")}
        assert sum(counted.values()) == len(lines)
        return {line["sample"].split("/")[-1]: line["reason"] for line in lines}


@pytest.fixture
def data(runs: TinyRuns) -> Data:
    return Data(runs)


def tar_of(path: Path, *members: tuple[str, bytes | tarfile.TarInfo]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            data = content if isinstance(content, bytes) else b""
            info.name, info.size = name, len(data)
            tar.addfile(info, io.BytesIO(data))


def clips_of(path: Path) -> set[int]:
    """The numbers of the clips in a tar."""
    with tarfile.open(path) as tar:
        records = [
            json.load(file) for name in tar.getnames() if name.endswith(".json") and (file := tar.extractfile(name))
        ]
    return {int(record["captions"][0].split()[-1]) for record in records}


def tone(number: int) -> np.ndarray:
    """A second of the tone of that clip, as in tests/tiny.py."""
    return 0.3 * np.sin(2 * np.pi * (200 + 100 * number) * np.arange(RATE) / RATE)


def encoded(samples: np.ndarray, form: str, subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format=form, subtype=subtype)
    return file.getvalue()


def good(numbers: range) -> list[tuple[str, bytes]]:
    return [
        member
        for n in numbers
        for member in (
            (f"good-{n}.wav", encoded(tone(n), "WAV")),
            (f"good-{n}.json", json.dumps({"text": f"a low and high tone {n}"}).encode()),
        )
    ]


@pytest.mark.fault(
    "shards are cut inside a sample, cut between two samples, empty, a page of HTML, or overwritten in the middle",
    expected="the rest of such a shard is dropped, counted and named; audio and caption of every row are of one clip",
)
@pytest.mark.parametrize("manifest", [True, False], ids=["with a manifest", "without"])
def test_damaged_shards(data: Data, manifest: bool, outcome: Outcome) -> None:
    inside, between, empty, html, middle, *rest = data.copy()
    offsets = json.loads((data.shards / "manifest.json").read_text())["shards"][1]["offsets"]
    untouched = set().union(*(clips_of(path) for path in rest))
    whole = inside.read_bytes()
    inside.write_bytes(whole[: len(whole) // 2 + 100])
    between.write_bytes(between.read_bytes()[: offsets[2]])
    empty.write_bytes(b"")
    html.write_bytes(b"<html>502 Bad Gateway</html>" * 100)
    whole = middle.read_bytes()
    middle.write_bytes(whole[:60_000] + os.urandom(40_000) + whole[100_000:])
    if not manifest:
        (data.shards / "manifest.json").unlink()
    assert data.train(6) == 0, data.runs.said()
    clips = data.paired()
    assert untouched <= clips < set(range(CLIPS))
    if manifest:
        named = data.named()
        assert 10 <= len(named) <= 25 and len(clips) <= CLIPS - len(named) + 1
        outcome(f"{len(named)} samples dropped and named, {len(clips)} clips trained on, no wrong pair")
    else:
        assert "left out of the index: {'cut_shard': " in data.runs.said()
        outcome(f"{len(clips)} clips trained on, no wrong pair; the rest is left out of the index, which the log says")


@pytest.mark.fault("more samples are dropped than data.max_drop_rate", expected="one line, exit code 2; nothing saved")
def test_too_many_dropped(data: Data, outcome: Outcome) -> None:
    data.copy()[0].write_bytes(b"")
    assert data.train(6, "data.max_drop_rate=0.0003") == 2
    last = data.runs.said().splitlines()[-1]
    assert last.startswith("error: ") and "samples were unreadable ({'cut_shard': " in last
    assert "more than data.max_drop_rate = 0.0003: run `atr-scale shards check`" in last
    assert "Traceback" not in data.runs.said() and not (data.runs.folder() / "checkpoints").exists()
    outcome("exit code 2, one line with the counts by reason")


@pytest.mark.fault("shards are missing at the start", expected="all are named in one line, exit code 2")
def test_missing_at_the_start(data: Data, outcome: Outcome) -> None:
    gone = data.copy()[2:4]
    for path in gone:
        path.unlink()
    assert data.train(6) == 2
    last = data.runs.said().splitlines()[-1]
    assert last.startswith("error: 2 of 8 shards are missing") and all(path.name in last for path in gone), last
    outcome("exit code 2, both named")


@pytest.mark.fault("a shard is deleted while training", expected="its samples are dropped, counted and named")
def test_deleted_while_training(data: Data, outcome: Outcome) -> None:
    first = data.copy()[0]
    hook = f"""
import pathlib
from atr_scale.training.loop import Training
step = Training._step
def deleting(self, batches):
    if self.progress.step == 2:
        pathlib.Path({str(first)!r}).unlink()
    step(self, batches)
Training._step = deleting
"""
    assert data.runs.ended(data.start(9, hooks=hook)) == 0, data.runs.said()
    assert len(data.paired()) >= CLIPS - PER_SHARD
    named = data.named()
    assert 0 < len(named) <= PER_SHARD and set(named.values()) == {"missing_shard"}
    outcome(f"{len(named)} samples dropped as missing_shard, the others trained on")


def bad_audio() -> dict[str, tuple[str, bytes, set[str]]]:
    """By key: extension, content, and the reasons that it may be dropped for."""
    broken = {"undecodable_audio", "short_audio"}
    nan, inf, loud = (tone(1).astype(np.float32) for _ in range(3))
    nan[::100], inf[::100], loud[::100] = np.nan, np.inf, 1e20  # in every crop
    long = bytearray(encoded(tone(1), "FLAC"))
    long[22:26] = struct.pack(">I", RATE * 7200)  # the low bytes of the number of samples
    flac, mp3, opus = encoded(tone(1), "FLAC"), encoded(tone(1), "MP3"), encoded(tone(1), "OGG", "OPUS")
    return {
        "random": ("wav", os.urandom(5000), {"undecodable_audio"}),
        "html": ("flac", b"<html>404</html>", {"undecodable_audio"}),
        "cut-flac": ("flac", flac[: len(flac) // 2], broken),
        "cut-mp3": ("mp3", mp3[: len(mp3) // 2], broken),
        "cut-opus": ("opus", opus[: len(opus) // 3], broken),
        "no-bytes": ("wav", b"", {"empty_audio"}),
        "no-samples": ("wav", encoded(np.zeros(0), "WAV"), {"empty_audio"}),
        "nan": ("wav", encoded(nan, "WAV", "FLOAT"), {"nonfinite_audio"}),
        "inf": ("wav", encoded(inf, "WAV", "FLOAT"), {"nonfinite_audio"}),
        "silent": ("flac", encoded(np.zeros(RATE), "FLAC"), {"silent_audio"}),
        "1e20": ("wav", encoded(loud, "WAV", "FLOAT"), {"loud_audio"}),
        "two-hours": ("flac", bytes(long), {"huge_audio"}),
    }


@pytest.mark.fault(
    "audio of random bytes, cut, empty, NaN, infinite, silent, of 1e20, or with a header that claims two hours",
    expected="dropped before the batch, counted by reason, named in RUN/dropped.jsonl and, at times, in the log",
)
def test_bad_audio(data: Data, outcome: Outcome) -> None:
    bad = bad_audio()
    members = [(f"{key}.{extension}", content) for key, (extension, content, _) in bad.items()]
    pairs = [pair for name, content in members for pair in
             ((name, content), (f"{name.rsplit('.', 1)[0]}.json", b'{"text": "a low tone 1"}'))]  # fmt: skip
    tar_of(data.shards / "0.tar", *good(range(8)), *pairs, *good(range(8, 16)))
    assert data.train(6) == 0, data.runs.said()
    assert data.paired() == set(range(16))
    named = data.named()
    assert set(named) == set(bad)
    assert all(named[key] in reasons for key, (*_, reasons) in bad.items()), named
    assert all(line["loss"] is not None for line in read_training(data.runs.folder()))
    said = [line for line in data.runs.said().splitlines() if "unreadable samples" in line]
    assert len(said) == 1, "once a minute"
    counts = {reason: list(named.values()).count(reason) for reason in sorted(set(named.values()))}
    outcome(", ".join(f"{count} {reason}" for reason, count in counts.items()) + "; the other 16 clips trained on")


CAPTIONS: dict[str, tuple[bytes | None, str | None]] = {
    # key: its JSON, and the reason it is dropped for, if it is
    "missing": (None, "missing_json"),
    "no-field": (b"{}", "no_caption"),
    "empty": (b'{"text": ""}', "no_caption"),
    "blank": (b'{"text": " \\t\\n"}', "no_caption"),
    "only-nul": (b'{"text": "\\u0000"}', "no_caption"),
    "not-utf-8": (b'{"text": "\xff\xfe dog 0"}', "bad_json"),
    "cut-json": (b'{"text": "a dog', "bad_json"),
    "10-kb": (json.dumps({"text": "low " * 2500}).encode(), None),
    "megabytes": (json.dumps({"text": "low " * 1_000_000}).encode(), None),
    "one-word-of-a-megabyte": (json.dumps({"text": "x" * 1_000_000}).encode(), None),
    "emoji": ('{"text": "a dog \U0001f415\u200d\U0001f9ba barks"}'.encode(), None),
    "nul": (b'{"text": "a\\u0000b low"}', None),
    "lone-surrogate": (b'{"text": "\\ud800 low"}', "no_caption"),
}


@pytest.mark.fault(
    "captions that are missing, empty, blank, NUL, not UTF-8, cut, emoji, 10 kB, megabytes, or lone surrogates",
    expected="none is a crash: what holds no text is dropped and counted, long ones are cut by tokens",
)
def test_odd_captions(data: Data, outcome: Outcome) -> None:
    wav = encoded(tone(1), "WAV")
    members = [(f"{key}.{kind}", content) for key, (text, _) in CAPTIONS.items()
               for kind, content in (("wav", wav), ("json", text)) if content is not None]  # fmt: skip
    tar_of(data.shards / "0.tar", *good(range(8)), *members)
    assert data.train(5) == 0, data.runs.said()
    trained = {row.key.split("/")[-1] for row in data.rows()}
    kept = {key for key, (_, reason) in CAPTIONS.items() if reason is None}
    assert trained == kept | {f"good-{n}" for n in range(8)}
    indexed_out = {"missing"}  # left out of the index
    assert data.named() == {key: why for key, (_, why) in CAPTIONS.items() if why and key not in indexed_out}
    assert "left out of the index: {'missing_json': 1}" in data.runs.said()
    outcome(f"{len(CAPTIONS) - len(kept)} dropped and counted, {len(kept)} trained on")


@pytest.mark.fault(
    "a tar with .. and absolute names, links, devices, keys that occur twice and keys with dots",
    expected="only regular files of plain names are read, nothing is unpacked; `shards check` names all of them",
)
def test_names_and_kinds_of_members(data: Data, outcome: Outcome) -> None:
    outside = data.runs.place / "secret.wav"
    outside.write_bytes(encoded(tone(30), "WAV"))
    members: list[tuple[str, bytes | tarfile.TarInfo]] = [*good(range(8))]
    wav, text = encoded(tone(31), "WAV"), b'{"text": "a low tone 31"}'
    names = ["../evil", f"{data.runs.place}/evil", "a/../../evil"]
    for name in names:
        members += [(f"{name}.wav", wav), (f"{name}.json", text)]
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
        info = tarfile.TarInfo()
        info.type, info.linkname = kind, str(outside)
        members += [(f"kind{kind.decode()}.wav", info), (f"kind{kind.decode()}.json", text)]
    members += [("good-0.wav", wav), ("good-0.json", text), ("a.b.wav", wav), ("a.b.json", text)]
    tar_of(data.shards / "0.tar", *members)
    command = [sys.executable, "-c", "from atr_scale.cli import main; main()", "shards", "check", str(data.shards)]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=data.runs.place)
    said = checked.stdout + checked.stderr
    assert checked.returncode != 0 and "Traceback" not in said
    for name in [f"{name}.wav" for name in (*names, "kind1", "kind2", "kind3", "kind6")]:
        assert repr(name) in said, said
    assert "duplicate key" in said and "dotted key" in said
    assert data.train(3) == 0, data.runs.said()
    assert data.paired() == set(range(8)), "neither 30 nor 31"
    assert not list(data.runs.place.rglob("evil*"))
    outcome(f"8 plain samples trained on, no file unpacked; shards check: exit code {checked.returncode}, all named")


# Root without its right to read what it has no permission for.
AS_A_USER = """
import os, sys
if "AS_A_USER" not in os.environ:
    os.environ["AS_A_USER"] = "1"
    os.execvp("setpriv", ["setpriv", "--bounding-set=-dac_override,-dac_read_search", sys.executable, *sys.argv])
"""


@pytest.mark.fault("a shard of mode 600, of another user", expected="one line that says no permission, exit code 2")
@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to make files of another user")
def test_a_shard_without_permission(data: Data, outcome: Outcome) -> None:
    locked = data.copy()[1]
    locked.chmod(0o600)
    os.chown(locked, NOBODY, NOBODY)
    assert data.runs.ended(data.start(3, hooks=AS_A_USER)) == 2
    last = data.runs.said().splitlines()[-1]
    assert last.startswith("error: no permission to read 1 of ") and str(locked) in last, last
    assert "Traceback" not in data.runs.said()
    outcome("exit code 2, the shard is named")
