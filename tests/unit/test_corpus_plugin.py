"""A corpus from outside the package, with options of its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

from atr_scale.cli import app
from atr_scale.data.corpora import CORPORA
from atr_scale.data.shard_check import check_shards
from atr_scale.data.shard_reader import open_shards
from atr_scale.errors import UserError

MODULE = "bird_corpus"
PLUGIN = """
import json

from atr_scale.data.corpora import CORPORA, Clip, Corpus
from atr_scale.sections import Section


class BirdOptions(Section):
    min_votes: int = 1


class Birds(Corpus):
    licence = "CC0"
    splits = ("train",)
    Options = BirdOptions

    def read_clips(self, split):
        birds = json.loads((self.root / "birds.json").read_text())
        return [Clip(name, [f"a {name} sings"], split) for name, votes in birds if votes >= self.options.min_votes]

    def find_audio(self, split, clips):
        return [str(self.root / f"{clip.clip_id}.wav") for clip in clips]


CORPORA["birds"] = Birds
"""
RATE = 8000


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of three birds with one, two and three votes; their corpus can be imported, and is gone afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / f"{MODULE}.py").write_text(PLUGIN)
    birds = [("robin", 1), ("wren", 2), ("finch", 3)]
    (tmp_path / "birds.json").write_text(json.dumps(birds))
    noise = np.random.default_rng(0).integers(-999, 999, 800).astype(np.int16)
    for name, _ in birds:
        soundfile.write(tmp_path / f"{name}.wav", noise, RATE)
    known = dict(CORPORA)
    yield tmp_path
    CORPORA.clear()
    CORPORA.update(known)
    sys.modules.pop(MODULE, None)


def build(root: Path, *arguments: str, out: str = "out", plugins: tuple[str, ...] = (MODULE,)) -> Path:
    command = ["shards", "build", "birds", "--root", str(root), "--out", str(root / out), "--sample-rate", str(RATE)]
    command += [f"--plugins={name}" for name in plugins]
    result = CliRunner().invoke(app, [*command, "--workers", "1", *arguments])
    if isinstance(result.exception, UserError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return root / out


def test_a_plug_ins_corpus_is_built_with_its_options(root: Path) -> None:
    out = build(root, "min_votes=2")
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["corpus"], manifest["licence"], manifest["options"]) == ("birds", "CC0", {"min_votes": 2})
    shards = open_shards(str(out))
    assert sorted(shards.read(i).captions[0] for i in range(len(shards))) == ["a finch sings", "a wren sings"]
    assert check_shards(str(out), deep=True) == []


def test_options_are_settings_of_a_build(root: Path) -> None:
    out = build(root, "min_votes=2")
    before = (out / "manifest.json").stat().st_mtime_ns
    assert build(root, "min_votes=2") == out and (out / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"begun with other settings \(options, clips differ\)"):
        build(root)
    with pytest.raises(UserError, match=r"\(options, clips differ\)"):
        build(root, "min_votes=3")


def test_defaults_are_not_recorded(root: Path) -> None:
    """A reader may get a new option, and shards built before are still the same build."""
    assert "options" not in json.loads((build(root) / "manifest.json").read_text())
    assert build(root, "min_votes=1") == root / "out"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("votes=2", "^the corpus birds has no option votes: its options are min_votes$"),
        ("min_votes=many", "^options of the corpus birds: .*min_votes.*valid integer"),
        ("min_votes", "^unexpected argument 'min_votes': give options of the corpus as key=value$"),
    ],
)
def test_wrong_options_are_one_line(root: Path, argument: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build(root, argument)
    assert "\n" not in str(caught.value) and not (root / "out").exists()


def test_an_unknown_corpus_points_to_plugins(root: Path) -> None:
    known = "unknown corpus 'birds': choose one of audiocaps, clotho, wavcaps, folder, or .* by --plugins"
    with pytest.raises(UserError, match=known):
        build(root, plugins=())
    with pytest.raises(UserError, match="the plug-in 'nowhere' cannot be imported"):
        build(root, plugins=(MODULE, "nowhere"))


def test_an_option_that_a_corpus_does_not_have_is_refused(root: Path) -> None:
    command = ["shards", "build", "folder", "--root", str(root), "--out", str(root / "out"), "depth=2"]
    mistake = CliRunner().invoke(app, command).exception
    assert str(mistake).startswith("the corpus folder has no option depth: its options are captions, audio, ")
