"""A pairwise scorer that was trained orders what an index has found, for `search` and on the page."""

from __future__ import annotations

import json
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import atr_scale
from tests.integration.test_estimate import call, start
from tests.serving import served
from tests.tiny_run import save_run, tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
QUERY = "a high and loud tone 3"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`lgmm`, a run of a few steps, and `dual`, the model of the index."""
    place = tmp_path_factory.mktemp("rerank")
    save_run(tiny_config(place / "inputs", place / "unused"), place / "dual", 0)
    tiny_config(place / "inputs", place / "lgmm")
    start(place, "inputs/tiny.yaml", "model.scorer.name=lgmm", "model.projection.dim=16", "train.steps=3")
    return place


def get(address: str, **parameters: str | int) -> Any:
    with urllib.request.urlopen(f"{address}?{urllib.parse.urlencode(parameters)}", timeout=60) as answer:
        return json.load(answer)


def test_search_and_the_page_order_by_the_second_run(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, place, "index", "dual", "inputs/validation/corpus/audio", "--out", "index") == 0
    capsys.readouterr()
    assert call(monkeypatch, place, "search", "index", QUERY, "--top", "11", "--json") == 0
    first = json.loads(capsys.readouterr().out)["results"]
    line = ("search", "index", QUERY, "--rerank", "lgmm", "--candidates", "5", "--top", "3", "--json")
    assert call(monkeypatch, place, *line) == 0
    found = json.loads(capsys.readouterr().out)["results"]
    judge = atr_scale.load(place / "lgmm", device="cpu")
    scores = judge.similarity([QUERY], [hit["path"] for hit in first])[0]
    order = np.argsort(-scores[:5], kind="stable")[:3]
    assert order.tolist() != [0, 1, 2], "re-ranking matters here"
    assert [hit["id"] for hit in found] == [first[n]["id"] for n in order]
    assert [hit["score"] for hit in found] == pytest.approx(scores[order].tolist(), abs=1e-5)
    with served(place / "index", "--rerank", str(place / "lgmm")) as (_, address):
        shown = get(f"{address}api/search", q=QUERY, top=5)["results"]
        heard = get(f"{address}api/moments", q=QUERY, id=shown[0]["id"])
    order = np.argsort(-scores, kind="stable")[:5]  # here all eleven are candidates
    assert [hit["id"] for hit in shown] == [first[n]["id"] for n in order]
    assert [hit["score"] for hit in shown] == pytest.approx(scores[order].tolist(), abs=1e-5)
    # The page tells moments by the run that has attention over frames, which is the second one.
    wanted = judge.moments(QUERY, shown[0]["path"])
    assert heard["words"] == wanted.words and np.allclose(heard["weights"], wanted.weights, atol=1e-3)
