"""A real TensorBoard over a small run: what its HTTP interface serves, and what a browser shows."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from matplotlib.image import imread

from atr_scale.evaluation.sounds import encode_mp3
from atr_scale.training.monitor import Monitor
from atr_scale.training.players import Player, RetrievedClips

pytestmark = pytest.mark.slow

RATE = 16000


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "small"
    monitor = Monitor(run, True)
    tone = encode_mp3(np.sin(np.arange(2 * RATE) * 0.3), RATE)
    for step in range(1, 31):
        monitor.train(step, {"loss": 3 / step, "lr/audio": 1e-4, "temperature": 0.07})
        if step % 10 == 0:
            monitor.evaluation(step, "validation", {"t2a/R@1": step / 100})
            monitor.heatmap(step, torch.eye(8), names=[f"caption {number}" for number in range(8)])
            clips = [Player("demo/2", 1, 0.9, False, lambda: tone), Player("demo/1", 7, 0.2, True, lambda: tone)]
            monitor.retrieved(step, [RetrievedClips("a dog barks", 7, clips)])
    monitor.text("configuration", "**lr**: 0.1")
    monitor.close()
    return run


@pytest.fixture(scope="module")
def address(run_dir: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(run_dir), "--host", "127.0.0.1", "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        told: list[str] = []
        for line in server.stderr:
            told.append(line)
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                break
        else:
            pytest.fail("TensorBoard did not start:\n" + "".join(told))
        threading.Thread(target=server.stderr.read, daemon=True).start()  # a full pipe would stop the server
        url = found[0]
        deadline = time.monotonic() + 120
        while not get_json(url, "scalars/tags"):
            assert time.monotonic() < deadline, "TensorBoard served no run"
            time.sleep(0.5)
        yield url
    finally:
        server.terminate()
        server.wait(timeout=120)


def get(url: str, path: str, **query: object) -> bytes:
    address = f"{url}/data/plugin/{path}?{urllib.parse.urlencode(query)}"
    with urllib.request.urlopen(address, timeout=60) as response:
        return response.read()


def get_json(url: str, path: str, **query: object) -> Any:
    return json.loads(get(url, path, **query))


def test_scalars_are_served(address: str) -> None:
    (run,) = get_json(address, "scalars/tags")
    tags = get_json(address, "scalars/tags")[run]
    assert set(tags) == {"train/loss", "train/lr/audio", "train/temperature", "validation/t2a/R@1"}
    points = get_json(address, "scalars/scalars", run=run, tag="train/loss")
    assert [(step, round(value, 5)) for _, step, value in points] == [(n, round(3 / n, 5)) for n in range(1, 31)]


def test_the_similarity_picture_is_served(address: str, tmp_path: Path) -> None:
    ((run, tags),) = get_json(address, "images/tags").items()
    assert set(tags) == {"validation/similarity"}
    images = get_json(address, "images/images", run=run, tag="validation/similarity", sample=0)
    assert [image["step"] for image in images] == [10, 20, 30]
    path = tmp_path / "served.png"
    path.write_bytes(get(address, f"images/individualImage?{images[-1]['query']}&"))
    assert imread(path)[..., :3].std() > 0.02


def test_retrieved_clips_can_be_played(address: str) -> None:
    ((run, tags),) = get_json(address, "audio/tags").items()
    places = [f"validation at step {step}/query-0/{place}" for step in (10, 20, 30) for place in ("1", "right")]
    assert set(tags) == set(places)
    about = tags[places[-1]]
    assert about["displayName"] == "rank 7, right | query: a dog barks | clip: demo/1"
    assert "a dog barks" in about["description"] and "the right clip, missed" in about["description"]
    (clip,) = get_json(address, "audio/audio", run=run, tag=places[-1], sample=0)
    sound, rate = soundfile.read(io.BytesIO(get(address, f"audio/individualAudio?{clip['query']}&")))
    assert rate == RATE and np.abs(sound).max() > 0.7


def test_texts_are_served(address: str) -> None:
    ((run, tags),) = get_json(address, "text/tags").items()
    assert set(tags) == {"configuration/text_summary", "validation/retrieved-0/text_summary"}
    texts = get_json(address, "text/text", run=run, tag="validation/retrieved-0/text_summary")
    assert "a dog barks" in texts[-1]["text"] and "<table>" in texts[-1]["text"]


def chromium(browser: str, profile: Path, url: str, *arguments: str) -> str:
    """Run the headless browser on an address; nothing but 127.0.0.1 is reached."""
    switches = "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    switches += " disable-component-update disable-sync disable-dev-shm-usage hide-scrollbars window-size=1500,1300"
    switches += " proxy-server=http://127.0.0.1:9 proxy-bypass-list=127.0.0.1 virtual-time-budget=30000"
    flags = [f"--{switch}" for switch in switches.split(" ")]
    command = [browser, *flags, f"--user-data-dir={profile}", *arguments, url]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=240).stdout


def test_the_page_shows_the_run(address: str, tmp_path: Path) -> None:
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("no chromium on this machine")
    url = f"{address}/?darkMode=false"
    shot = tmp_path / "page.png"
    chromium(browser, tmp_path / "profile", f"{url}#scalars", f"--screenshot={shot}")
    picture = imread(shot)[..., :3]
    assert picture.shape[:2] == (1300, 1500)
    red, green, blue = np.moveaxis(picture[130:, 360:], -1, 0)  # without the orange bar and the list of runs
    curves = (red > 0.9) & (np.abs(green - 0.44) < 0.1) & (blue < 0.4)  # the colour of a first run
    assert curves.sum() > 300, "no curve was drawn"
    # The scalars page hides its tags in shadow trees; this one has them in the document.
    page = chromium(browser, tmp_path / "profile", f"{url}#timeseries", "--dump-dom")
    for tag in ("train/loss", "train/lr/audio", "validation/t2a/R@1"):
        assert tag in page, tag
