"""The page of custom scalars over a tiny run: a real TensorBoard serves it, and a real browser shows its charts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from atr_scale.config import RunConfig
from atr_scale.distributed.world import World
from atr_scale.training.loop import Training
from atr_scale.training.monitor import record_evaluation
from tests.commands import ROOT
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
    """A run of two ranks that one rank went on with, and that was then evaluated on a test set."""
    place = tmp_path_factory.mktemp("runs")
    for ranks, steps in ((2, 4), (1, 6)):
        train = {"steps": steps, "schedule": "constant", "evaluate_every": 2, "log_every": 1}
        run_ranks(trained, ranks, tiny_config(place, place / "run", **train))
    metrics = {f"{way}/{name}": 0.5 for way in ("t2a", "a2t") for name in ("R@1", "R@5", "R@10", "mAP@10")}
    record_evaluation(place / "run", 6, {"test": metrics})
    return place / "run"


def charts(address: str) -> dict[str, list[str]]:
    """Regular expressions of tags by section and chart."""
    layout = get_json(address, "custom_scalars/layout")
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


def test_speeds_are_those_of_all_ranks_and_time_of_saving_is_told(run_dir: Path) -> None:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in train] == [1, 2, 3, 4, 5, 6]
    for line in train:
        assert line["audio_s_per_s"] == pytest.approx(0.5 * line["samples_per_s"]), "clips of half a second"
        assert 0 < line["data_wait/mean"] <= line["data_wait"] < 1
        assert line["duplicates/clips"] == 0
    assert [line["saving_s"] > 0 for line in train] == [False, False, True, False, False, False]
    assert all(line["seconds"] > 0 for line in lines if line["kind"] == "evaluation")


def test_every_key_has_a_row_in_the_page_on_monitoring(run_dir: Path) -> None:
    text = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
    named = {key for row in re.findall(r"^\| (`.+?`) \|", text, re.MULTILINE) for key in re.findall("`(.+?)`", row)}
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    keys = {key for line in lines if line["kind"] == "train" for key in line} - {"kind", "step"}
    keys = {re.sub("^loss/nt_xent", "loss/TERM", re.sub(r"/(audio|text|heads)$", "/GROUP", key)) for key in keys}
    assert keys <= named, keys - named


def test_a_browser_shows_the_charts(address: str, tmp_path: Path) -> None:
    with browser_page(2600) as page:
        for mode in ("false", "true"):
            page.goto(f"{address}/?darkMode={mode}#custom_scalars")
            page.get_by_text("seconds of saving", exact=False).first.wait_for(timeout=90_000)
            page.wait_for_timeout(3000)
            curves = [text.strip() for text in page.get_by_text("Matches (", exact=False).all_inner_texts()]
            assert len(curves) == 22 and curves.count("Matches (0)") == 1, "no sample was dropped"
            shot = tmp_path / f"dark-{mode}.png"
            page.screenshot(path=shot)
            red, green, blue = np.moveaxis(imread(shot)[130:, 360:, :3], -1, 0)
            drawn = (red > 0.9) & (np.abs(green - 0.44) < 0.1) & (blue < 0.4)  # the colour of a first run
            assert drawn.sum() > 2000, "no curve was drawn"
