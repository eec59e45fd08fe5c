"""The run folder must be the same one on all machines, or no checkpoint could be saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from atr_scale.distributed.world import World
from atr_scale.errors import UserError
from atr_scale.run_files import LOCK
from atr_scale.training import run_lock
from atr_scale.training.run_lock import only_training


class SecondRank:
    """Rank 1 of two, on another machine than rank 0, which holds the lock."""

    size, is_main = 2, False

    def __init__(self, lock: bytes) -> None:
        self.of_first: list[Any] = [None, lock, (True, "gpu01")]  # what rank 0 tells in each gather

    def gather_objects(self, value: Any) -> list[Any]:
        return [self.of_first.pop(0), value if value is None or isinstance(value, bytes) else (value[0], "gpu02")]


def test_a_folder_that_machines_do_not_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "SEEN_S", 0.0)
    (tmp_path / LOCK).write_bytes(b"of rank 0")

    def start(lock: bytes, **options: bool) -> None:
        with only_training(tmp_path, cast(World, SecondRank(lock)), **options):
            pass

    start(b"of rank 0")
    start(b"of another folder", one_folder=False)  # of a run on S3
    with pytest.raises(UserError, match=r"of rank 1 on gpu02 is not that of rank 0 on gpu01: give a folder that all"):
        start(b"of another folder")
