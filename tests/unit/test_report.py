"""Evaluation results on disk, and the report made from a run folder."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from atr_scale import plots
from atr_scale.errors import UserError
from atr_scale.evaluation.metrics import retrieval_metrics
from atr_scale.evaluation.report import write_report
from atr_scale.evaluation.result import EvaluationResult, evaluate_labelled, evaluate_retrieval
from atr_scale.evaluation.retrieval_scores import ScoreMatrix
from atr_scale.evaluation.sounds import sound_path

NUM_CLIPS = 40


def of_matrix(
    split: str,
    step: int,
    matrix: np.ndarray,
    captions: list[str],
    names: list[str],
    owner: np.ndarray,
    ids: np.ndarray,
) -> EvaluationResult:
    scores = ScoreMatrix(matrix)
    return evaluate_retrieval(split, step, scores, scores.ranks(owner, ids), captions, names)


def retrieval_result(split: str = "test", caption: str = "a dog | barks <b>at</b> $5_\n`night`") -> EvaluationResult:
    generator = np.random.default_rng(0)
    audio = generator.normal(size=(NUM_CLIPS, 16))
    text = np.repeat(audio, 5, axis=0) + generator.normal(size=(NUM_CLIPS * 5, 16))
    captions = [f"{caption} {number}" for number in range(len(text))]
    names = [f"demo/{number}.wav" for number in range(NUM_CLIPS)]
    ids = np.arange(NUM_CLIPS) * 3
    return of_matrix(split, 100, (text @ audio.T).astype(np.float32), captions, names, np.repeat(ids, 5), ids)


def labelled_result() -> EvaluationResult:
    labels = np.repeat(np.arange(6), 4)
    scores = (labels[None] == np.arange(6)[:, None]) + np.random.default_rng(1).normal(size=(6, 24)) * 0.4
    captions = [f"the sound of class {number}" for number in range(6)]
    return evaluate_labelled("esc50/fold5", 100, scores, captions, [f"esc50/{n}" for n in range(24)], labels)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "my run"
    run.mkdir()
    (run / "tensorboard").mkdir()
    lines: list[dict[str, object]] = []
    for step in range(1, 61):
        line: dict[str, object] = {"kind": "train", "step": step, "loss": 4 / step, "loss/nt_xent": 3 / step}
        line |= {"loss/prior": 1 / step, "lr/audio": 1e-4, "lr/heads": 1e-3, "temperature": 0.07, "grad_norm": 1.5}
        line |= {
            "samples_per_s": 80.0,
            "data_wait": 0.05,
            "memory_gb": 1.25,
            "samples_seen": step * 64.0,
            "epoch": step / 8,
            "dropped/silent_audio": step // 20,
        }
        line |= {"dropped/cut_shard": 0, "skipped_steps": int(step > 30)}
        if step == 31:
            line |= {"loss": None, "nonfinite": ["loss"]}
        lines.append(line)
        if step % 20 == 0:
            lines.append({"kind": "evaluation", "step": step, "split": "validation", **retrieval_result().metrics})
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "train", "st'
    (run / "metrics.jsonl").write_text(text, encoding="utf-8")
    (run / "config.resolved.yaml").write_text("train:\n  lr: 0.0001\ndata:\n  train:\n  - location: shards/a|b\n")
    (run / "environment.json").write_text(json.dumps({"python": "3.11", "devices": ["one", "two"], "git": None}))
    retrieval_result().save(run)
    labelled_result().save(run)
    return run


@pytest.fixture(scope="module")
def report(run_dir: Path) -> str:
    with contextlib.chdir(run_dir.parent):
        return write_report(run_dir).read_text(encoding="utf-8")


def test_the_loss_figure_has_terms_without_their_directions() -> None:
    line = {"step": 1, "loss": 3.0, "loss/a": 1.0, "loss/b": 2.0, "loss/b/t2a": 1.9, "loss/b/a2t": 2.1}
    legend = plots.loss([line]).axes[0].get_legend()
    assert legend is not None and [text.get_text() for text in legend.get_texts()] == ["loss", "a", "b"]


@pytest.mark.parametrize("result", [retrieval_result("clotho/test"), labelled_result()], ids=["captions", "labels"])
def test_a_result_survives_the_disk(tmp_path: Path, result: EvaluationResult) -> None:
    path = result.save(tmp_path)
    assert path.name == f"evaluation-{result.split.replace('/', '-')}.json"
    loaded = EvaluationResult.load(path)
    for name in ("split", "step", "metrics", "intervals", "examples", "excerpt_names", "labelled", "num_clips"):
        assert getattr(loaded, name) == getattr(result, name), name
    for name in ("t2a", "a2t", "clip", "audio_ids"):
        np.testing.assert_array_equal(getattr(loaded.ranks, name), getattr(result.ranks, name))
    np.testing.assert_array_equal(loaded.excerpt, result.excerpt)


def test_a_result_of_another_format_is_refused(tmp_path: Path) -> None:
    path = retrieval_result().save(tmp_path)
    path.write_text(path.read_text().replace('"format": 2', '"format": 99'))
    with pytest.raises(UserError, match="format 99"):
        EvaluationResult.load(path)


@pytest.mark.parametrize("damaged", ["evaluation-test.json", "ranks-test.npz"])
def test_a_missing_or_damaged_result_is_told_in_one_line(tmp_path: Path, damaged: str) -> None:
    path = retrieval_result().save(tmp_path)
    assert [each.name for each in sorted(tmp_path.iterdir())] == ["evaluation-test.json", "ranks-test.npz"]
    content = (tmp_path / damaged).read_bytes()
    for change in (lambda file: file.write_bytes(content[: len(content) // 2]), Path.unlink):
        change(tmp_path / damaged)
        with pytest.raises(UserError, match=r"evaluation-test\.json or its ranks are missing or damaged"):
            EvaluationResult.load(path)


def test_examples_agree_with_the_ranks() -> None:
    result = retrieval_result()
    assert {example.direction for example in result.examples} == {"t2a", "a2t"}
    for example in result.examples:
        hits = [place for place, item in enumerate(example.retrieved, start=1) if item.hit]
        assert (hits[0] if hits else example.rank) == example.rank
        assert len(hits) > 0 or example.rank > len(example.retrieved)
        scores = [item.score for item in example.retrieved]
        assert scores == sorted(scores, reverse=True)


def test_examples_of_a_constant_model_follow_the_tie_rule() -> None:
    ids = np.arange(8)
    result = of_matrix("test", 0, np.zeros((8, 8)), list("abcdefgh"), list("ABCDEFGH"), ids, ids)
    assert [item.index for item in result.examples[-1].retrieved] == [0, 1, 2, 3, 4]
    assert [example.rank for example in result.examples if example.direction == "t2a"][-1] == 8


def test_the_excerpt_has_right_pairs_on_its_diagonal() -> None:
    ids = np.arange(100)
    scores = np.eye(100)[np.random.default_rng(0).permutation(100)]  # texts in another order than clips
    owner = scores.argmax(axis=1)
    result = of_matrix("test", 0, scores, [str(o) for o in owner], [str(i) for i in ids], owner, ids)
    np.testing.assert_array_equal(result.excerpt, np.eye(len(result.excerpt)))
    assert 1 < len(result.excerpt) < 100
    labelled = labelled_result()
    assert np.all(labelled.excerpt.argmax(axis=0) == np.arange(6))


def test_the_report_tells_everything(report: str, run_dir: Path) -> None:
    result, text = retrieval_result(), report
    low, high = result.intervals["t2a/R@1"]
    assert f"| R@1 | {100 * result.metrics['t2a/R@1']:.1f} % [{100 * low:.1f}, {100 * high:.1f}] |" in text
    assert f"test: {NUM_CLIPS} clips, {NUM_CLIPS * 5} captions" in text
    assert "zero-shot accuracy" in text
    assert "tensorboard --logdir 'my run' --host 127.0.0.1" in text
    assert "samples dropped: 3 × silent_audio" in text and "cut_shard" not in text
    assert "| pairs seen | 3,840 |" in text and "| epochs | 7.50 |" in text
    assert "optimizer steps skipped: 1" in text and "non-finite value: 1" in text
    assert "| train.lr | 0.0001 |" in text and "| data.train.0.location | shards/a\\|b |" in text
    assert "| devices | one, two |" in text
    assert str(run_dir.parent) not in text


def test_every_picture_of_the_report_is_there_and_not_blank(report: str, run_dir: Path) -> None:
    names = re.findall(r"!\[[^]]*]\(([^)]+)\)", report)
    wanted = (
        "loss",
        "curve-validation",
        "ranks-test",
        "similarity-test",
        "similarity-esc50-fold5",
        "schedule",
        "speed",
    )
    assert {Path(name).stem for name in names} == set(wanted)
    for name in names:
        picture = imread(run_dir / name)
        assert min(picture.shape[:2]) > 300 and picture[..., :3].std() > 0.02, name


def test_the_worst_misses_come_first_with_a_reason_and_their_sounds(tmp_path: Path) -> None:
    result = retrieval_result()
    for direction, ranks in (("t2a", result.ranks.t2a), ("a2t", result.ranks.best_a2t())):
        found = [miss.rank for miss in result.misses if miss.direction == direction]
        assert found == sorted(found, reverse=True) and found[0] == ranks.max() and min(found) > 1
    worst = result.misses[0]
    assert worst.match is not None and worst.match.hit and not worst.retrieved[0].hit
    assert worst.match.score < worst.retrieved[0].score and worst.match.index in worst.clips
    assert "less than the first" in worst.why
    assert "other captions of the right clip find it at rank" in worst.why
    path = sound_path(result.save(tmp_path).parent, "test", worst.match.index)
    path.parent.mkdir(parents=True)
    path.touch()
    rows = write_report(tmp_path).read_text().split("### Worst misses, text → audio\n\n")[1].splitlines()
    assert rows[2].startswith(f"| {worst.rank} |") and f"[▶&nbsp;listen](audio/test/{path.name})" in rows[2]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows[: 2 + 6]} == {6}


def test_results_of_version_0_5_have_no_misses(tmp_path: Path) -> None:
    path = retrieval_result().save(tmp_path)
    table = json.loads(path.read_text())
    del table["misses"]
    for example in table["examples"]:
        del example["index"], example["match"], example["why"]
    path.write_text(json.dumps(table))
    loaded = EvaluationResult.load(path)
    assert loaded.misses == () and loaded.examples[0].match is None
    assert "Worst misses" not in write_report(tmp_path).read_text()


def test_the_first_loss_is_that_of_the_first_step_or_names_its_step(report: str, tmp_path: Path) -> None:
    assert "| loss, first → mean of the last 2 logged | 4.000 →" in report
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 10, "loss": 2.5}\n')
    assert "| loss, step 10 → mean of the last 1 logged | 2.500 →" in write_report(tmp_path).read_text()


def test_no_caption_breaks_the_table(report: str) -> None:
    section = report.split("## test:")[1].split("### Examples, text → audio\n\n")[1].split("\n\n")[0]
    rows = section.splitlines()
    assert len(rows) == 2 + 6
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {8}
    assert "<b>" not in section and "✅" in section


def test_a_run_without_training_and_one_that_just_began(tmp_path: Path) -> None:
    evaluated, begun = tmp_path / "evaluated", tmp_path / "begun"
    text = write_report(retrieval_result().save(evaluated).parent).read_text(encoding="utf-8")
    assert "## Training" not in text and "R@10" in text
    begun.mkdir()
    (begun / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": null, "nonfinite": ["loss"]}\n')
    text = write_report(begun).read_text(encoding="utf-8")
    assert "## Training" in text and "samples dropped: none" in text


def test_an_empty_folder_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither metrics\.jsonl nor"):
        write_report(tmp_path)


def test_gaps_are_left_out_of_curves() -> None:
    steps, values = plots.series([{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}, {"step": 3}], "loss")
    assert steps.tolist() == [1] and values.tolist() == [2]


def test_smoothing_keeps_the_mean_level() -> None:
    line = np.linspace(5, 1, 100)
    smooth = plots._smooth(line)
    assert smooth is not None
    np.testing.assert_allclose(smooth, line)
    noisy = plots._smooth(line + np.random.default_rng(0).normal(size=100))
    assert noisy is not None and np.abs(noisy - line)[10:-10].max() < 1.0
    assert plots._smooth(line[:10]) is None


@pytest.mark.parametrize("candidates", [1, 2, 3, 10, 11, 12, 1045, 20000])
def test_rank_bins_cover_every_rank_once(candidates: int) -> None:
    edges = plots._rank_bins(candidates)
    assert edges[0] == 1 and edges[-1] == candidates + 1 and edges == sorted(set(edges))
    plots.recall_and_ranks(np.arange(1, candidates + 1), np.array([1]), candidates, candidates)


def test_the_saved_ranks_give_the_metrics(tmp_path: Path) -> None:
    scores = np.random.default_rng(0).normal(size=(20, 10))
    owner = np.repeat(np.arange(10), 2)
    result = of_matrix("v", 1, scores, ["x"] * 20, ["y"] * 10, owner, np.arange(10))
    loaded = EvaluationResult.load(result.save(tmp_path))
    assert loaded.ranks.metrics() == retrieval_metrics(scores, owner, np.arange(10)) == loaded.metrics
