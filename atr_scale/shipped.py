"""The files that the project ships beside its code: configurations, pages, examples, launch and job scripts.

They have one place, the top of the repository. setup.py, which runs this file alone, copies them into the wheel.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

FOLDERS = ("configs", "docs", "examples", "launch", "slurm")
# They need the whole repository.
LEFT_OUT = ("launch/cuda.json", "launch/test.sh")
IN_WHEEL = Path(__file__).parent / "_shipped"


def shipped_files(root: Path | None = None) -> Iterator[tuple[Path, str]]:
    """The shipped files below `root`, sorted: path, and path relative to `root` with slashes.

    root: by default where this package finds them, in the wheel or at the top of the repository.
    """
    if root is None:
        root = IN_WHEEL if IN_WHEEL.is_dir() else Path(__file__).parents[1]
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*")):
            name = path.relative_to(root).as_posix()
            if path.is_file() and name not in LEFT_OUT and "__pycache__" not in path.parts:
                yield path, name
