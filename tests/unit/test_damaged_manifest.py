"""A damaged manifest of shards is one line; a damaged index is made anew. No sample gets a caption of another one."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atr_scale.data.manifest import MANIFEST, read_manifest
from atr_scale.data.sample import BadSample
from atr_scale.data.shard_check import check_shards
from atr_scale.data.shard_index import INDEX
from atr_scale.data.shard_reader import open_shards
from atr_scale.errors import UserError
from tests.unit.test_shard_reader import KEYS, members, write_manifest, write_tar

ALL = 2 * len(KEYS)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("shards")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        for name in ("a", "b"):
            write_tar(folder / f"{name}.tar", members(name))
        yield str(folder)


@pytest.fixture
def manifest(folder: str) -> Iterator[Path]:
    write_manifest(Path(folder))
    yield Path(folder) / MANIFEST
    (Path(folder) / MANIFEST).unlink()


def read_well(folder: str) -> int | None:
    """Number of samples that are read, all with their own caption; None if the folder is refused in one line."""
    try:
        shards = open_shards(folder)
        check_shards(folder)
    except UserError as error:
        assert "\n" not in str(error)
        return None
    well = 0
    for number in range(len(shards)):
        try:
            sample = shards.read(number)
        except BadSample:
            continue
        assert bytes(sample.audio).startswith(sample.captions[0].encode())
        well += 1
    return well


def flipped(data: bytes, position: int, bit: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :]


def test_flipped_bits_of_a_manifest(folder: str, manifest: Path) -> None:
    good = manifest.read_bytes()
    seen = set()
    for position in range(len(good)):
        manifest.write_bytes(flipped(good, position, position % 7))
        seen.add(read_well(folder))
    assert None in seen and ALL in seen


def nodes(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) inside nested lists and dicts."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield value, key
        if isinstance(inner, dict | list):
            yield from nodes(inner)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
@pytest.mark.slow
def test_values_of_another_shape_in_a_manifest(folder: str, manifest: Path, data: st.DataObject) -> None:
    content = copy.deepcopy(read_manifest(folder))
    content |= {"exclusions": [{"name": "l.csv"}], "num_samples": ALL, "num_captions": ALL}
    for shard in content["shards"]:
        shard["captions"] = [1] * len(KEYS)
    container, key = data.draw(st.sampled_from(list(nodes(content))))
    if data.draw(st.booleans()):
        container[key] = data.draw(VALUES)
    else:
        del container[key]
    manifest.write_text(json.dumps(content))
    try:
        read_well(folder)
    finally:
        write_manifest(Path(folder))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"files": {}}', "[" * 100_000, "9" * 5000, "\xff", "null"])
def test_what_is_no_manifest_is_one_line(folder: str, manifest: Path, content: str) -> None:
    manifest.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"manifest.json is damaged, or no shard manifest \(.*copy it anew"):
        open_shards(folder)


def test_flipped_bits_of_an_index(folder: str) -> None:
    assert read_well(folder) == ALL
    index = Path(folder) / INDEX
    good = index.read_bytes()
    for position in random.Random(0).sample(range(len(good)), 150):
        index.write_bytes(flipped(good, position, position % 7))
        assert read_well(folder) == ALL, position


def test_an_index_that_is_too_deep_is_made_anew(folder: str, caplog: pytest.LogCaptureFixture) -> None:
    (Path(folder) / INDEX).write_text("[" * 100_000)
    assert read_well(folder) == ALL
    assert "is damaged" in caplog.text and "indexed again" in caplog.text
