"""A public name means one thing in the whole package."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "atr_scale"
# Pairs that are meant to be interchangeable: a loss on matrices and on score blocks; a verb and the function it calls.
TWINS = {("losses/dense.py", "losses/tiled"), ("cli/", "")}


def public_names() -> dict[str, list[str]]:
    """Public module-level classes and functions and the files that define them."""
    found = defaultdict(list)
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                found[node.name].append(str(path.relative_to(PACKAGE)))
    return found


def test_every_public_name_is_defined_once() -> None:
    def meant(places: list[str]) -> bool:
        return any(
            len(places) == 2
            and any(place.startswith(one) for place in places)
            and any(place.startswith(other) for place in places)
            for one, other in TWINS
        )

    names = public_names()
    assert len(names) > 200
    assert {name: places for name, places in names.items() if len(places) > 1 and not meant(places)} == {}
