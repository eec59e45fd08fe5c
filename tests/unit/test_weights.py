"""The weights table and `atr-scale fetch-weights`, against a server on this machine."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import re
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import typer
from tqdm import tqdm

from atr_scale.cli import app
from atr_scale.doctor import diagnose
from atr_scale.encoders import AUDIO_ENCODERS, build_audio_encoder
from atr_scale.encoders.pretrained import fetch as fetching
from atr_scale.encoders.pretrained.fetch import fetch
from atr_scale.encoders.pretrained.weights import FOLDER, WEIGHTS, Project, Weights, checkpoint_path, weights_by_name
from atr_scale.errors import UserError
from tests.commands import ROOT, parse

CONTENT = bytes(range(256)) * 4000  # more than one piece
MD5, SHA256 = (f"{kind}:{hashlib.new(kind, CONTENT).hexdigest()}" for kind in ("md5", "sha256"))


class Server(NamedTuple):
    """A server of CONTENT: the base of its addresses, and the Range headers of the requests so far."""

    base: str
    ranges: list[str | None]


class Handler(BaseHTTPRequestHandler):
    """/file knows ranges, /whole does not, /cut breaks off half-way, /page and /drive.pt are web pages.

    /shifted sends another piece than the one asked for, /refuse says 416 to everything, /loop points to itself, /silent
    sends nothing after its header, /empty is an empty file.
    """

    def __init__(self, ranges: list[str | None], *arguments: Any) -> None:
        self.ranges = ranges
        super().__init__(*arguments)

    def do_GET(self) -> None:
        place, asked = self.path.partition("?")[0].rsplit("/", 1)[-1], self.headers["Range"]
        self.ranges.append(asked)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and place != "whole.pt" else 0
        if place == "missing.pt":
            return self.send_error(404)
        if place in ("locked.pt", "refuse.pt"):
            return self.send_error(403 if place == "locked.pt" else 416)
        if place == "loop.pt":
            self.send_response(302)
            self.send_header("Location", "/loop.pt")
            return self.end_headers()
        body = b"<!DOCTYPE html><p>Too large to scan" if place in ("page.pt", "drive.pt") else CONTENT[start:]
        body = b"" if place == "empty.pt" else body
        if not body and start:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(CONTENT)}")
            return self.end_headers()
        self.send_response(206 if start else 200)
        self.send_header("Content-Type", "text/html; charset=utf-8" if place == "page.pt" else "application/zip")
        self.send_header("Content-Length", str(len(body)))
        if start:
            first = 0 if place == "shifted.pt" else start
            self.send_header("Content-Range", f"bytes {first}-{len(CONTENT) - 1}/{len(CONTENT)}")
        self.end_headers()
        if place == "silent.pt":
            time.sleep(0.2)
            return None
        self.wfile.write(body[: len(body) // 2] if place == "cut.pt" else body)
        return None

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server() -> Iterator[Server]:
    ranges: list[str | None] = []
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, ranges)) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield Server(f"http://127.0.0.1:{running.server_port}", ranges)
        running.shutdown()


def offered(server: Server, file: str = "file.pt", checksum: str | None = SHA256) -> Weights:
    """Weights that `server` has under `file`."""
    project = Project("https://project.example", f"{server.base}/{{file}}", "MIT")
    return Weights("mn04", file, project, len(CONTENT), checksum)


@pytest.mark.parametrize("checksum", [SHA256, MD5, None])
def test_a_file_is_fetched_and_checked(
    server: Server, checksum: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    weights = offered(server, checksum=checksum)
    path = fetch(weights, tmp_path / "new")
    assert path.read_bytes() == CONTENT and [p.name for p in path.parent.iterdir()] == ["file.pt"]
    told = "has none to compare with" if checksum is None else "as in the weights table"
    assert told in caplog.text and (checksum or SHA256).partition(":")[2] in caplog.text
    assert fetch(weights, tmp_path / "new") == path and len(server.ranges) == 1, "it was there"
    path.write_bytes(CONTENT[:-1] + b"!")
    if checksum:
        with pytest.raises(UserError, match=r"instead of the .* of the weights table: .* delete it"):
            fetch(weights, tmp_path / "new")


@pytest.mark.parametrize(
    ("file", "have", "asked"),
    [
        ("file.pt", CONTENT[:700_000], ["bytes=700000-"]),
        ("whole.pt", CONTENT[:700_000], ["bytes=700000-"]),
        ("file.pt", CONTENT, [f"bytes={len(CONTENT)}-"]),
        ("file.pt", CONTENT + b"more", [f"bytes={len(CONTENT) + 4}-", None]),
    ],
    ids=["range", "no ranges", "all there", "too much"],
)
def test_an_interrupted_download_continues(
    server: Server, tmp_path: Path, file: str, have: bytes, asked: list[str | None]
) -> None:
    (tmp_path / f"{file}.partial").write_bytes(have)
    assert fetch(offered(server, file), tmp_path).read_bytes() == CONTENT
    assert server.ranges == asked and not list(tmp_path.glob("*.partial"))


def test_a_broken_connection_keeps_what_came(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"broke after 0\.5 MB .*call again to continue"):
        fetch(offered(server, "cut.pt"), tmp_path)
    assert (tmp_path / "cut.pt.partial").stat().st_size == len(CONTENT) // 2
    assert not (tmp_path / "cut.pt").exists()
    good = replace(offered(server, "cut.pt"), project=Project("", f"{server.base}/file.pt", ""))
    assert fetch(good, tmp_path).read_bytes() == CONTENT
    assert server.ranges[-1] == f"bytes={len(CONTENT) // 2}-"


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("missing.pt", r"there is no file at http.*missing\.pt \(HTTP 404 Not Found\): fetch it from https://project"),
        ("locked.pt", r"refuses \(HTTP 403 Forbidden\): .*with a browser into .*locked\.pt, or give --from"),
        ("page.pt", r"answers with a web page instead of the file"),
        ("drive.pt", r"answers with a web page instead of the file"),
        ("refuse.pt", r"refuses \(HTTP 416 .*\): fetch it from https://project"),
        ("loop.pt", r"refuses \(HTTP 302 .*infinite loop.*\): fetch it from https://project"),
        ("silent.pt", r"the connection to 127\.0\.0\.1:\d+ broke after 0\.0 MB \(timed out\): call again to continue"),
    ],
)
def test_what_a_server_refuses(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, message: str
) -> None:
    monkeypatch.setattr(fetching, "TIMEOUT_S", 0.1)
    with pytest.raises(UserError, match=message) as error:
        fetch(replace(offered(server, file), size=None), tmp_path)
    assert "\n" not in str(error.value) and not (tmp_path / file).exists()
    assert (tmp_path / f"{file}.partial").stat().st_size == 0


def test_nothing_is_taken_for_a_file_whose_size_and_checksum_are_not_known(server: Server, tmp_path: Path) -> None:
    shifted, empty = (replace(offered(server, file, checksum=None), size=None) for file in ("shifted.pt", "empty.pt"))
    (tmp_path / "shifted.pt.partial").write_bytes(CONTENT[:700_000])
    with pytest.raises(UserError, match=r"sends another piece than the one asked for: delete .*\.partial"):
        fetch(shifted, tmp_path)
    with pytest.raises(UserError, match=r"the file of .*empty\.pt has no bytes: call again"):
        fetch(empty, tmp_path)
    assert not list(tmp_path.glob("*.pt"))


def test_no_network(tmp_path: Path) -> None:
    nobody = Weights("mn04", "a.pt", Project("https://project.example", "http://127.0.0.1:9/{file}", "MIT"))
    with pytest.raises(UserError, match=r"cannot reach 127\.0\.0\.1:9 \(.*refused.*\): fetch it from https://project"):
        fetch(nobody, tmp_path)
    with pytest.raises(UserError, match=r"cannot reach mirror\.example \(ordinal not in range\(128\)\)"):
        fetch(nobody, tmp_path, mirror="http://mirror.example/höher")


def test_another_file_than_the_tables(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"offers {len(CONTENT)} bytes instead of the 5 of the weights table"):
        fetch(replace(offered(server), size=5), tmp_path)
    wrong = offered(server, checksum=f"sha256:{'0' * 64}")
    with pytest.raises(
        UserError, match=rf"has {SHA256.replace(':', ' ')} instead of the 0+ of the weights table: call"
    ):
        fetch(wrong, tmp_path)
    assert list(tmp_path.iterdir()) == [], "the next call does not continue a wrong file"


def test_a_full_disk(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
        with pytest.raises(UserError, match=r"file\.pt needs 1 MB more, and .* has 0 MB free: make room"):
            fetch(offered(server), tmp_path)

    def full(*_: object) -> bool:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tqdm, "update", full)
    with pytest.raises(UserError, match=r"cannot write .*file\.pt \(No space left on device\): make room"):
        fetch(offered(server), tmp_path)


def test_two_at_once(server: Server, tmp_path: Path) -> None:
    with (tmp_path / "file.pt.partial").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is writing"):
            fetch(offered(server), tmp_path)


def test_a_file_that_another_process_finishes_meanwhile_is_left_alone(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def finish(*_: object) -> None:
        (tmp_path / "whole.pt.partial").write_bytes(CONTENT)
        (tmp_path / "whole.pt.partial").rename(tmp_path / "whole.pt")

    monkeypatch.setattr(fcntl, "flock", finish)
    with pytest.raises(UserError, match=r"another process has just finished .*whole\.pt\.partial: call again"):
        fetch(offered(server, "whole.pt"), tmp_path)
    assert (tmp_path / "whole.pt").read_bytes() == CONTENT and server.ranges == []


def test_the_verb(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(WEIGHTS, "mine", offered(server))
    elsewhere = replace(offered(server), project=Project("https://gone.example", "http://127.0.0.1:9/{file}", "MIT"))
    monkeypatch.setitem(WEIGHTS, "moved", elsewhere)
    app(["fetch-weights", "mine"], standalone_mode=False)
    app(["fetch-weights", "moved", "--from", f"{server.base}/mirror/", "--to", "other"], standalone_mode=False)
    assert capsys.readouterr().out.split() == ["checkpoints/file.pt", "other/file.pt"]
    app(["fetch-weights", "--list"], standalone_mode=False)
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert rows.keys() == WEIGHTS.keys() and " here " in rows["mine"] and " here " not in rows["mn40"]
    for arguments, message in (
        ([], "no name given"),
        (["resnet83"], "no weights are called 'resnet83': did you mean resnet38"),
        (["mine", "vggish"], "no weights are called 'vggish': known are cnn14, "),
        (["moved", "--from", "/data/weights", "--to", "third"], "is no address of a folder"),
    ):
        with pytest.raises(UserError, match=message):
            app(["fetch-weights", *arguments], standalone_mode=False)


def test_a_name_is_found_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for asks in (lambda: build_audio_encoder("mn04", "mn04"), lambda: diagnose("mn04", "mn04")):
        with pytest.raises(UserError, match=r"no checkpoints/mn04_as_mAP_432\.pt: run `atr-scale fetch-weights mn04`"):
            asks()
    with pytest.raises(
        UserError, match="checkpoint mn05 is no file, and no weights are called 'mn05': did you mean mn"
    ):
        build_audio_encoder("mn04", "mn05")
    FOLDER.mkdir()
    torch.manual_seed(1)
    stored = build_audio_encoder("mn04").state_dict()
    torch.save(stored, FOLDER / WEIGHTS["mn04"].file)
    for checkpoint in ("mn04", FOLDER / WEIGHTS["mn04"].file, str((FOLDER / WEIGHTS["mn04"].file).absolute())):
        found = build_audio_encoder("mn04", checkpoint).state_dict()
        assert all(torch.equal(found[key], value) for key, value in stored.items())
    assert checkpoint_path("folder/mn04") == Path("folder/mn04")


def test_the_verbs_folder_is_where_names_are_found() -> None:
    assert parse("atr-scale fetch-weights mn04")[1]["to"] == FOLDER


def test_the_table_is_sound() -> None:
    assert len({weights.file for weights in WEIGHTS.values()}) == len(WEIGHTS)
    assert len({weights.address for weights in WEIGHTS.values()}) == len(WEIGHTS)
    for name, weights in WEIGHTS.items():
        assert weights.encoder in AUDIO_ENCODERS and name.startswith(weights.encoder) and name.isidentifier()
        assert re.fullmatch(r"https://[^{} ]+", weights.address), weights.address
        assert weights.checksum is None or re.fullmatch(r"sha256:[0-9a-f]{64}|md5:[0-9a-f]{32}", weights.checksum)
    published = [name for name in AUDIO_ENCODERS if not name.startswith(("tiny_", "small_"))]
    assert set(published) <= WEIGHTS.keys(), "the weights of an encoder have its name"
    assert weights_by_name("mn40").file == "mn40_as_ext_mAP_487.pt"


def test_the_document_has_the_table() -> None:
    rows = (ROOT / "docs" / "encoders.md").read_text(encoding="utf-8").splitlines()
    for name, weights in WEIGHTS.items():
        (row,) = (line for line in rows if line.startswith(f"| `{name}` | `{weights.encoder}` |"))
        assert f"`{weights.file}`" in row and weights.project.page in row and weights.project.licence in row


@pytest.mark.real_data
def test_the_table_knows_real_weights(real_data: Path) -> None:
    (path,) = (real_data / "weights" / "efficientat_mn04_as").glob("*.pt")
    assert path.name == WEIGHTS["mn04"].file
    assert fetching.compare(WEIGHTS["mn04"], path)[0]


def test_the_group_has_the_verb() -> None:
    commands: Any = typer.main.get_command(app)
    assert "fetch-weights" in commands.commands
