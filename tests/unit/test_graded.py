"""Graded relevance and re-ranking."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from atr_scale.batch import TokenSequence
from atr_scale.errors import UserError
from atr_scale.evaluation import ranks as ranks_module
from atr_scale.evaluation.metrics import GRADED_AT, graded, ranks
from atr_scale.evaluation.parallel import Parallel
from atr_scale.evaluation.relevance import read_relevance
from atr_scale.evaluation.rerank import rerank
from atr_scale.evaluation.retrieval_scores import DualEncoderScores, ScoreMatrix
from atr_scale.evaluation.score import score
from atr_scale.scorers import build_scorer
from tools.bench.measure import peak_mib


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
    found = graded(ScoreMatrix(scores).lists(GRADED_AT), grades)
    assert (found["t2a/mAP@16"], found["t2a/nDCG@16"]) == pytest.approx(by_hand(scores, grades), rel=1e-6)
    perfect = graded(ScoreMatrix(grades).lists(GRADED_AT)[:3], grades[:3])
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
    with pytest.raises(UserError, match="give the file of this split"):
        read_relevance(path, shards, embedded)
    path.write_text("text,clips\nA cat.,a\n")
    with pytest.raises(UserError, match="it needs query and audio_filenames"):
        read_relevance(path, shards, embedded)
    with pytest.raises(UserError, match="no relevance file"):
        read_relevance(tmp_path / "nowhere.csv", shards, embedded)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('query,audio_filenames\na,"[\'b.wav"\n', "no list of file names; check its quotes"),
        ("query,audio_filenames\na\n", "line 2: fewer fields than the header"),
    ],
)
def test_a_damaged_list_is_one_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "list.csv").write_text(content)
    embedded: Any = SimpleNamespace(captions=["a"], clip_ids=["x/b.wav"])
    with pytest.raises(UserError, match=message):
        read_relevance(tmp_path / "list.csv", SimpleNamespace(location="here"), embedded)  # type: ignore[arg-type]


def graded_split() -> tuple[Any, Any, dict[str, np.ndarray]]:
    """Three clips with two, one and two captions, and grades of their split: in another order, with a fourth clip."""
    owner = np.array([0, 0, 1, 2, 2])
    embedded = SimpleNamespace(captions=list("vwxyz"), clip_ids=["c/0", "c/1", "c/2"], owner=owner)
    captions = [("c/2", 1), ("c/0", 0), ("c/3", 0), ("c/1", 0), ("c/0", 1), ("c/2", 0)]
    arrays = {
        "grades": (np.arange(24).reshape(6, 4) / 24).astype(np.float16),
        "clip_ids": np.array(["c/3", "c/1", "c/0", "c/2"]),
        "caption_clip": np.array([clip for clip, _ in captions]),
        "caption_index": np.array([k for _, k in captions]),
    }
    return SimpleNamespace(location="shards/c/test"), embedded, arrays


def test_grades_are_found_by_clip_and_caption(tmp_path: Path) -> None:
    shards, embedded, arrays = graded_split()
    np.savez_compressed(tmp_path / "grades.npz", **arrays)  # type: ignore[arg-type]
    found = read_relevance(tmp_path / "grades.npz", shards, embedded)
    expected = arrays["grades"][[1, 4, 3, 5, 0]][:, [2, 1, 3]]
    assert found.dtype == np.float32 and np.array_equal(found, expected)


def changed(**arrays: np.ndarray | None) -> dict[str, np.ndarray]:
    everything = {**graded_split()[2], **arrays}
    return {name: array for name, array in everything.items() if array is not None}


NEEDS = (
    "grades needs grades float .captions, clips., clip_ids str .clips., caption_clip str .captions., caption_index int"
)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (changed(clip_ids=None, caption_index=None), f"has no clip_ids, caption_index: a file of {NEEDS}"),
        (changed(grades=np.ones((4, 6), np.float32)), rf"grades is float32 \[4, 6\], but a file of {NEEDS}"),
        (changed(grades=np.ones((6, 4), np.int64)), rf"grades is int64 \[6, 4\], but a file of {NEEDS}"),
        (changed(clip_ids=np.arange(4)), r"clip_ids is int64 \[4\]"),
        (changed(caption_index=np.zeros(5, np.int64)), r"caption_index is int64 \[5\]"),
        (changed(caption_clip=np.array(["c/0"] * 6).reshape(2, 3)), r"caption_clip is <U3 \[2, 3\]"),
        (changed(clip_ids=np.array(["c/0", "c/1", "c/2", None])), "is no npz file of grades .*allow_pickle=False"),
        (changed(grades=np.full((6, 4), np.nan)), "grades outside of 0 to 1"),
        (changed(grades=np.full((6, 4), 1.5)), "grades outside of 0 to 1"),
        (changed(caption_index=np.zeros(6, np.int64)), "names a clip or a caption twice"),
        (changed(clip_ids=np.array(["c/3", "c/1", "c/0", "c/0"])), "names a clip or a caption twice"),
        (changed(clip_ids=np.array(["c/3", "c/4", "c/0", "c/2"])), r"lacks 1 clips .*test \(for example c/1\)"),
        (changed(caption_index=np.array([1, 0, 0, 7, 1, 0])), r"lacks 1 .*\(for example caption 0 of c/1\)"),
        (changed(grades=np.zeros((6, 4))), "grades no caption and clip of shards/c/test"),
    ],
)
def test_a_wrong_file_of_grades_is_one_line(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez_compressed(tmp_path / "grades.npz", **arrays)  # type: ignore[arg-type]
    shards, embedded, _ = graded_split()
    with pytest.raises(UserError, match=message) as caught:
        read_relevance(tmp_path / "grades.npz", shards, embedded)
    assert "\n" not in str(caught.value) and str(tmp_path / "grades.npz") in str(caught.value)


@pytest.mark.parametrize("damage", ["text", "pickle", "array", "cut", "changed", "method"])
def test_what_is_no_npz_file(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "grades.npz"
    np.savez_compressed(path, **graded_split()[2])  # type: ignore[arg-type]
    if damage == "array":
        np.save(tmp_path / "one.npy", np.ones(3))
        (tmp_path / "one.npy").rename(path)
    else:
        whole = path.read_bytes()
        changed_bytes = whole[:100] + bytes(20) + whole[120:]
        entry = whole.rindex(b"PK\x01\x02")  # of the archive's table; its compression method is one that nobody has
        changed_method = whole[: entry + 10] + b"\x63" + whole[entry + 11 :]
        damaged = {
            "text": b"grades", "pickle": pickle.dumps([1]), "cut": whole[:300], "changed": changed_bytes,
            "method": changed_method,
        }  # fmt: skip
        path.write_bytes(damaged[damage])
    with pytest.raises(UserError, match="is no npz file of grades"):
        read_relevance(path, *graded_split()[:2])


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
    found = score(scorer, text, audio, batch_size=batch_size, parallel=Parallel())
    torch.testing.assert_close(found, scorer.scores(text, audio).detach())


def matrices(first: np.ndarray, exact: np.ndarray, candidates: int) -> tuple[np.ndarray, np.ndarray]:
    """Re-ranked scores as text queries and as audio queries see them, [texts, audios] each."""
    both = []
    for one, new in ((first, exact), (first.T, exact.T)):
        out = one - 100
        for row, kept in enumerate(np.argsort(-one, axis=1, kind="stable")[:, :candidates]):
            out[row, kept] = new[row, kept]
        both.append(out)
    return both[0], both[1].T


@pytest.mark.parametrize("kind", ["embeddings", "matrix", "all equal"])
@pytest.mark.parametrize("candidates", [1, 4, 11])
def test_reranked_ranks_and_lists_are_those_of_the_matrix(kind: str, candidates: int) -> None:
    """Candidates of equal new scores, too: the second stage gives a few levels alone."""
    torch.manual_seed(0)
    text, audio = sequences(14, 11)
    owner, clips = np.sort(np.random.default_rng(0).integers(0, 11, 14)), np.arange(11)
    exact = torch.randn(14, 11).mul(1.5).round()
    scorer: Any = SimpleNamespace(scores=lambda t, a: exact[t.pooled[:, 0].long()][:, a.pooled[:, 0].long()])
    text, audio = (TokenSequence(s.tokens, s.mask, torch.arange(len(s.pooled))[:, None]) for s in (text, audio))
    left, right = torch.randint(-2, 3, (14, 4)) / 8, torch.randint(-2, 3, (11, 4)).float()
    if kind == "all equal":
        left = left * 0
    first = ScoreMatrix(left @ right.T) if kind == "matrix" else DualEncoderScores(left, right)
    found = rerank(scorer, text, audio, first, candidates, Parallel())
    by_text, by_audio = matrices((left @ right.T).numpy(), exact.numpy(), candidates)
    ranked = found.ranks(owner, clips)
    assert ranked.t2a.tolist() == ranks(by_text, owner, clips).t2a.tolist()
    assert ranked.a2t.tolist() == ranks(by_audio, owner, clips).a2t.tolist()
    order = np.argsort(-by_text, axis=1, kind="stable")
    for k in (2, 6, 16):
        assert found.lists(k).tolist() == order[:, :k].tolist()
    for row in range(14):
        assert np.argsort(-found.row(row).numpy(), kind="stable").tolist() == order[row].tolist()
    for column in range(11):
        shown = np.argsort(-found.column(column).numpy(), kind="stable")
        assert shown.tolist() == np.argsort(-by_audio[:, column], kind="stable").tolist()
    block = found.block(torch.tensor([3, 13]), torch.tensor([0, 10, 5]))
    assert torch.equal(block, torch.stack([found.row(3), found.row(13)])[:, [0, 10, 5]])


def test_reranking_scores_the_candidates_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """And needs no score matrix."""
    torch.manual_seed(0)
    num, wanted = 3000, 2
    asked = []

    def pairs(text: TokenSequence, audio: TokenSequence) -> torch.Tensor:
        asked.append((len(text.pooled), len(audio.pooled)))
        return torch.zeros(asked[-1])

    scorer: Any = SimpleNamespace(scores=pairs)
    vectors = torch.nn.functional.normalize(torch.randn(2, num, 8), dim=2)
    text, audio = (TokenSequence(v.new_zeros(num, 0, 8), torch.ones(num, 0, dtype=torch.bool), v) for v in vectors)

    def run() -> None:
        found = rerank(scorer, text, audio, DualEncoderScores(*vectors), wanted, Parallel())
        found.ranks(np.arange(num), np.arange(num))
        found.lists(16)

    monkeypatch.setattr(ranks_module, "SCORES", 1 << 20)
    assert peak_mib(run) < num * num * 4 / 2**20
    assert set(asked) == {(1, wanted), (wanted, 1)}
