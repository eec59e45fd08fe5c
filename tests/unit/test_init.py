"""`atr-scale init` copies the shipped files and overwrites nothing that differs."""

from __future__ import annotations

from pathlib import Path

import pytest

from atr_scale.cli.init import init_command
from atr_scale.errors import UserError
from atr_scale.shipped import shipped_files
from tests.commands import ROOT


def test_what_is_shipped() -> None:
    names = {name for _, name in shipped_files()}
    assert {"configs/papers/tap_pmr.yaml", "launch/cloud.sh", "slurm/prologue.sh", "docs/config.md"} <= names
    assert "launch/test.sh" not in names
    assert all(path == ROOT / name for path, name in shipped_files())


def test_a_second_call_adds_only_what_is_missing(tmp_path: Path) -> None:
    init_command(str(tmp_path / "mine"))
    kept, lost = tmp_path / "mine/configs/esc50.yaml", tmp_path / "mine/slurm/prologue.sh"
    lost.unlink()
    before = kept.stat().st_mtime_ns
    init_command(str(tmp_path / "mine"))
    assert lost.is_file() and kept.stat().st_mtime_ns == before


def test_changed_files_are_never_overwritten(tmp_path: Path) -> None:
    for name in ("configs/esc50.yaml", "launch/cloud.sh"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("mine\n")
    with pytest.raises(UserError, match=r"esc50\.yaml and 1 more would be overwritten.*nothing was copied"):
        init_command(str(tmp_path))
    assert not (tmp_path / "slurm").exists()
    assert (tmp_path / "configs/esc50.yaml").read_text() == "mine\n"


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(UserError, match=r"cannot write .*give another folder"):
        init_command(str(tmp_path / "taken"))
