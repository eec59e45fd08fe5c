"""The page of tools/esc50_job.py: a disturbed run among undisturbed ones."""

from __future__ import annotations

import pytest

from atr_scale.status import AttemptFacts
from tools.esc50_job import METRICS, Trained, page


def run(name: str, score: float, *ranks: int, loss: float = 0.5) -> Trained:
    attempts = [
        AttemptFacts(n, 60.0 * n, None, 60.0 * (n + 1), 10 * n, 10 * (n + 1), size, None, None, None, "preempted", 0, n)
        for n, size in enumerate(ranks)
    ]
    return Trained(name, dict.fromkeys(METRICS, score), attempts, {1: 2.0, 5 + len(ranks): 1.0, 10: loss})


@pytest.mark.parametrize(("score", "verdict"), [(0.91, "yes"), (0.88, "no, -0.0300 to the mean")])
def test_a_disturbed_run_is_within_the_spread_of_the_others_or_not(score: float, verdict: str) -> None:
    undisturbed = [run(f"seed {n}", score, 1) for n, score in enumerate((0.90, 0.91, 0.92))]
    text = page(undisturbed, run("disturbed", score, 4, 4, 2, loss=0.505), ["train.epochs=4"])
    (row,) = (line for line in text.splitlines() if line.startswith("| class mAP | 0"))
    assert row == f"| class mAP | 0.9100 ± 0.0100 | 0.9000 to 0.9200 | {score:.4f} | {verdict} | {score - 0.90:+.4f} |"
    assert f"| disturbed | 4, 4, 2 | 3 | 0.5050 | {score:.4f} |" in text
    assert "by 0.0e+00 at step\n1, and by at most 1.0e-02" in text
    assert "| 2 | 2 | 20 to 30 | preempted | 2 | 0 |" in text
