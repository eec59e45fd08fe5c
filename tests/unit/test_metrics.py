"""Retrieval metrics against hand-computed cases and a brute-force oracle that sorts."""

from __future__ import annotations

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from atr_scale.errors import UserError
from atr_scale.evaluation import metrics
from atr_scale.evaluation.metrics import Ranks, bootstrap, classification, label_ranks, ranks, retrieval_metrics

KEYS = ("R@1", "R@5", "R@10", "mAP@10", "mAP@16", "mAP", "median_rank")


def oracle(scores: np.ndarray, text_audio_ids: np.ndarray, audio_ids: np.ndarray) -> dict[str, float]:
    """Sort every list, walk down it, count: the definition, slowly."""

    def walk(order: list[int], relevant: set[int]) -> tuple[float, ...]:
        places = [place for place, item in enumerate(order, start=1) if item in relevant]
        precisions = {place: found / place for found, place in enumerate(places, start=1)}
        cut = [sum(p for place, p in precisions.items() if place <= last) for last in (10, 16, len(order))]
        return places[0], *(total / len(relevant) for total in cut)

    def order(values: np.ndarray) -> list[int]:
        return sorted(range(len(values)), key=lambda i: (-values[i], i))

    lists = {
        "t2a": [(order(scores[t]), {list(audio_ids).index(owner)}) for t, owner in enumerate(text_audio_ids)],
        "a2t": [
            (order(scores[:, a]), set(np.flatnonzero(text_audio_ids == clip).tolist()))
            for a, clip in enumerate(audio_ids)
            if clip in text_audio_ids
        ],
    }
    result: dict[str, float] = {}
    for direction, queries in lists.items():
        first, *precisions = map(np.array, zip(*(walk(*query) for query in queries), strict=True))
        result |= {f"{direction}/R@{k}": float(np.mean(first <= k)) for k in (1, 5, 10)}
        for name, precision in zip(("mAP@10", "mAP@16", "mAP"), precisions, strict=True):
            result[f"{direction}/{name}"] = float(np.mean(precision))
        result[f"{direction}/median_rank"] = float(np.median(first))
    return result


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A few distinct score values give many ties; captions per clip vary from none to many, in any order."""
    num_clips, num_texts = draw(st.integers(1, 24)), draw(st.integers(1, 40))
    audio_ids = np.array(draw(st.permutations([7 * i - 11 for i in range(num_clips)])))
    owners = draw(st.lists(st.integers(0, num_clips - 1), min_size=num_texts, max_size=num_texts))
    shape = (num_texts, num_clips)
    levels = draw(st.sampled_from([1, 2, 4, 1000]))
    scores = draw(hnp.arrays(np.int64, shape, elements=st.integers(0, levels))).astype(np.float32)
    return scores, audio_ids[owners], audio_ids


@settings(max_examples=200, deadline=None)
@given(problems())
def test_metrics_equal_the_oracle(problem: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    expected = oracle(*problem)
    assert retrieval_metrics(*problem) == pytest.approx(expected, abs=1e-12)
    assert set(expected) == {f"{direction}/{key}" for direction in ("t2a", "a2t") for key in KEYS}


@settings(max_examples=50, deadline=None)
@given(problems())
def test_tiles_of_one_row_change_nothing(problem: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    whole = ranks(*problem)
    tile, metrics.TILE = metrics.TILE, 1
    try:
        tiled = ranks(*problem)
    finally:
        metrics.TILE = tile
    np.testing.assert_array_equal(whole.t2a, tiled.t2a)
    np.testing.assert_array_equal(whole.a2t, tiled.a2t)


def test_three_by_three_by_hand() -> None:
    scores = np.array([[0.9, 0.1, 0.2], [0.8, 0.3, 0.7], [0.1, 0.5, 0.4]])
    table = ranks(scores, np.array([10, 20, 30]), np.array([10, 20, 30]))
    assert table.t2a.tolist() == [1, 3, 2]
    assert table.a2t.tolist() == [1, 2, 2]
    result = table.metrics()
    assert result["t2a/R@1"] == result["a2t/R@1"] == pytest.approx(1 / 3)
    assert result["t2a/mAP@10"] == pytest.approx((1 + 1 / 3 + 1 / 2) / 3)
    assert result["a2t/mAP@10"] == pytest.approx((1 + 1 / 2 + 1 / 2) / 3)
    assert result["t2a/median_rank"] == result["a2t/median_rank"] == 2


def test_five_captions_a_clip_by_hand() -> None:
    # Clip 0 finds its captions (texts 0-4) at ranks 1, 2, 4, 7 and 10; clip 1 finds its own at 3, 5, 6, 8 and 9.
    column = np.empty(10)
    column[[0, 1, 5, 2, 6, 7, 3, 8, 9, 4]] = np.arange(10, 0, -1)
    scores = np.stack([column, column], axis=1)
    owner = np.repeat([0, 1], 5)
    result = retrieval_metrics(scores, owner, np.array([0, 1]))
    first = (1 / 1 + 2 / 2 + 3 / 4 + 4 / 7 + 5 / 10) / 5
    second = (1 / 3 + 2 / 5 + 3 / 6 + 4 / 8 + 5 / 9) / 5
    assert result["a2t/mAP@10"] == pytest.approx((first + second) / 2)
    assert result["a2t/R@1"] == 0.5
    assert result["a2t/median_rank"] == 2
    # Both columns are equal: every caption ranks clip 0 first and clip 1 second.
    assert result["t2a/R@1"] == 0.5


def test_variable_captions_are_divided_by_their_own_number() -> None:
    owner = np.array([1, 1, 1, 2])
    scores = np.array([[4.0, 0], [3, 0], [2, 0], [1, 0]])
    result = retrieval_metrics(scores, owner, np.array([1, 2]))
    assert result["a2t/mAP@10"] == pytest.approx((1.0 + 1 / 4) / 2)


def test_a_clip_without_captions_is_a_candidate_and_no_query() -> None:
    scores = np.array([[0.5, 0.9], [0.5, 0.9]])
    table = ranks(scores, np.array([1, 1]), np.array([1, 2]))
    assert table.t2a.tolist() == [2, 2]
    assert table.best_a2t().tolist() == [1]
    assert table.metrics()["a2t/R@1"] == 1


def test_a_constant_matrix_is_not_rewarded() -> None:
    count = 50
    result = retrieval_metrics(np.zeros((count, count)), np.arange(count), np.arange(count))
    assert result["t2a/R@1"] == result["a2t/R@1"] == 1 / count


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_any_float_type_of_tensor(dtype: torch.dtype) -> None:
    scores = torch.randn(20, 4, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    owner, clips = torch.arange(20) % 4, torch.arange(4)
    expected = oracle(scores.detach().double().numpy(), owner.numpy(), clips.numpy())
    assert retrieval_metrics(scores, owner, clips) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("owner", "clips", "shape", "message"),
    [
        ([1, 2], [1, 1], (2, 2), "occurs more than once"),
        ([1, 3], [1, 2], (2, 2), "text 1 describes clip id 3, which is not in audio_ids"),
        ([1], [], (1, 0), "which is not in audio_ids"),
        ([], [1, 2], (0, 2), "no captions"),
        ([1, 2], [1, 2, 3], (3, 2), "give scores as"),
    ],
)
def test_mistakes_get_one_line(owner: list[int], clips: list[int], shape: tuple[int, int], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        ranks(np.zeros(shape), np.array(owner, dtype=np.int64), np.array(clips, dtype=np.int64))
    assert "\n" not in str(caught.value)


def test_nan_scores_are_refused_instead_of_ranking_first() -> None:
    scores = np.full((2, 2), np.nan)
    with pytest.raises(UserError, match="NaN"):
        retrieval_metrics(scores, np.arange(2), np.arange(2))


def example_ranks(num_clips: int = 60, captions: int = 5, noise: float = 1.0) -> Ranks:
    generator = np.random.default_rng(3)
    audio = generator.normal(size=(num_clips, 8))
    text = np.repeat(audio, captions, axis=0) + noise * generator.normal(size=(num_clips * captions, 8))
    return ranks(text @ audio.T, np.repeat(np.arange(num_clips), captions), np.arange(num_clips))


def test_bootstrap_equals_recomputing_each_resample() -> None:
    # Clips with one to three captions: the number of queries differs between resamples.
    generator = np.random.default_rng(0)
    clip = np.repeat(np.arange(12), generator.integers(1, 4, size=12))
    table = Ranks(generator.integers(1, 20, len(clip)), generator.integers(1, 20, len(clip)), clip, np.arange(12))
    weights = np.random.default_rng(5).multinomial(12, np.full(12, 1 / 12), size=40)
    drawn = []
    for weight in weights:
        # A resample is a larger set in which a clip drawn twice is two clips.
        copies = [(c, copy) for c in range(12) for copy in range(weight[c])]
        parts = [np.flatnonzero(clip == c) for c, _ in copies]
        new_clip = np.repeat(np.arange(len(copies)), [len(part) for part in parts])
        index = np.concatenate(parts)
        drawn.append(Ranks(table.t2a[index], table.a2t[index], new_clip, np.arange(len(copies))).metrics())
    result = bootstrap(table, samples=40, seed=5, level=0.8)
    assert set(result) == set(drawn[0])
    for key, interval in result.items():
        assert interval == pytest.approx(np.quantile([one[key] for one in drawn], [0.1, 0.9]), abs=1e-12), key


def test_bootstrap_resamples_clips_not_captions() -> None:
    # All captions of a clip agree: 40 independent outcomes, whatever the number of captions.
    hit = np.arange(40) % 2 == 0
    rank = np.where(hit, 1, 20)
    one = Ranks(rank, rank, np.arange(40), np.arange(40))
    five = Ranks(np.repeat(rank, 5), np.repeat(rank, 5), np.repeat(np.arange(40), 5), np.arange(40))
    assert bootstrap(five)["t2a/R@1"] == bootstrap(one)["t2a/R@1"]


def test_bootstrap_is_seeded_brackets_the_estimate_and_ignores_the_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    table = example_ranks()
    intervals = bootstrap(table, samples=300)
    for key, value in table.metrics().items():
        low, high = intervals[key]
        assert low <= value <= high
    assert intervals["t2a/R@1"][0] < intervals["t2a/R@1"][1]
    assert bootstrap(table, samples=300, seed=1) != intervals
    monkeypatch.setattr(metrics, "TILE", 1000)
    for key, interval in bootstrap(table, samples=300).items():
        assert interval == pytest.approx(intervals[key], abs=1e-12), key


def test_bootstrap_covers_the_truth() -> None:
    truth, covered = 0.3, 0
    for seed in range(200):
        hit = np.random.default_rng(seed).random(80) < truth
        rank = np.where(hit, 1, 20)
        low, high = bootstrap(Ranks(rank, rank, np.arange(80), np.arange(80)), samples=200, seed=seed)["t2a/R@1"]
        covered += low <= truth <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_classification_by_hand() -> None:
    # Clips 0 and 1 are of class 0, clip 2 of class 1; class 2 has no clip and attracts clip 1.
    scores = np.array([[0.9, 0.2, 0.5], [0.1, 0.1, 0.6], [0.0, 0.8, 0.0]])
    result = classification(scores, np.array([0, 0, 1]))
    assert result["zero_shot/accuracy"] == pytest.approx(2 / 3)
    assert result["zero_shot/R@5"] == 1
    assert result["zero_shot/mAP"] == pytest.approx((1 + 1 / 2 + 1) / 3)
    # Class 0 finds its clips at 1 and 3, class 1 its clip at 1.
    assert result["class/R@1"] == 1
    assert result["class/mAP"] == result["class/mAP@10"] == pytest.approx(((1 + 2 / 3) / 2 + 1) / 2)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_classification_equals_sorting(data: st.DataObject) -> None:
    num_classes, num_clips = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 30))
    levels = data.draw(st.sampled_from([1, 3, 1000]))
    scores = data.draw(hnp.arrays(np.int64, (num_classes, num_clips), elements=st.integers(0, levels))).astype(float)
    labels = data.draw(hnp.arrays(np.int64, num_clips, elements=st.integers(0, num_classes - 1)))
    result = classification(torch.from_numpy(scores), torch.from_numpy(labels))
    assert result["zero_shot/accuracy"] == pytest.approx(np.mean(scores.argmax(axis=0) == labels))
    first, short, full = [], [], []
    for label in np.unique(labels):
        order = np.argsort(-scores[label], kind="stable")
        hits = labels[order] == label
        precision = np.cumsum(hits) / np.arange(1, num_clips + 1) * hits
        first.append(hits[0])
        short.append(precision[:10].sum() / min(10, hits.sum()))
        full.append(precision.sum() / hits.sum())
    assert result["class/R@1"] == pytest.approx(np.mean(first))
    assert result["class/mAP@10"] == pytest.approx(np.mean(short))
    assert result["class/mAP"] == pytest.approx(np.mean(full))


def test_a_perfect_class_list_scores_one_however_many_clips() -> None:
    labels = np.repeat(np.arange(3), 40)
    scores = (labels[None] == np.arange(3)[:, None]).astype(float)
    assert all(value == 1 for value in classification(scores, labels).values())


def test_a_label_without_class_is_named() -> None:
    with pytest.raises(UserError, match="label 3 of clip 1 is not one of the 3 classes"):
        label_ranks(np.zeros((3, 2)), np.array([0, 3]))
