"""Comparisons of evaluated runs: grouping, paired intervals, bins, refusals, and what is written."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from atr_scale.config import RunConfig, parse_config
from atr_scale.errors import UserError
from atr_scale.evaluation.facts import Facts
from atr_scale.evaluation.result import evaluate_retrieval
from atr_scale.evaluation.results import config_digest, record_results, record_training
from atr_scale.evaluation.retrieval_scores import ScoreMatrix
from atr_scale.experiments.compare import ALL, bootstrap_means, compare_runs, split_by
from atr_scale.experiments.evaluated import read_experiments
from atr_scale.experiments.tables import as_csv, latex, markdown, write_comparison

CLIPS, CAPTIONS = 60, 3


def config(run: Path, lr: float, seed: int) -> RunConfig:
    values: dict[str, Any] = {
        "run": {"dir": str(run), "seed": seed},
        "data": {"train": [{"shards": "x"}]},
        "model": {"audio": {"name": "small_cnn"}, "text": {"name": "x"}},
        "train": {"steps": 4, "lr": lr},
    }
    return parse_config(values, "test")


def write_run(
    run: Path,
    *,
    lr: float = 1e-3,
    seed: int = 0,
    noise: float = 1.0,
    order: np.ndarray | None = None,
    clips: int = CLIPS,
    wording: str = "sound",
    grades: np.ndarray | None = None,
) -> Path:
    """An evaluated run. order: of the clips, which changes neither their embeddings nor their captions."""
    rng = np.random.default_rng(0)
    audio = rng.normal(size=(clips, 8))
    text = np.repeat(audio, CAPTIONS, axis=0) + rng.normal(size=(clips * CAPTIONS, 8)) / 2
    text = text + noise * np.random.default_rng([seed, round(1e6 * lr)]).normal(size=text.shape)
    order = np.arange(clips) if order is None else order
    texts = (order[:, None] * CAPTIONS + np.arange(CAPTIONS)).ravel()
    captions = [f"{wording} {number}" + " very" * (number % CAPTIONS) + " loud" for number in texts]
    names = [f"c/{number}.wav" for number in order]
    fields = [{"duration": 1.0 + number % 10, "scene": ("park", "street")[number % 2]} for number in order.tolist()]
    facts = Facts.of(names, captions, fields)
    scores = ScoreMatrix((text[texts] @ audio[order].T).astype(np.float32))
    ranks = scores.ranks(np.repeat(order, CAPTIONS), order)
    result = evaluate_retrieval("test", 4, scores, ranks, captions, names, grades, facts)
    result.save(run)
    record_results(run, run.name, config(run, lr, seed), [result], checkpoint="best", saved=True)
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("sweep")
    return [
        write_run(folder / f"lr={lr:g},seed={seed}", lr=lr, seed=seed, noise=noise)
        for lr, noise in ((1e-3, 1.0), (1e-4, 0.2))
        for seed in (0, 1)
    ]


def test_seeds_of_one_configuration_are_one_experiment(runs: list[Path]) -> None:
    found = compare_runs(runs)
    assert [(one.name, len(one.runs)) for one in found.experiments] == [("lr=0.001", 2), ("lr=0.0001", 2)]
    assert found.differing == {"train.lr": ["0.001", "0.0001"]}
    for key in ("t2a/R@1", "a2t/mAP", "t2a/median_rank"):
        for one, cell in zip(found.experiments, found.measured[ALL][key], strict=True):
            each = [run.result.metrics[key] for run in one.runs]
            assert cell.mean == pytest.approx(np.mean(each)) and cell.deviation == pytest.approx(np.std(each, ddof=1))


def test_one_run_evaluated_in_two_ways_is_two_experiments(runs: list[Path], tmp_path: Path) -> None:
    """They have one configuration and one seed, and their mean would say nothing."""
    other = tmp_path / "other"
    shutil.copytree(runs[0], other)
    table = json.loads((other / "results.json").read_text())
    for key, value in (("method", "re-ranked"), ("checkpoint", "last")):
        entry = {**table["results"][0], key: value}
        (other / "results.json").write_text(json.dumps({**table, "results": [entry]}))
        found = compare_runs([runs[0], runs[1], other])
        assert [len(one.runs) for one in found.experiments] == [2, 1]
        assert list(found.differing.values()) == [[table["results"][0][key], value]]


def test_how_a_run_is_watched_makes_no_other_experiment(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, lr=1e-3, seed=0, noise=1.0) for name in ("plain", "traced")]
    digests = []
    for run, profile in zip(runs, (None, {"start": 3}), strict=True):
        table = json.loads((run / "results.json").read_text())
        table["config"] = {
            "run": {},
            "train": {"lr": float(profile is None), "profile": profile},
            "monitor": [run.name],
        }
        digests.append(config_digest({**table["config"], "train": {"lr": 1.0, "profile": profile}}))
        table["config_digest"] = run.name
        (run / "results.json").write_text(json.dumps(table))
    assert digests[0] == digests[1] == config_digest({"run": {}, "train": {"lr": 1.0}})
    assert compare_runs(runs).differing == {"train.lr": ["1.0", "0.0"]}


def test_a_section_that_one_experiment_fills_is_shown_by_its_keys(tmp_path: Path) -> None:
    """Not once more as an empty section."""
    runs = [write_run(tmp_path / name, lr=1e-3, seed=0, noise=1.0) for name in ("mean", "tap")]
    for run, scorer in zip(runs, ({"options": {}}, {"options": {"residual": True}}), strict=True):
        table = json.loads((run / "results.json").read_text())
        table["config"]["model"] = {"scorer": scorer}
        table["config_digest"] = run.name
        (run / "results.json").write_text(json.dumps(table))
    assert compare_runs(runs).differing == {"model.scorer.options.residual": ["", "True"]}


def test_intervals_are_paired_and_resample_clips_with_all_their_captions(runs: list[Path]) -> None:
    found = compare_runs(runs)
    for key in ("t2a/mAP@10", "a2t/R@5"):
        direction = key.partition("/")[0]
        tables = [[run.values()[key] for run in one.runs] for one in found.experiments]
        clips = found.experiments[0].runs[0].clips(direction)
        difference = np.mean(tables[1], 0) - np.mean(tables[0], 0)
        drawn = []
        for weight in np.random.default_rng(0).multinomial(CLIPS, np.full(CLIPS, 1 / CLIPS), size=1000):
            drawn.append(np.repeat(difference, weight[clips]).mean())
        cell = found.measured[ALL][key][1]
        assert cell.difference == pytest.approx(difference.mean())
        assert (cell.low, cell.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])))
        assert found.measured[ALL][key][0].difference is None
    # Equal runs differ by nothing, which unpaired intervals would not say.
    low, high = bootstrap_means(np.zeros((4, 1)), np.array([0, 0, 1, 1]))
    assert low.tolist() == high.tolist() == [0.0]


def test_the_order_of_the_shards_does_not_matter(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", lr=1e-3)
    shuffled = write_run(tmp_path / "shuffled", lr=1e-3, order=np.random.default_rng(1).permutation(CLIPS))
    first, second = read_experiments([one, shuffled])[0].runs
    # The noise is drawn per text, so that a pair of equal queries has equal values.
    for key, value in first.values().items():
        np.testing.assert_array_equal(value, second.values()[key], err_msg=key)
    np.testing.assert_array_equal(first.clips("t2a"), second.clips("t2a"))
    for direction, value in first.field("duration").items():
        np.testing.assert_array_equal(value, second.field("duration")[direction])


def test_results_by_bin_are_those_of_its_queries(runs: list[Path]) -> None:
    found = compare_runs(runs[:1], by="scene")
    assert list(found.measured) == [ALL, "park", "street"]
    run = found.experiments[0].runs[0]
    values, scenes = run.values(), run.field("scene")
    for direction in ("t2a", "a2t"):
        chosen = scenes[direction] == "park"
        cell = found.measured["park"][f"{direction}/R@1"][0]
        assert cell.mean == pytest.approx(values[f"{direction}/R@1"][chosen].mean())
        assert found.queries["park"][direction] == chosen.sum()
    by_words = compare_runs(runs, by="caption_words")
    assert list(by_words.measured) == [ALL, "3", "4", "5"]
    assert [by_words.queries[name]["t2a"] for name in ("3", "4", "5")] == [CLIPS] * 3
    assert by_words.queries["4"]["a2t"] == CLIPS, "a clip has the mean length of its captions"
    with pytest.raises(UserError, match="give one of caption_words, duration, scene"):
        compare_runs(runs, by="weather")


def test_quarters_of_numbers_and_categories_of_texts() -> None:
    numbers = np.array([*np.arange(40.0), np.nan])
    bins = split_by({"t2a": numbers, "a2t": np.array([0.0, 15.0, 39.0])})
    assert [int(chosen["t2a"].sum()) for chosen in bins.values()] == [10, 10, 10, 10, 1]
    assert list(bins)[-1] == "(unknown)" and next(iter(bins)) == "0 to below 9.75"
    assert [chosen["a2t"].tolist() for chosen in bins.values()][:2] == [[True, False, False], [False, True, False]]
    texts = np.array(["a"] * 3 + ["b"] * 2 + [f"z{n:02}" for n in range(20)] + [""])
    bins = split_by({"t2a": texts, "a2t": texts})
    assert list(bins)[:2] == ["a", "b"] and list(bins)[-2:] == ["(other)", "(unknown)"] and len(bins) == 14
    assert sum(int(chosen["t2a"].sum()) for chosen in bins.values()) == len(texts)


def test_other_test_sets_are_refused_by_name(runs: list[Path], tmp_path: Path) -> None:
    fewer = write_run(tmp_path / "fewer", clips=CLIPS - 1)
    with pytest.raises(UserError, match=r"different clips \(60 and 59, for example c/59\.wav only in "):
        compare_runs([runs[0], fewer])
    with pytest.raises(UserError, match=r"different captions \(180 and 180\): give both the same --shards"):
        compare_runs([runs[0], write_run(tmp_path / "worded", wording="noise")])
    grades = np.eye(CLIPS, dtype=np.float32).repeat(CAPTIONS, axis=0)
    graded = write_run(tmp_path / "graded", grades=grades)
    with pytest.raises(UserError, match=r"a relevance file: .* without, .* with: evaluate them alike"):
        compare_runs([runs[0], graded])
    with pytest.raises(UserError, match="different relevance files"):
        compare_runs([graded, write_run(tmp_path / "other", grades=grades / 2 + np.roll(grades, 1, 1) / 2)])
    with pytest.raises(UserError, match=r"no results\.json in .*: evaluate the run first"):
        compare_runs([tmp_path])
    with pytest.raises(UserError, match=r"no folder .*nothing: give run folders"):
        compare_runs([tmp_path / "nothing"])
    with pytest.raises(UserError, match=r"has no results of the split clotho \(it has test\)"):
        compare_runs(runs, split="clotho")


def test_a_sweep_folder_stands_for_its_evaluated_runs(
    runs: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Training writes results.json at its start, also that of a run that fails."""
    shutil.copytree(runs[0].parent, tmp_path, dirs_exist_ok=True)
    (tmp_path / "failed").mkdir()
    record_training(tmp_path / "failed", config(tmp_path / "failed", 1.0, 0), 0, 4)
    names = [run.name for run in runs] + ["not-begun", "failed"]
    (tmp_path / "sweep.json").write_text(json.dumps({"runs": [{"name": name} for name in names]}))
    assert markdown(compare_runs([tmp_path])) == markdown(compare_runs([tmp_path / run.name for run in runs]))
    assert f"2 of 6 runs of {tmp_path} have no results of the split test: not-begun, failed" in caplog.text
    with pytest.raises(UserError, match=r"no run of the sweep .* has results of the split clotho: they have test"):
        compare_runs([tmp_path], split="clotho")


def test_markdown_csv_latex_and_picture(runs: list[Path], tmp_path: Path) -> None:
    found = compare_runs(runs, by="duration")
    assert [path.name for path in write_comparison(found, tmp_path / "out")] == [
        "compare.md", "compare.csv", "compare.tex", "compare.png",
    ]  # fmt: skip
    cell = found.measured[ALL]["t2a/R@1"][1]
    text = markdown(found)
    assert f"| lr=0.0001 | {100 * cell.mean:.1f} ± {100 * (cell.deviation or 0):.1f} |" in text
    assert (
        f"**{100 * (cell.difference or 0):+.1f} [{100 * (cell.low or 0):.1f}, {100 * (cell.high or 0):.1f}]**" in text
    )
    assert "| experiment | seeds | step | train.lr |" in text and "| lr=0.001 | 0, 1 | 4 | 0.001 |" in text
    assert "t2a/R@1 by duration" in text
    widths = {
        block: {line.count("|") for line in block.splitlines()} for block in text.split("\n\n") if block[0] == "|"
    }
    assert all(len(width) == 1 for width in widths.values()), "every row of a table has all of its columns"

    rows = list(csv.DictReader(io.StringIO(as_csv(found))))
    (row,) = [r for r in rows if (r["experiment"], r["bin"], r["metric"]) == ("lr=0.0001", "", "t2a/R@1")]
    assert float(row["mean"]) == pytest.approx(cell.mean, abs=1e-5) and row["queries"] == str(CLIPS * CAPTIONS)

    table = latex(found)
    lines = [line for line in table.splitlines() if line.startswith("lr=")]
    assert {line.count("&") for line in lines} == {8} and "\\textbf" in lines[1] and "\\textbf" not in lines[0]
    assert "\\toprule" in table and latex(found).count("\\begin") == 1
    assert imread(tmp_path / "out" / "compare.png")[..., :3].std() > 0.02
    odd = write_run(tmp_path / r"a$\frac_$|<b>", lr=2e-3)  # no formula
    write_comparison(compare_runs([odd, runs[0]], by="scene"), tmp_path / "odd")
    assert (
        r"a\$\textbackslash{}frac\_\$\textbar{}\textless{}b\textgreater{} &"
        in (tmp_path / "odd/compare.tex").read_text()
    )
    assert "Differences" not in markdown(compare_runs(runs[:2])), "one experiment has no difference"
