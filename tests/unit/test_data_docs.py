"""docs/data.md names every field and every reason that the code writes."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import soundfile

from atr_scale.data.manifest import read_manifest
from atr_scale.data.shard_builder import build_shards
from atr_scale.data.shard_reader import open_shards
from tests.coded import RATE, waveform, write_shards

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def page() -> str:
    return (ROOT / "docs" / "data.md").read_text(encoding="utf-8")


def section(page: str, heading: str) -> str:
    return page.split(f"\n### {heading}\n", 1)[1].split("\n#", 1)[0]


def first_column(text: str) -> set[str]:
    """Words in the first cells of the rows of tables."""
    cells = re.findall(r"^\|([^|]+)\|", text, re.MULTILINE)
    return {word for cell in cells for word in re.findall(r"[a-z0-9_]+", cell)}


def test_fields_of_the_manifest_and_of_a_sample(page: str, tmp_path: Path) -> None:
    shards = write_shards(tmp_path, range(3))
    manifest = read_manifest(shards)
    described = section(page, "manifest.json")
    assert manifest.keys() <= first_column(described)
    for name in [*manifest["shards"][0], *manifest["build"]]:
        assert re.search(rf"\b{name}\b", described), name
    sample = open_shards(shards).read(0)
    assert {"clip_id", "captions", "label", "sample_rate", *sample.meta} <= first_column(
        section(page, "A sample in a shard")
    )


def test_reasons_of_unusable_samples(page: str) -> None:
    """Those of all calls of BadSample and DroppedClip, and those that readers count without raising it."""
    reasons = {"missing_audio", "no_caption", "duplicate_key", "several_audios", "missing_json", "cut_shard"}
    for path in (ROOT / "atr_scale" / "data").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                place = {"BadSample": slice(0, 1), "DroppedClip": slice(2, 3)}.get(node.func.id, slice(0))
                reasons |= {str(reason.value) for reason in node.args[place] if isinstance(reason, ast.Constant)}
    assert len(reasons) > 15
    assert reasons == first_column(section(page, "Checking shards")) - {"reason"}


def test_the_folder_of_the_page_can_be_built(page: str, tmp_path: Path) -> None:
    root = tmp_path / "birds"
    (root / "audio" / "pond").mkdir(parents=True)
    (root / "captions.csv").write_text(page.split("```csv\n", 1)[1].split("```", 1)[0])
    for name in ("dawn.wav", "pond/frogs.flac"):
        soundfile.write(root / "audio" / name, waveform(3), RATE)
    manifest = build_shards("folder", root, tmp_path / "out", split="all", sample_rate=RATE, workers=1)
    assert (manifest["num_samples"], manifest["num_captions"], manifest["dropped"]) == (2, 3, {})
    samples = map(open_shards(str(tmp_path / "out")).read, range(2))
    assert {(s.clip_id, s.label, s.meta["sound_id"]) for s in samples} == {
        ("birds/dawn.wav", "birds", "401"),
        ("birds/pond/frogs.flac", "frogs", "402"),
    }
