"""Which metric makes a checkpoint the best."""

from __future__ import annotations

import pytest

from atr_scale.errors import UserError
from atr_scale.evaluation.selection import check_selection, selection_score

FOUND = {
    "clotho": {"t2a/mAP@10": 0.3, "a2t/R@1": 0.2, "t2a/median_rank": 4.0},
    "audiocaps": {"t2a/mAP@10": 0.5, "a2t/R@1": 0.6, "t2a/median_rank": 2.0},
}


@pytest.mark.parametrize(
    ("select", "score"),
    [
        (None, 0.3),
        ("a2t/R@1", 0.2),
        ("audiocaps/a2t/R@1", 0.6),
        ("clotho/t2a/median_rank", -4.0),  # fewer is better
        ("a2t/R@1 + t2a/mAP@10+audiocaps/a2t/R@1", 0.2 + 0.3 + 0.6),
    ],
)
def test_the_named_metric_of_the_named_set_counts(select: str | None, score: float) -> None:
    check_selection(select, list(FOUND))
    assert selection_score(FOUND, select) == pytest.approx(score)


def test_a_labelled_set_is_selected_by_its_classes() -> None:
    assert selection_score({"validation": {"t2a/mAP@10": 0.1, "class/mAP@10": 0.9}}, None) == 0.9


@pytest.mark.parametrize("select", ["t2a/R@2", "esc50/t2a/R@1", "loss", "clotho", "clotho/", "t2a/R@1 +"])
def test_a_metric_that_does_not_exist_is_told_before_training(select: str) -> None:
    with pytest.raises(UserError, match=r"names no validation metric: .* the sets are clotho, audiocaps"):
        check_selection(select, list(FOUND))


def test_a_metric_that_a_set_does_not_give_is_told() -> None:
    with pytest.raises(UserError, match="the set clotho gives no zero_shot/accuracy; it gives t2a/mAP@10"):
        selection_score(FOUND, "zero_shot/accuracy")
