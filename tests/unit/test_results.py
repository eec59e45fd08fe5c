"""What an evaluation leaves in a run folder: results.json, facts of the queries, predictions.csv."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from atr_scale.config import RunConfig
from atr_scale.data.sample import RawSample
from atr_scale.distributed.world import World
from atr_scale.errors import UserError
from atr_scale.evaluation.evaluate import Evaluation, evaluate_run
from atr_scale.evaluation.facts import Facts, clip_fields
from atr_scale.evaluation.metrics import bootstrap
from atr_scale.evaluation.report import write_report
from atr_scale.evaluation.result import EvaluationResult, evaluate_retrieval
from atr_scale.evaluation.results import config_digest, read_results, record_results, record_training
from atr_scale.evaluation.retrieval_scores import ScoreMatrix
from atr_scale.run_checkpoints import STATE
from tests.tiny_run import save_run, tiny_config


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("results")
    return tiny_config(folder, folder / "run")


@pytest.fixture(scope="module")
def evaluated(config: RunConfig) -> tuple[Path, Evaluation]:
    run = save_run(config, Path(config.run.dir), seed=0)
    (run / "best" / STATE).write_text('{"step": 3}')
    found = evaluate_run(str(run), split="validation", world=World(), device=torch.device("cpu"))
    return run, found


def test_an_evaluation_is_recorded_in_one_schema(evaluated: tuple[Path, Evaluation], config: RunConfig) -> None:
    run, found = evaluated
    table = json.loads((run / "results.json").read_text())
    assert (table["schema"], table["run"], table["seed"]) == (1, "run", 0)
    assert table["config_digest"] == config_digest(config.model_dump(mode="json"))
    (entry,) = table["results"]
    named = {key: entry[key] for key in ("split", "checkpoint", "step", "kind", "method", "counts", "file")}
    assert named == {
        "split": "validation",
        "checkpoint": "best",
        "step": 3,
        "kind": "retrieval",
        "method": "every pair scored",
        "counts": {"clips": 11, "captions": 11},
        "file": "evaluation-validation.json",
    }
    low, high = found.results[0].intervals["t2a/mAP"]
    assert entry["metrics"]["t2a/mAP"] == {"value": found.metrics["t2a/mAP"], "low": low, "high": high}
    assert set(entry["metrics"]) == set(found.metrics)


def test_facts_of_the_queries_lie_beside_their_ranks(evaluated: tuple[Path, Evaluation]) -> None:
    run, found = evaluated
    facts = EvaluationResult.load(run / "evaluation-validation.json").facts
    assert facts is not None
    assert facts.clip_ids.tolist() == found.embedded.clip_ids
    assert facts.caption_words.tolist() == [len(caption.split()) for caption in found.embedded.captions]
    assert facts.fields["duration"].tolist() == [1.0] * 11
    assert set(facts.fields["corpus"].tolist()) == {"corpus"}


def test_predictions_have_the_columns_of_dcase(evaluated: tuple[Path, Evaluation]) -> None:
    run, found = evaluated
    with (run / "predictions-validation.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["caption", *(f"fname_{place}" for place in range(1, 11))]
    text, audio = found.embedded.text.pooled, found.embedded.audio.pooled
    names = [clip.removeprefix("corpus/") for clip in found.embedded.clip_ids]
    for caption, row, scores in zip(found.embedded.captions, rows, (text @ audio.T).numpy(), strict=True):
        assert row == [caption, *(names[clip] for clip in np.argsort(-scores, kind="stable")[:10])]


def test_a_relevance_file_gives_16_columns_and_its_own_fingerprint(
    evaluated: tuple[Path, Evaluation], tmp_path: Path
) -> None:
    run, found = evaluated
    listed = tmp_path / "relevance.csv"
    rows = [f"{caption},tone-1.wav;tone-{number}.wav" for number, caption in enumerate(found.embedded.captions)]
    listed.write_text("\n".join(["query,audio_filenames", *rows]) + "\n")
    out = tmp_path / "out"
    again = evaluate_run(
        str(run), split="test", shards=str(run.parent / "validation" / "shards"), out=out, relevance=listed,
        world=World(), device=torch.device("cpu"),
    )  # fmt: skip
    assert (out / "predictions.csv").read_text().startswith("caption,fname_1,")
    assert "fname_11" in (out / "predictions.csv").read_text() and not (run / "predictions.csv").exists()
    table, first = read_results(out), read_results(run)
    assert table is not None and first is not None and table["run"] == "run"
    sets = [one["results"][0]["test_set"] for one in (first, table)]
    assert [one["clips"] for one in sets] == [sets[0]["clips"]] * 2 and sets[0]["relevance"] is None
    assert sets[1]["relevance"]
    # The list's mAP@16 has an interval of its own, not that of the pairs.
    loaded = EvaluationResult.load(out / "evaluation-test.json")
    assert loaded.metrics["t2a/mAP@16"] != found.metrics["t2a/mAP@16"]
    assert bootstrap(loaded.ranks) == loaded.intervals == again.results[0].intervals
    low, high = loaded.intervals["t2a/mAP@16"]
    assert low <= loaded.metrics["t2a/mAP@16"] <= high
    assert "mAP@16, several relevant clips" in write_report(out).read_text()


def retrieval(split: str, step: int) -> EvaluationResult:
    ids = np.arange(4)
    scores = ScoreMatrix(np.eye(4, dtype=np.float32))
    return evaluate_retrieval(split, step, scores, scores.ranks(ids, ids), list("abcd"), list("ABCD"))


def test_training_keeps_the_best_and_the_last_step(config: RunConfig, tmp_path: Path) -> None:
    record_training(tmp_path, config, 0, 30)
    for step, best in ((10, True), (20, False)):
        for checkpoint in ("best", "last") if best else ("last",):
            found = [retrieval("validation", step)]
            record_results(tmp_path, "run", config, found, checkpoint=checkpoint, saved=checkpoint == "best")

    def entries() -> list[tuple[Any, ...]]:
        table = read_results(tmp_path)
        assert table is not None
        return [(entry["split"], entry["checkpoint"], entry["step"], entry["file"]) for entry in table["results"]]

    file = "evaluation-validation.json"
    assert entries() == [("validation", "best", 10, file), ("validation", "last", 20, None)]
    record_results(tmp_path, "run", config, [retrieval("validation", 10)], checkpoint="step-10", saved=True)
    assert entries() == [("validation", "last", 20, None), ("validation", "step-10", 10, file)], "one owner of the file"
    record_training(tmp_path, config, 15, 30)  # killed, and continued from step 15
    assert entries() == [("validation", "step-10", 10, file)]
    table = read_results(tmp_path)
    assert table is not None and table["training"] == {"step": 15, "steps": 30}


def test_seed_and_folder_are_not_part_of_the_digest(config: RunConfig) -> None:
    values = config.model_dump(mode="json")
    other = {**values, "run": {**values["run"], "dir": "elsewhere", "seed": 7}}
    assert config_digest(other) == config_digest(values)
    assert config_digest({**values, "plugins": ["other"]}) != config_digest(values)


def test_damaged_and_newer_results_are_one_line(tmp_path: Path) -> None:
    assert read_results(tmp_path) is None
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(UserError, match=r"results\.json is damaged"):
        read_results(tmp_path)
    (tmp_path / "results.json").write_text('{"schema": 9}')
    with pytest.raises(UserError, match="schema 9 instead of 1"):
        read_results(tmp_path)


def test_results_of_version_0_2_are_read(tmp_path: Path) -> None:
    path = retrieval("test", 5).save(tmp_path)
    table = json.loads(path.read_text())
    del table["test_set"]
    table["metrics"] = {key: value for key, value in table["metrics"].items() if not key.endswith(("@16", "mAP"))}
    path.write_text(json.dumps(table))
    loaded = EvaluationResult.load(path)
    assert loaded.facts is None and loaded.metrics["a2t/mAP"] == 1.0
    assert "| mAP | 100.0 %" in write_report(tmp_path).read_text()


def test_fields_are_numbers_or_short_texts() -> None:
    meta = {"snr": "12.5", "scene": "park", "title": "x" * 81, "tags": ["a"], "start_time": 3, "empty": None}
    sample = RawSample("k", "c/1", ["a b c"], "dog", b"", "wav", None, meta)
    assert clip_fields(sample, 2.5) == {
        "duration": 2.5, "snr": "12.5", "scene": "park", "start_time": 3, "label": "dog",
    }  # fmt: skip
    facts = Facts.of(["c/1", "c/2"], ["a b", "c d e"], [clip_fields(sample, 2.5), {"scene": "7", "duration": 1}])
    assert facts.fields["snr"][0] == 12.5 and np.isnan(facts.fields["snr"][1])
    assert facts.fields["scene"].tolist() == ["park", "7"] and facts.fields["label"].tolist() == ["dog", ""]
    assert facts.caption_words.tolist() == [2, 3]


def test_fingerprints_do_not_depend_on_the_order() -> None:
    fields: list[dict[str, Any]] = [{}, {}, {}]
    clips, captions, clip = ["c/1", "c/2", "c/3"], ["a", "b", "c", "d"], np.array([0, 0, 1, 2])
    grades = np.arange(12).reshape(4, 3) / 12
    one = Facts.of(clips, captions, fields).test_set(clip, grades)
    order, texts = [2, 0, 1], [3, 1, 0, 2]
    shuffled = Facts.of([clips[k] for k in order], [captions[k] for k in texts], fields)
    assert shuffled.test_set(np.array([0, 1, 1, 2]), grades[texts][:, order]) == one
    assert shuffled.test_set(np.array([0, 1, 2, 2]), grades[texts][:, order])["captions"] != one["captions"]
    assert shuffled.test_set(np.array([0, 1, 1, 2]), grades)["relevance"] != one["relevance"]
