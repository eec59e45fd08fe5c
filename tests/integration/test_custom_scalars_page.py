"""The page of custom scalars over a tiny run: a real TensorBoard serves it, and a real browser shows its charts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from atr_scale.config import RunConfig
from atr_scale.distributed.world import World
from atr_scale.training.loop import Training
from atr_scale.training.monitor import record_evaluation
from tests.integration.test_listening import browser_page
from tests.integration.test_tensorboard_page import address, get_json
from tests.tiny_run import tiny_config
from tools.ranks import run_ranks

pytestmark = pytest.mark.slow
__all__ = ["address"]  # a fixture


def trained(config: RunConfig) -> None:
    Training(config, World.current(), torch.device("cpu")).run()


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that was resumed, and then evaluated on a test set."""
    place = tmp_path_factory.mktemp("runs")
    for steps in (4, 6):
        run_ranks(
            trained,
            2,
            tiny_config(place, place / "run", steps=steps, schedule="constant", evaluate_every=2, log_every=1),
        )
    metrics = {f"{way}/{name}": 0.5 for way in ("t2a", "a2t") for name in ("R@1", "R@5", "R@10", "mAP@10")}
    record_evaluation(place / "run", 6, {"test": metrics})
    return place / "run"


def charts(address: str) -> dict[str, list[str]]:
    """Regular expressions of tags by section and chart."""
    (layout,) = [get_json(address, "custom_scalars/layout")]
    return {
        f"{section['title']}: {chart['title']}": chart["multiline"]["tag"]
        for section in layout["category"]
        for chart in section["chart"]
    }


def test_every_chart_has_data_and_every_tag_a_chart(address: str) -> None:
    ((run, tags),) = get_json(address, "scalars/tags").items()
    found: dict[str, dict[str, Any]] = {}
    for title, patterns in charts(address).items():
        found[title] = {}
        for pattern in patterns:
            answer = get_json(address, "custom_scalars/scalars", run=run, tag=pattern)
            assert answer["regex_valid"], pattern
            found[title] |= answer["tag_to_events"]
    assert [title for title, series in found.items() if not series] == ["data: dropped samples"]
    assert all(len(events) >= 3 for title, series in found.items() if title[:4] != "test" for events in series.values())
    assert set(found["test: recall, text to audio"]) == {"test/t2a/R@1", "test/t2a/R@5", "test/t2a/R@10"}
    assert set(found["validation: recall, audio to text"]) == {f"validation/a2t/R@{k}" for k in (1, 5, 10)}
    assert set(found["loss: loss"]) == {"train/loss"}
    shown = {tag for series in found.values() for tag in series}
    assert {tag for tag in tags if tag.startswith("train/")} - shown == {"train/samples_seen"}


def test_a_browser_shows_the_charts(address: str, tmp_path: Path) -> None:
    with browser_page(1300) as page:
        for mode in ("false", "true"):
            page.goto(f"{address}/?darkMode={mode}#custom_scalars")
            page.get_by_text("seconds of saving", exact=False).first.wait_for(timeout=90_000)
            page.wait_for_timeout(2000)
            page.screenshot(path=tmp_path / f"dark-{mode}.png")
