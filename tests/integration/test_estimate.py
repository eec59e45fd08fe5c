"""atr-scale estimate on tiny inputs, from runs to tables to a second stage of training."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from atr_scale import cli
from atr_scale.checkpoint import load_retriever
from atr_scale.data.options import FoldsSection
from atr_scale.data.shard_reader import open_shards
from atr_scale.evaluation.embed import embed
from atr_scale.evaluation.metrics import retrieval_metrics
from atr_scale.evaluation.parallel import Parallel
from atr_scale.teachers.tables import TeacherTable
from tests.distributed.test_evaluation import write_split
from tests.tiny import read_training
from tests.tiny_run import save_run, tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
RUNS = {"first": "meanmax", "second": "mean", "third": "tap"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """run.yaml, three trained models in their run folders, and their tables."""
    place = tmp_path_factory.mktemp("estimate")
    config = tiny_config(place / "inputs", place / "run")
    (place / "run.yaml").write_text(config.to_yaml())
    write_split(place / "sounds", labelled=False)
    for seed, (name, scorer) in enumerate(RUNS.items()):
        save_run(config, place / "runs" / name, seed, scorer)
    with pytest.MonkeyPatch.context() as patch:
        call(patch, place, *ESTIMATE)
    return place


ESTIMATE = ("estimate", *(f"runs/{name}" for name in RUNS), "--shards", "inputs/train/shards", "--out", "tables")


def call(monkeypatch: pytest.MonkeyPatch, place: Path, *line: str) -> int:
    """`atr-scale LINE` in `place`; its exit code."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["atr-scale", *line])
    try:
        cli.main()
    except SystemExit as left:
        return int(left.code or 0)
    return 0


def start(place: Path, *line: str) -> None:
    """Training in a process of its own, for DeepSpeed starts once in each."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "atr_scale.train", *line]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


def table(place: Path, name: str) -> TeacherTable:
    return TeacherTable.read(place / "tables" / f"{name}.safetensors")


def figures(place: Path) -> dict[str, Any]:
    return json.loads((place / "tables" / "estimate.json").read_text())


def test_tables_hold_what_the_models_say(place: Path) -> None:
    shards = open_shards(str(place / "inputs" / "train" / "shards"))
    for name, scorer in RUNS.items():
        model, config, folder = load_retriever(place / "runs" / name)
        embedded = embed(model.eval(), shards, config, Parallel())
        found = table(place, name)
        with torch.no_grad():
            pairwise = scorer == "tap"
            text, audio = embedded.text, embedded.audio
            want = model.scorer.scores(text, audio) if pairwise else text.pooled @ audio.pooled.T
        assert found.is_dual_encoder != pairwise and want.shape == (40, 40)
        assert all(value.dtype == torch.float16 for value in found.values.values())
        everything = torch.arange(40)
        torch.testing.assert_close(found.scores(everything, everything), want, rtol=0, atol=2e-3)
        assert found.metadata["scorer"] == scorer
        assert [source.location for source in found.sources] == ["inputs/train/shards"]
        assert found.metadata["config"] == (folder / "config.resolved.yaml").read_text()


def test_figures_of_members_ensemble_and_what_each_adds(place: Path) -> None:
    """Against numpy on the whole matrices."""
    found, everything = figures(place), torch.arange(40)
    matrices = {name: table(place, name).scores(everything, everything).numpy() for name in RUNS}
    ids = table(place, "first").clip_ids

    def metrics(*names: str) -> dict[str, float]:
        return retrieval_metrics(np.mean([matrices[name] for name in names], 0), ids, ids)

    for name in RUNS:
        others = [other for other in RUNS if other != name]
        for got, want in ((found["models"][name], metrics(name)), (found["without"][name], metrics(*others))):
            assert got == pytest.approx(want, abs=1e-9)
    assert found["ensemble"] == pytest.approx(metrics(*RUNS), abs=1e-9)
    flat = np.stack([matrix.ravel() for matrix in matrices.values()])
    apart = ~np.eye(40, dtype=bool).ravel()
    assert np.allclose(found["correlation"], np.corrcoef(flat), atol=1e-6)
    assert np.allclose(found["unmatched"], np.corrcoef(flat[:, apart]), atol=1e-6)
    assert (found["num_pairs"], found["num_clips"], found["measured_clips"]) == (1600, 40, 40)
    assert found["tables"]["second"]["weights_sha256"] == table(place, "second").metadata["weights_sha256"]


def test_report_and_picture(place: Path) -> None:
    text = (place / "tables" / "report.md").read_text()
    for words in ("| first ", "| **all** ", "| all but third ", "| first | second | ", "What each model adds"):
        assert words in text
    assert (place / "tables" / "figures" / "correlation.png").stat().st_size > 5000


def test_tables_that_fit_are_kept_and_others_written_anew(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(place / "runs", place / "again" / "runs", symlinks=True)
    shutil.copytree(place / "tables", place / "again" / "tables")
    (place / "again" / "inputs").symlink_to(place / "inputs")
    again = place / "again"
    paths = {name: again / "tables" / f"{name}.safetensors" for name in RUNS}
    save_run(tiny_config(place / "inputs", place / "run"), again / "runs" / "second", 7, "mean")
    paths["third"].write_bytes(paths["third"].read_bytes()[:-9])
    before = {name: path.stat().st_mtime_ns for name, path in paths.items()}
    old = figures(again)
    assert call(monkeypatch, again, *ESTIMATE) == 0
    out = capsys.readouterr().out
    assert "| first " in out and "t2a/mAP@10" in out and "| **all** " in out
    assert {name for name, path in paths.items() if path.stat().st_mtime_ns != before[name]} == {"second", "third"}
    new = figures(again)
    assert new["models"]["first"] == old["models"]["first"] and new["models"]["third"] == old["models"]["third"]
    assert new["correlation"] != old["correlation"]


def test_mistakes_are_one_line(place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    distil = ("train", "run.yaml", "run.dir=runs/mistake", "objective.distillation.weight=1")
    lines = {
        ("estimate", "nowhere", *ESTIMATE[4:]): "no checkpoint at nowhere",
        ("estimate", "runs/first", "--shards", "nowhere", "--out", "x"): "no shards in nowhere",
        ("estimate", "runs/first", "runs/first", *ESTIMATE[4:]): "would both write the teacher table first",
        ("estimate", "runs/first", "--shards", "inputs/train/shards", "--out", "run.yaml"): "cannot create run.yaml",
        (*distil, "objective.distillation.tables=[nowhere.safetensors]"): "no teacher table at nowhere",
        (*distil, "objective.distillation.tables=[run.yaml]"): "run.yaml is damaged",
        (
            *distil,
            "objective.distillation.tables=[tables/first.safetensors]",
            "data.train[0].shards=sounds/shards",
        ): "is not in the teacher tables (first): run `atr-scale estimate`",
    }
    for line, words in lines.items():
        assert call(monkeypatch, place, *line) == 2, line
        said = capfd.readouterr().err
        (error,) = [text for text in said.splitlines() if text.startswith("error: ")]
        assert words in error and "Traceback" not in said
    assert not (place / "runs" / "mistake" / "checkpoints").exists()


def test_second_stage_learns_from_the_tables_and_resumes(place: Path) -> None:
    """An ensemble as teacher from the best weights of the first stage; a resumed run goes on as if undisturbed."""
    listed = ",".join(f"tables/{name}.safetensors" for name in RUNS)
    line = (
        "run.yaml",
        "run.dir=runs/stage2",
        "data.validation=null",
        "objective.nt_xent.weight=0",
        "objective.distillation.weight=1",
        f"objective.distillation.tables=[{listed}]",
        "train.initial_checkpoint=runs/first",
        "train.checkpoint_every=3",
    )
    start(place, *line)
    run = place / "runs" / "stage2"
    whole = read_training(run)
    assert len(whole) == 6 and {"loss", "loss/distillation"} <= whole[0].keys() and "loss/nt_xent" not in whole[0]
    end = load_file(run / "latest" / "model.safetensors")
    shutil.rmtree(run / "checkpoints" / "step-6")
    start(place, *line)
    found = read_training(run)
    assert [step["loss"] for step in found] == [step["loss"] for step in whole]
    assert all(torch.equal(value, end[name]) for name, value in load_file(run / "latest/model.safetensors").items())


def test_one_model_is_self_distillation(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(monkeypatch, place, *ESTIMATE[:2], *ESTIMATE[4:6], "--out", "alone") == 0
    found = json.loads((place / "alone" / "estimate.json").read_text())
    assert found["without"] == {} and found["ensemble"] == found["models"]["first"]
    assert "Correlation" not in (place / "alone" / "report.md").read_text()


def test_one_table_for_several_shard_sets(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """All scores of a dual encoder, the best of a pairwise scorer; a dry run finds a teacher for every clip of both."""
    both = ("--shards", "inputs/train/shards", "--shards", "sounds/shards")
    assert call(monkeypatch, place, "estimate", "runs/first", "runs/third", *both, "--out", "both", "--top-k", "8") == 0
    vectors, best = (TeacherTable.read(place / "both" / f"{name}.safetensors") for name in ("first", "third"))
    for found in (vectors, best):
        assert [(source.location, source.clips) for source in found.sources] == [(both[1], 40), (both[3], 11)]
        assert len(found.clip_ids) == 51 and len(found.caption_clip) == 40 + 21
    assert vectors.is_dual_encoder and best.values["caption_best"].shape == (61, 8)
    every = torch.arange(40)
    whole, some = table(place, "third").scores(every, every), best.scores(every, every)
    same = (some - whole).abs() < 2e-3
    assert same.sum() >= 40 * 4 and (whole[~same] < whole[same].mean()).float().mean() > 0.8
    assert call(monkeypatch, place, "estimate", "runs/third", *both, "--out", "both") == 0  # all scores: written anew
    assert TeacherTable.read(place / "both" / "third.safetensors").values["scores"].shape == (61, 51)
    capfd.readouterr()
    distil = (
        "train",
        "run.yaml",
        "--dry-run",
        "objective.distillation.weight=1",
        "data.train=[{shards: inputs/train/shards}, {shards: sounds/shards}]",
    )
    assert call(monkeypatch, place, *distil, "objective.distillation.tables=[both/first.safetensors]") == 0
    said = capfd.readouterr().out
    assert "teachers    inputs/train/shards: all 40 clips" in said and "sounds/shards: all 11 clips have a tea" in said
    skip = ("objective.distillation.tables=[tables/first.safetensors]", "objective.distillation.missing=skip")
    assert call(monkeypatch, place, *distil, *skip) == 0
    said = capfd.readouterr().out
    assert "teachers    sounds/shards: 11 of 11 clips have no teacher, their pairs are left out of distillation" in said


def test_cross_fitted_teachers_of_a_run_that_also_trains_on_clips_without_one(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two members that each left out a fold become one table; the second stage has further clips without a teacher."""
    config = tiny_config(place / "inputs", place / "run")
    for held_out in (0, 1):
        config.data.folds = FoldsSection(count=2, held_out=held_out)
        save_run(config, place / "runs" / f"without{held_out}", 20 + held_out, "mean")
    line = ("--cross-fit", "--shards", "inputs/train/shards", "--out", "crossed")
    assert call(monkeypatch, place, "estimate", "runs/without1", "runs/first", *line) == 2
    assert "first was trained on all clips (data.folds is null)" in capfd.readouterr().err
    assert call(monkeypatch, place, "estimate", "runs/without1", "runs/without0", *line) == 0
    assert "| cross_fit " in capfd.readouterr().out
    assert json.loads((place / "crossed" / "estimate.json").read_text())["tables"].keys() == {"cross_fit"}
    crossed, *members = (
        TeacherTable.read(place / "crossed" / f"{name}.safetensors") for name in ("cross_fit", "without0", "without1")
    )
    fold, every = crossed.values["clip_fold"], torch.arange(40)
    t2a = torch.stack([members[fold[row]].scores(every, every)[row] for row in range(40)])
    torch.testing.assert_close(crossed.scores(every, every), t2a)
    start(
        place,
        "run.yaml",
        "run.dir=runs/crossed",
        "data.validation=null",
        "data.train=[{shards: inputs/train/shards}, {shards: sounds/shards}]",
        "objective.nt_xent.weight=0",
        "objective.distillation={weight: 1, tables: [crossed/cross_fit.safetensors], missing: skip, t2a_share: 0.25}",
    )
    losses = [line["loss/distillation"] for line in read_training(place / "runs" / "crossed")]
    assert len(losses) == 6 and all(0 < loss < 3 for loss in losses)
