"""Modules that add to the package from outside, and what is said of those that cannot be imported."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from atr_scale.errors import UserError
from atr_scale.plugins import import_plugins

PACKAGE = "outside_plugins"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty package that can be imported."""
    folder = tmp_path / PACKAGE
    folder.mkdir()
    (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]


def refusal(*names: str) -> str:
    with pytest.raises(UserError) as caught:
        import_plugins(names)
    message = str(caught.value)
    assert "\n" not in message and caught.value.__suppress_context__
    return message


def test_modules_are_imported_in_order_and_once(package: Path) -> None:
    (package / "first.py").write_text("order = ['first']\n")
    (package / "second.py").write_text(f"from {PACKAGE}.first import order\norder.append('second')\n")
    import_plugins([f"{PACKAGE}.first", f"{PACKAGE}.second"])
    import_plugins([f"{PACKAGE}.second"])
    assert sys.modules[f"{PACKAGE}.first"].order == ["first", "second"]
    import_plugins([])


@pytest.mark.parametrize("name", ["nowhere", "nowhere.inside", f"{PACKAGE}.nowhere", f"{PACKAGE}.nowhere.inside"])
def test_a_missing_module_is_named_with_the_remedy(package: Path, name: str) -> None:
    message = refusal(name)
    assert message.startswith(f"the plug-in '{name}' cannot be imported (ModuleNotFoundError: No module named ")
    assert message.endswith("): check its name, and that it is installed or on PYTHONPATH")


@pytest.mark.parametrize("name", ["", ".relative", "a b"])
def test_names_that_are_none(name: str) -> None:
    assert "check its name" in refusal(name)


@pytest.mark.parametrize(
    ("text", "cause", "line"),
    [
        ("import math\nmath.sqrt(-1)\n", "ValueError: ", 2),
        ("\n\nimport a_missing_library\n", "ModuleNotFoundError: No module named 'a_missing_library'", 3),
        ("x = 1\nif x\n", "SyntaxError: ", 2),
        ("raise ValueError('two\\nlines')\n", "ValueError: two lines", 1),
        ("import json\n\njson.loads('{')\n", "JSONDecodeError: ", 3),
        ("from atr_scale.errors import UserError\nraise UserError('no')\n", "UserError: no", 2),
        ("import sys\nsys.exit('gone')\n", "SystemExit: gone", 2),
    ],
)
def test_an_error_inside_is_told_with_its_place(package: Path, text: str, cause: str, line: int) -> None:
    """The place is in the plug-in itself, also if a library raised the error."""
    (package / "faulty.py").write_text(text)
    message = refusal(f"{PACKAGE}.faulty")
    assert message.startswith(f"the plug-in '{PACKAGE}.faulty' cannot be imported ({cause}")
    assert message.endswith(f", {package / 'faulty.py'}, line {line}): correct it there")


def test_an_error_in_a_module_that_the_plug_in_imports_is_told_with_its_own_place(package: Path) -> None:
    (package / "faulty.py").write_text("\nnonsense\n")
    (package / "outer.py").write_text(f"import {PACKAGE}.faulty\n")
    assert f"{package / 'faulty.py'}, line 2)" in refusal(f"{PACKAGE}.outer")


@pytest.mark.parametrize("names", ["json", [3]])
def test_what_is_no_list_of_names_is_told(names: Any) -> None:
    with pytest.raises(UserError, match="give a list of modules' names"):
        import_plugins(names)
