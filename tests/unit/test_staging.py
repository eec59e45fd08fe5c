"""Copies of shards on another disk: what is copied, kept and removed, and what is refused."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from atr_scale.data.staging import stage_shards
from atr_scale.errors import UserError


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def test_only_what_has_changed_is_copied(tmp_path: Path) -> None:
    shards = tmp_path / "clotho" / "train"
    shards.mkdir(parents=True)
    for name in ("a.tar", "b.tar", "manifest.json"):
        (shards / name).write_bytes(name.encode() * 100)
    copy = stage_shards(str(shards), tmp_path / "local")
    assert copy.parent == tmp_path / "local" and contents(copy) == contents(shards)

    before = {path.name: path.stat().st_mtime_ns for path in copy.iterdir()}
    (shards / "b.tar").write_bytes(b"b.TAR" * 100)  # of the same size
    os.utime(shards / "b.tar", ns=(1, 1))
    (shards / "manifest.json").unlink()
    (copy / "a cut file").write_bytes(b"")
    assert stage_shards(str(shards), tmp_path / "local") == copy
    assert contents(copy) == contents(shards)
    assert (copy / "a.tar").stat().st_mtime_ns == before["a.tar"]


def test_two_places_of_one_name_have_two_copies(tmp_path: Path) -> None:
    for corpus in ("clotho", "audiocaps"):
        (tmp_path / corpus / "train").mkdir(parents=True)
        (tmp_path / corpus / "train" / "a.tar").write_text(corpus)
    copies = [stage_shards(str(tmp_path / corpus / "train"), tmp_path / "local") for corpus in ("clotho", "audiocaps")]
    assert [(copy / "a.tar").read_text() for copy in copies] == ["clotho", "audiocaps"]


def test_mistakes_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"no shards in .*nowhere"):
        stage_shards(str(tmp_path / "nowhere"), tmp_path / "local")
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.tar").write_bytes(b"x" * 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=999))
    with pytest.raises(UserError, match=r"needs 0\.0 MB on the disk of .*, which has 0\.0 MB free: make space"):
        stage_shards(str(tmp_path / "train"), tmp_path / "local")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot copy .* \(Not a directory\): choose another STAGE"):
        stage_shards(str(tmp_path / "train"), tmp_path / "file")
