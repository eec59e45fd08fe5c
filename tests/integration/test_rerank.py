"""atr-scale evaluate RUN --rerank K --candidates RUN2 on two tiny runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from atr_scale.checkpoint import load_retriever
from atr_scale.data.shard_reader import open_shards
from atr_scale.evaluation.embed import embed
from atr_scale.evaluation.metrics import retrieval_metrics
from atr_scale.evaluation.parallel import Parallel
from atr_scale.evaluation.result import EvaluationResult
from tests.integration.test_estimate import call
from tests.tiny_run import save_run, tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
CANDIDATES = 4


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs with vectors (`dual`) and of pairs (`cross`, `tap`), evaluated on 11 clips."""
    place = tmp_path_factory.mktemp("rerank")
    config = tiny_config(place / "inputs", place / "run")
    for seed, (name, scorer) in enumerate({"dual": "meanmax", "cross": "coattention", "tap": "tap"}.items()):
        save_run(config, place / "runs" / name, seed, scorer)
        (place / "runs" / name / "checkpoints" / "step-3" / "state.json").write_text('{"step": 3}')
    return place


def matrix(place: Path, name: str) -> np.ndarray:
    """[captions, clips] of a run, every pair scored."""
    model, config, _ = load_retriever(place / "runs" / name)
    shards = open_shards(str(place / "inputs" / "validation" / "shards"))
    embedded = embed(model.eval(), shards, config, Parallel())
    with torch.no_grad():
        if model.scorer.is_dual_encoder:
            return (embedded.text.pooled @ embedded.audio.pooled.T).numpy()
        return model.scorer.scores(embedded.text, embedded.audio).numpy()


def reranked(first: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Rows are queries: the first CANDIDATES by `first`, ordered by `exact`, then the others."""
    out = first - 100
    for row, kept in enumerate(np.argsort(-first, axis=1, kind="stable")[:, :CANDIDATES]):
        out[row, kept] = exact[row, kept]
    return out


@pytest.mark.parametrize("second", ["cross", "tap"])
def test_the_command_re_ranks_and_says_so(place: Path, second: str, monkeypatch: pytest.MonkeyPatch) -> None:
    line: tuple[str, ...] = ("evaluate", f"runs/{second}", "--split", "validation", "--out", f"out/{second}")
    line = (*line, "--rerank", str(CANDIDATES), "--candidates", "runs/dual")
    assert call(monkeypatch, place, *line) == 0
    out = place / "out" / second
    found = EvaluationResult.load(out / "evaluation-validation.json")
    first, exact = matrix(place, "dual"), matrix(place, second)
    ids = np.arange(len(first))
    by_text = retrieval_metrics(reranked(first, exact), ids, ids)
    by_audio = retrieval_metrics(reranked(first.T.copy(), exact.T).T, ids, ids)
    wanted = {key: (by_text if key.startswith("t2a/") else by_audio)[key] for key in by_text}
    assert found.metrics == pytest.approx(wanted)
    assert wanted != pytest.approx(retrieval_metrics(first, ids, ids)), "re-ranking matters here"
    assert f"the best {CANDIDATES} of runs/dual re-ranked" in (out / "report.md").read_text()
    assert json.loads((out / "evaluation-validation.json").read_text())["step"] == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ("--rerank", "4", "--candidates", "runs/tap"),
            "cannot choose candidates: give --candidates a run with one of",
        ),
        (("--rerank", "4", "--candidates", "runs/nowhere"), "runs/nowhere"),
        (("--rerank", "4"), "needs both --rerank K and --candidates RUN"),
        (("--candidates", "runs/dual"), "needs both --rerank K and --candidates RUN"),
    ],
)
def test_wrong_candidates_are_one_line(
    place: Path,
    options: tuple[str, ...],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call(monkeypatch, place, "evaluate", "runs/cross", "--split", "validation", *options) == 2
    said = capsys.readouterr().err
    lines = [text for text in said.splitlines() if words in text]
    assert len(lines) == 1 and "Traceback" not in said


def test_a_dual_encoder_does_not_re_rank(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its embeddings are kept without the tokens, which a second scoring of pairs would read."""
    options = ("--split", "validation", "--rerank", "4", "--candidates", "runs/dual")
    assert call(monkeypatch, place, "evaluate", "runs/dual", *options) == 2
    assert "runs/dual has the dual encoder meanmax" in capsys.readouterr().err
