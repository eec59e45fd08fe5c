"""An index finds what a comparison with all vectors finds, and refuses what it cannot answer."""

from __future__ import annotations

import json
import re
import resource
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

from atr_scale.cli import app
from atr_scale.errors import Failure, UserError
from atr_scale.inference import TrainedModel, load_trained
from atr_scale.search.index import IndexInfo, build_index
from atr_scale.search.nearest import Nearest, build_ivf
from atr_scale.search.query import Searcher
from atr_scale.search.vectors import Item, ModelId, Vectors
from tests.tiny_run import save_run, tiny_config

SENTENCES = [f"a {animal} {verb}" for animal in ("dog", "cat", "bird", "crow") for verb in ("barks", "sings", "calls")]


class World:
    """A run, the embeddings of 12 sounds in 6 recordings (the even ones have two windows each), and their index."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = tiny_config(folder, folder / "unused")
        self.run = save_run(self.config, folder / "run", seed=0)
        self.model: TrainedModel = load_trained(self.run)
        self.id = ModelId.of(self.run, self.model)
        rng = np.random.default_rng(0)
        self.waves = [rng.uniform(-0.5, 0.5, 8_000).astype(np.float32) for _ in range(8)]
        items, sounds = [], []
        for number in range(6):
            path = folder / f"clip {number}.wav"
            rate = self.model.sample_rate
            parts = rng.uniform(-0.5, 0.5, (2, rate)).astype(np.float32) * np.linspace(0, 1, rate, dtype=np.float32)
            soundfile.write(path, parts.ravel(), rate, subtype="FLOAT")
            captions = (SENTENCES[2 * number], SENTENCES[0])
            for part in range(2):
                start, stop = float(part), float(part + 1)
                items.append(Item(f"{path.name}#t={part},{part + 1}", str(path), start, stop, captions))
                sounds.append(parts[part])
        self.items = items
        self.vectors = Vectors(self.model.embed_audio(sounds, self.model.sample_rate), items, self.id)
        self.file, self.index = folder / "v.npy", folder / "index"
        self.vectors.write(self.file)
        self.info = build_index(self.run, self.file, self.index)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("search"))


@pytest.fixture(scope="module")
def searcher(world: World) -> Searcher:
    return Searcher(world.index)


def test_a_text_finds_what_all_scores_say(world: World, searcher: Searcher) -> None:
    hits = searcher.by_text(["a dog barks"], top=12, all_windows=True)[0]
    scores = world.vectors.vectors @ world.model.embed_text(["a dog barks"])[0]
    order = np.argsort(-scores, kind="stable")
    assert [hit.id for hit in hits] == [world.items[i].id for i in order]
    assert [hit.score for hit in hits] == pytest.approx(scores[order].tolist(), abs=1e-6)
    first = world.items[order[0]]
    assert (hits[0].path, hits[0].start, hits[0].stop) == (first.path, first.start, first.stop)
    assert hits[0].caption == first.captions[0]


def test_a_recording_is_found_once_by_its_best_window(searcher: Searcher) -> None:
    every = searcher.by_text(["a dog barks"], top=99, all_windows=True)[0]
    for top in (1, 4, 99):
        hits = searcher.by_text(["a dog barks"], top)[0]
        assert len({hit.path for hit in hits}) == len(hits) == min(top, 6)
        best: dict[str, Any] = {}
        for hit in every:
            best.setdefault(hit.path, hit)
        assert hits == list(best.values())[:top]


def test_a_sound_finds_itself_and_captions(world: World, searcher: Searcher) -> None:
    wave, rate = soundfile.read(world.items[6].path, dtype="float32")
    hit = searcher.by_audio([wave[:rate]], top=1, sample_rate=rate)[0][0]
    assert hit.id == world.items[6].id and hit.score == pytest.approx(1, abs=1e-5)
    texts = searcher.by_text([SENTENCES[4]], captions=True)[0]
    assert texts[0].caption == SENTENCES[4] and texts[0].id == world.items[4].id
    found = [hit.caption for hit in searcher.by_audio([wave], top=99, sample_rate=rate, captions=True)[0]]
    assert len(found) == len(set(found)) == 6, "a caption of several sounds is one result"


def test_threads_find_the_same(searcher: Searcher) -> None:
    queries = SENTENCES * 3
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda text: searcher.by_text([text])[0], queries))
    assert found == [searcher.by_text([text])[0] for text in queries]


def test_an_index_can_be_moved_and_is_built_the_same(world: World, searcher: Searcher, tmp_path: Path) -> None:
    shutil.copytree(world.index, tmp_path / "elsewhere")
    assert Searcher(tmp_path / "elsewhere").by_text(["rain"]) == searcher.by_text(["rain"])
    build_index(world.run, world.file, tmp_path / "again")
    for file in world.index.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name


def test_an_empty_table_is_one_line(world: World, tmp_path: Path) -> None:
    build_index(world.run, world.file, tmp_path / "index")
    (tmp_path / "index" / "vectors.table.npy").write_bytes(b"")
    with pytest.raises(UserError, match=r"cannot be read .*: build the index again"):
        Searcher(tmp_path / "index").by_text(["rain"])


def test_another_model_is_refused_by_name(world: World, tmp_path: Path) -> None:
    other = save_run(world.config, tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=r"v\.npy holds vectors of the model .*run.*not of .*other.*step-3"):
        build_index(other, world.file, tmp_path / "index")
    assert not (tmp_path / "index").exists()
    with pytest.raises(UserError, match=r"index holds vectors of the model .*not of .*other.*build the index again"):
        Searcher(world.index, run=other)
    moved = tmp_path / "moved"
    shutil.copytree(world.run, moved, symlinks=True)
    assert Searcher(world.index, run=moved).info == world.info
    document = json.loads((world.index / "index.json").read_text())
    shutil.copytree(world.index, tmp_path / "lost")
    document["model"]["run"] = str(tmp_path / "gone")
    (tmp_path / "lost" / "index.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"no checkpoint at .*gone.*--run"):
        Searcher(tmp_path / "lost")


def test_an_index_goes_on_with_its_own_checkpoint_until_the_run_removes_it(world: World, tmp_path: Path) -> None:
    run, index = tmp_path / "run", tmp_path / "index"
    save_run(world.config, run, seed=0)
    build_index(run, world.file, index)
    newer = save_run(world.config, tmp_path / "newer", seed=1) / "checkpoints" / "step-3"
    newer.rename(run / "checkpoints" / "step-9")
    (run / "best").unlink()
    (run / "best").symlink_to(Path("checkpoints") / "step-9")
    assert np.array_equal(Searcher(index).model.embed_text(["rain"]), world.model.embed_text(["rain"]))
    shutil.move(run / "checkpoints" / "step-3", tmp_path / "copy")
    message = (
        r"index holds vectors of step-3, which .*run no longer has: build the index again with that run, or name a copy"
    )
    with pytest.raises(UserError, match=message):
        Searcher(index)
    with pytest.raises(UserError, match=r"not of .*step-9.*build the index again"):
        Searcher(index, run=run)
    assert Searcher(index, run=tmp_path / "copy").info.model.step == world.id.step


def test_a_pairwise_scorer_has_no_index(world: World, tmp_path: Path) -> None:
    tap = save_run(world.config, tmp_path / "tap", 0, "tap")
    able = "pooled, mean, max, meanmax, netrvlad, attention"
    for verb, out in (("embed", "v.npy"), ("index", "index")):
        refused = CliRunner().invoke(app, [verb, str(tap), str(tmp_path), "--out", str(tmp_path / out)])
        assert isinstance(refused.exception, UserError) and "\n" not in str(refused.exception)
        assert re.search(rf"pairwise.*another scorer \({able}\).*--rerank", str(refused.exception))
    assert not (tmp_path / "v.npy.parts").exists() and not (tmp_path / "index").exists()


def test_a_killed_build_leaves_no_index(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "index"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(IndexInfo, "write", die)
        build_index(world.run, world.file, out)
    assert not out.exists()
    (tmp_path / ".index.partial" / "vectors.ivf.0").write_text("of a build that was killed")
    build_index(world.run, world.file, out)
    (out / "relevance.csv").write_text("marks")
    before = sorted((path.name, path.read_bytes()) for path in out.iterdir())
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(IndexInfo, "write", die)
        build_index(world.run, world.file, out)
    assert sorted((path.name, path.read_bytes()) for path in out.iterdir()) == before
    build_index(world.run, world.file, out)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]
    assert (out / "relevance.csv").read_text() == "marks", "what others keep in the folder survives a new build"


def test_mistakes_are_one_line(world: World, searcher: Searcher, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give a text that is not empty"):
        searcher.by_text([" "])
    with pytest.raises(UserError, match="top = 0"):
        searcher.by_text(["rain"], top=0)
    with pytest.raises(UserError, match="is no index"):
        Searcher(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="exists and is no index"):
        build_index(world.run, world.file, tmp_path / "mine")
    values = world.vectors.vectors.copy()
    values[5, 3] = np.nan
    replace(world.vectors, vectors=values).write(tmp_path / "nan.npy")
    with pytest.raises(UserError, match=r"clip 2\.wav#t=1,2 is not finite"):
        build_index(world.run, tmp_path / "nan.npy", tmp_path / "index")
    plain = [replace(item, captions=()) for item in world.items]
    replace(world.vectors, items=plain).write(tmp_path / "plain.npy")
    build_index(world.run, tmp_path / "plain.npy", tmp_path / "index")
    silent = Searcher(tmp_path / "index")
    assert silent.by_text(["rain"])[0][0].caption is None
    with pytest.raises(UserError, match="has no captions: index a source with captions"):
        silent.by_text(["rain"], captions=True)


def test_inverted_lists_reach_their_recall(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((40, 16))
    vectors = (centres[rng.integers(40, size=3000)] + 0.6 * rng.standard_normal((3000, 16))).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    texts = vectors[:50] + 0.2 * rng.standard_normal((50, 16)).astype(np.float32)
    lists = build_ivf(vectors, tmp_path / "v.ivf", texts)
    assert set(lists.recall) == {"sounds", "captions"} and min(lists.recall.values()) >= 0.95
    assert 1 <= lists.nprobe < lists.nlist == 62
    (tmp_path / "moved").mkdir()
    for file in tmp_path.glob("v.ivf*"):
        file.rename(tmp_path / "moved" / file.name)
    ivf = Nearest(vectors, (tmp_path / "moved" / "v.ivf", lists.nprobe))
    scores, found = ivf.search(texts, 10)
    right = np.argsort(-(texts @ vectors.T), axis=1, kind="stable")[:, :10]
    share = np.mean([np.isin(right[i], found[i]).mean() for i in range(50)])
    assert share == pytest.approx(lists.recall["captions"], abs=0.03)
    assert np.allclose(scores[3], vectors[found[3]] @ texts[3], atol=1e-5)


def test_an_index_that_cannot_be_written_is_one_line(world: World, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # bytes of a file, as little as on a full disk
    try:
        with pytest.raises(Failure, match=r"cannot write .*index \(.+\): start the same command again"):
            build_index(world.run, world.file, tmp_path / "index")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert build_index(world.run, world.file, tmp_path / "index") == world.info
    (tmp_path / "v.ivf.0").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        build_ivf(world.vectors.vectors, tmp_path / "v.ivf")


def test_a_large_index_is_searched_by_lists(world: World, searcher: Searcher, tmp_path: Path) -> None:
    copies = [replace(item, id=f"{item.id} {n}") for n in range(20) for item in world.items]
    vectors = np.tile(world.vectors.vectors, (20, 1))
    Vectors(vectors, copies, world.id).write(tmp_path / "v.npy")
    info = build_index(world.run, tmp_path / "v.npy", tmp_path / "index", flat_max=100)
    assert info == IndexInfo.read(tmp_path / "index") and info.sets["vectors"].lists is not None
    assert info.sets["captions"].lists is None and "recall@10" in str(info.sets["vectors"])
    hits = Searcher(tmp_path / "index").by_text(["a dog barks"], top=2)[0]
    assert [hit.path for hit in hits] == [hit.path for hit in searcher.by_text(["a dog barks"], top=2)[0]]


def test_a_pairwise_scorer_reranks_candidates(world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tap = save_run(world.config, tmp_path / "tap", 0, "tap")
    judge = load_trained(tap)
    both = Searcher(world.index, rerank=tap, candidates=4)
    first = Searcher(world.index).by_text(["a dog barks"], 4, all_windows=True)[0]
    hits = both.by_text(["a dog barks"], 3, all_windows=True)[0]
    sounds = [soundfile.read(hit.path, dtype="float32")[0] for hit in first]
    rate = world.model.sample_rate
    parts = [sound[int(hit.start or 0) * rate :][:rate] for sound, hit in zip(sounds, first, strict=True)]
    scores = judge.similarity(["a dog barks"], parts, rate)[0]
    order = np.argsort(-scores, kind="stable")
    assert [hit.id for hit in hits] == [first[i].id for i in order[:3]]
    assert [hit.score for hit in hits] == pytest.approx(scores[order[:3]].tolist(), abs=1e-5)
    texts = both.by_audio([parts[0]], 2, rate, captions=True)[0]
    assert texts[0].score == pytest.approx(judge.similarity([str(texts[0].caption)], [parts[0]], rate)[0, 0], abs=1e-5)
    with pytest.raises(UserError, match="needs a sound on one side"):
        both.by_text(["rain"], captions=True)
    with pytest.raises(UserError, match="needs a text on one side"):
        both.by_audio([parts[0]], sample_rate=rate)
    lost = Path(hits[0].path)
    with caplog.at_level("WARNING"):
        lost.rename(tmp_path / "elsewhere.wav")
        try:
            left = both.by_text(["a dog barks"], 4)[0]
        finally:
            (tmp_path / "elsewhere.wav").rename(lost)
    assert len(left) == 3 and str(lost) not in [hit.path for hit in left] and str(lost) in caplog.text


def test_a_source_is_embedded_and_a_killed_build_goes_on(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sounds = tmp_path / "sounds"
    sounds.mkdir()
    for path in sorted({item.path for item in world.items})[:3]:
        shutil.copy(path, sounds)
    out = tmp_path / "index"

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(IndexInfo, "write", die)
        build_index(world.run, sounds, out, windows=1.0)
    shutil.copy(world.items[-1].path, sounds)  # the source has changed since
    assert build_index(world.run, sounds, out, windows=1.0).sets["vectors"].count == 8
    wave, rate = soundfile.read(world.items[-1].path, dtype="float32")
    hit = Searcher(out).by_audio([wave[rate:]], top=1, sample_rate=rate)[0][0]
    assert (Path(hit.path).name, hit.start, hit.stop) == (Path(world.items[-1].path).name, 1.0, 2.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "sounds"]
    with pytest.raises(UserError, match="holds vectors already"):
        build_index(world.run, world.file, out, windows=1.0)


def test_the_verbs(world: World, searcher: Searcher, tmp_path: Path) -> None:
    out = tmp_path / "index"
    built = CliRunner().invoke(app, ["index", str(world.run), str(world.file), "--out", str(out)])
    assert built.exit_code == 0 and "12 vectors, flat search" in built.output, built.output
    shown = CliRunner().invoke(app, ["search", str(out), "a dog barks", "--top", "3"])
    lines = shown.output.splitlines()
    hits = searcher.by_text(["a dog barks"], 3)[0]
    assert len(lines) == 4 and hits[0].path in lines[1] and f"{hits[0].score:.4f}" in lines[1]
    assert f"0:{hits[0].start:02.0f}-0:{hits[0].stop:02.0f}" in lines[1]
    found = CliRunner().invoke(app, ["search", str(out), "--audio", world.items[0].path, "--json", "--top", "2"])
    answer = json.loads(found.stdout)
    assert list(answer) == ["query", "results"] and len(answer["results"]) == 2
    assert list(answer["results"][0]) == ["id", "score", "path", "start", "stop", "caption"]
    for wrong in (["search", str(out)], ["search", str(out), "rain", "--audio", "x.wav"]):
        assert "give one query" in str(CliRunner().invoke(app, wrong).exception)
