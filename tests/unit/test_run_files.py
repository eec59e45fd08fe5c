"""Files of a run folder are read while they are written, and after they were damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from atr_scale.run_files import read_json_lines, read_json_object


@pytest.mark.parametrize("content", [None, b"", b"{", b"[1]", b'"text"', b"\xff\xfe", b"\0" * 100])
def test_an_object_that_cannot_be_read_is_none(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "file").write_bytes(content)
    assert read_json_object(tmp_path / "file") is None


def test_lines_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    assert read_json_lines(path) == []
    path.write_bytes(b'{"step": 1}\n[2]\n\xff\n\0\0\0\n{"step": 3}\n{"step": 4')
    assert read_json_lines(path) == [{"step": 1}, {"step": 3}]


def test_the_end_of_a_file_is_enough_for_its_last_line(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_text("".join(f'{{"step": {step}}}\n' for step in range(1000)))
    found = read_json_lines(path, last_bytes=30)
    assert found == [{"step": 998}, {"step": 999}]  # not the one whose beginning is missing
