"""Shards that this user may not read are called that: they are neither damaged nor missing."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from atr_scale.data.sample import BadSample
from atr_scale.data.shard_check import check_shards
from atr_scale.data.shard_reader import open_shards
from atr_scale.errors import UserError
from tests.coded import write_shards

NOBODY = 65534


@pytest.fixture
def shards() -> Iterator[str]:
    """Shards in a folder that everybody can enter, read by a user without root's rights."""
    with tempfile.TemporaryDirectory() as root:
        os.chmod(root, 0o755)
        folder = write_shards(Path(root) / "coded", range(6), shard_size=3)
        for path in (Path(folder).parent, *Path(folder).rglob("*")):
            path.chmod(0o755)
        Path(folder).chmod(0o755)
        was = os.geteuid()
        if was == 0:
            os.seteuid(NOBODY)
        yield folder
        os.seteuid(was)


def lock(shards: str, name: str) -> None:
    was = os.geteuid()
    os.seteuid(os.getuid())
    Path(shards, name).chmod(0o200)
    os.seteuid(was)


@pytest.mark.parametrize("name", ["shard-000001.tar", "manifest.json"])
@pytest.mark.parametrize("use", [open_shards, check_shards])
def test_a_file_without_permission_is_one_line(shards: str, name: str, use: object) -> None:
    assert callable(use)
    use(shards)
    lock(shards, name)
    expected = rf"no permission to read 1 of \d files in {re.escape(shards)}, for example {re.escape(shards)}/{name}"
    with pytest.raises(UserError, match=expected + ": make them readable for this user"):
        use(shards)


def test_permission_taken_away_later_is_counted_as_that(shards: str) -> None:
    found = open_shards(shards)
    lock(shards, "shard-000001.tar")
    found.read(0)
    with pytest.raises(BadSample, match="no_permission") as error:
        found.read(5)
    assert error.value.reason == "no_permission"
