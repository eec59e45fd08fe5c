"""Text is read and written as UTF-8 whatever the locale: captions, paths and names are not ASCII."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(path for room in ("atr_scale", "tools") for path in (ROOT / room).rglob("*.py"))


def without_encoding(source: str) -> list[int]:
    """Lines of calls that open a text file in the locale's encoding."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or any(word.arg == "encoding" for word in node.keywords):
            continue
        function, arguments = node.func, node.args
        if isinstance(function, ast.Attribute) and function.attr in ("read_text", "write_text"):
            found += [node.lineno] if len(arguments) <= (function.attr == "write_text") else []
        elif (isinstance(function, ast.Name) and function.id == "open") or (
            isinstance(function, ast.Attribute) and function.attr == "open" and ast.unparse(function.value) != "os"
        ):
            modes = arguments[1:2] if isinstance(function, ast.Name) else arguments[:1]
            if all(isinstance(mode, ast.Constant) and set(str(mode.value)) <= set("rwxat+") for mode in modes):
                found += [node.lineno] if modes or isinstance(function, ast.Name) else []
    return found


def test_every_text_file_is_opened_as_utf8() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in FILES
        for line in without_encoding(path.read_text(encoding="utf-8"))
    ]
    assert not wrong, "give encoding='utf-8'"


@pytest.mark.parametrize(
    "call", ["path.read_text()", "path.write_text(x)", "open(path)", "open(path, 'w')", "p.open('a')"]
)
def test_a_call_without_encoding_is_found(call: str) -> None:
    assert without_encoding(call) == [1]
    assert without_encoding(call[:-1] + ("" if call.endswith("()") else ", ") + "encoding='utf-8')") == []


@pytest.mark.slow
def test_a_locale_without_these_letters_changes_nothing(tmp_path: Path) -> None:
    """A corpus with Japanese names and captions, built and checked without a locale and beside an ASCII terminal."""
    import numpy as np
    import soundfile

    root = tmp_path / "コーパス"
    (root / "audio").mkdir(parents=True)
    soundfile.write(root / "audio" / "犬.wav", np.sin(np.arange(16_000) / 9).astype(np.float32), 16_000)
    (root / "captions.csv").write_text("file_name,caption\n犬.wav,犬が吠える 🐕\n", encoding="utf-8")
    for number, variables in enumerate(({"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"})):
        out = tmp_path / f"out{number}"
        environment = {**os.environ, **variables, "PYTHONPATH": str(ROOT)}
        for line in (
            ["shards", "build", "folder", "--root", str(root), "--out", str(out)],
            ["shards", "check", str(out)],
        ):
            done = subprocess.run(
                [sys.executable, "-m", "atr_scale.cli", *line], env=environment, capture_output=True, timeout=120
            )
            assert done.returncode == 0, done.stderr.decode(errors="replace")
