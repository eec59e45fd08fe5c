"""Graded relevance and re-ranking."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from atr_scale.errors import UserError
from atr_scale.evaluation.metrics import graded
from atr_scale.evaluation.relevance import read_relevance
from atr_scale.evaluation.score import rerank, score
from atr_scale.parallel.world import World
from atr_scale.scorers import build_scorer
from atr_scale.sequence import TokenSequence


def by_hand(scores: np.ndarray, grades: np.ndarray) -> tuple[float, float]:
    precisions, ratios = [], []
    for row, grade in zip(scores, grades, strict=True):
        order = sorted(range(len(row)), key=lambda k: (-row[k], k))
        wanted = [k for k in range(len(row)) if grade[k] == 1]
        if wanted:
            found, total = 0, 0.0
            for rank, k in enumerate(order[:16], 1):
                if k in wanted:
                    found += 1
                    total += found / rank
            precisions.append(total / len(wanted))
        ideal = sum(g / np.log2(2 + i) for i, g in enumerate(sorted(grade, reverse=True)[:16]))
        if ideal:
            ratios.append(sum(grade[k] / np.log2(2 + i) for i, k in enumerate(order[:16])) / ideal)
    return float(np.mean(precisions)), float(np.mean(ratios))


def test_graded_metrics_equal_a_loop() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 5, (20, 40)).astype(np.float32)  # many ties
    grades = rng.choice([0, 0, 0, 0.3, 0.7, 1], (20, 40)).astype(np.float32)
    grades[3] = 0
    found = graded(scores, grades)
    assert (found["t2a/mAP@16"], found["t2a/nDCG@16"]) == pytest.approx(by_hand(scores, grades), rel=1e-6)
    perfect = graded(grades[:3], grades[:3])
    assert perfect["t2a/nDCG@16"] == pytest.approx(1.0)


def test_the_list_of_dcase(tmp_path: Path) -> None:
    embedded: Any = SimpleNamespace(
        captions=["A dog barks.", "Rain falls.", "A cat."], clip_ids=["clotho/a.wav", "clotho/b c.wav", "clotho/d.wav"]
    )
    shards: Any = SimpleNamespace(location="shards/clotho/test")
    path = tmp_path / "metadata_eval.csv"
    path.write_text(
        'query,audio_filenames\na dog  barks.,"[\'a.wav\', \'b c.wav\']"\nRain falls.,"[""d.wav"", ""zz.wav""]"\n'
    )
    assert read_relevance(path, shards, embedded).tolist() == [[1, 1, 0], [0, 0, 1], [0, 0, 0]]
    path.write_text("query,audio_filenames\nanother,a.wav;b.wav\n")
    with pytest.raises(UserError, match="of another split"):
        read_relevance(path, shards, embedded)
    path.write_text("text,clips\nA cat.,a\n")
    with pytest.raises(UserError, match="it needs query and audio_filenames"):
        read_relevance(path, shards, embedded)
    with pytest.raises(UserError, match="no relevance file"):
        read_relevance(tmp_path / "nowhere.csv", shards, embedded)


def sequences(texts: int, audios: int) -> tuple[TokenSequence, TokenSequence]:
    generator = torch.Generator().manual_seed(0)
    parts = []
    for count, length in ((texts, 5), (audios, 7)):
        tokens = torch.randn(count, length, 8, generator=generator)
        parts.append(TokenSequence(tokens, torch.ones(count, length, dtype=torch.bool), tokens.mean(1)))
    return parts[0], parts[1]


@pytest.mark.parametrize("batch_size", [4, 100])
def test_pairs_are_scored_in_batches(batch_size: int) -> None:
    torch.manual_seed(0)
    scorer = build_scorer("tap", dim=8).eval()
    text, audio = sequences(6, 11)
    found = score(scorer, text, audio, batch_size=batch_size, world=World(), device=torch.device("cpu"))
    torch.testing.assert_close(found, scorer.scores(text, audio).detach())


def test_reranking_scores_the_candidates_alone() -> None:
    torch.manual_seed(0)
    scorer = build_scorer("tap", dim=8).eval()
    text, audio = sequences(6, 11)
    exact = scorer.scores(text, audio).detach()
    first = torch.randn(6, 11, generator=torch.Generator().manual_seed(1))
    t2a, a2t = rerank(scorer, text, audio, first, 4, world=World(), device=torch.device("cpu"))
    for row in range(6):
        kept = first[row].topk(4).indices
        order = t2a[row].argsort(descending=True)
        assert order[:4].tolist() == kept[exact[row, kept].argsort(descending=True)].tolist()
        rest = [k for k in first[row].argsort(descending=True).tolist() if k not in kept.tolist()]
        assert order[4:].tolist() == rest
    for column in range(11):
        kept = first[:, column].topk(4).indices
        assert a2t[:, column].argmax() == kept[exact[kept, column].argmax()]
    everything, _ = rerank(scorer, text, audio, first, 11, world=World(), device=torch.device("cpu"))
    torch.testing.assert_close(everything, exact)


def test_of_equal_candidates_the_lower_index_is_kept() -> None:
    torch.manual_seed(0)
    scorer = build_scorer("tap", dim=8).eval()
    text, audio = sequences(3, 40)
    t2a, _ = rerank(scorer, text, audio, torch.zeros(3, 40), 5, world=World(), device=torch.device("cpu"))
    assert (t2a[:, :5] > -1.1).all() and (t2a[:, 5:] < -1.1).all()
