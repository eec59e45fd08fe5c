"""A real browser plays the clips of TensorBoard's audio page and of a report."""

from __future__ import annotations

import functools
import http.server
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import markdown
import numpy as np
import pytest

from atr_scale.evaluation.report import write_report
from atr_scale.evaluation.sounds import encode_mp3, sound_path
from tests.integration.test_tensorboard_page import address, run_dir
from tests.unit.test_report import retrieval_result

pytestmark = pytest.mark.slow
__all__ = ["address", "run_dir"]  # fixtures

SWITCHES = (
    "no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update "
    "disable-sync disable-dev-shm-usage proxy-server=http://127.0.0.1:9 proxy-bypass-list=127.0.0.1 mute-audio "
    "autoplay-policy=no-user-gesture-required"
)
PLAYED = "audio => audio.play().then(() => [audio.duration, audio.error])"


@contextmanager
def browser_page(height: int) -> Iterator[Any]:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=[f"--{each}" for each in SWITCHES.split()])
        yield browser.new_page(viewport={"width": 1500, "height": height})
        browser.close()


def test_tensorboard_plays_a_missed_clip_and_tells_its_rank(address: str, tmp_path: Path) -> None:
    with browser_page(900) as page:
        page.goto(f"{address}/?darkMode=false#audio")
        category = page.get_by_text("validation at step 30", exact=False).first
        category.wait_for(timeout=90_000)
        if not page.get_by_text("rank 7, right | query: a dog barks | clip: demo/1").count():
            category.click()
        page.get_by_text("rank 7, right | query: a dog barks | clip: demo/1").first.wait_for(timeout=30_000)
        duration, error = page.locator("audio").first.evaluate(PLAYED)
        assert duration == pytest.approx(2.0, abs=0.2) and error is None
        page.screenshot(path=tmp_path / "audio.png")


def test_a_report_links_sounds_that_play(tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = retrieval_result(caption="a dog barks")
    result.save(run)
    for clip in {clip for shown in (*result.misses, *result.examples) for clip in shown.clips}:
        path = sound_path(run, "test", clip)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_mp3(np.sin(np.arange(32000) * 0.3), 16000))
    text = write_report(run).read_text(encoding="utf-8")
    (run / "page.html").write_text(
        "<meta charset=utf-8>" + markdown.markdown(text, extensions=["tables"]), encoding="utf-8"
    )
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=run)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, browser_page(1300) as page:
        threading.Thread(target=server.serve_forever).start()
        try:
            page.goto(f"http://127.0.0.1:{server.server_port}/page.html")
            links = page.get_by_text("listen", exact=False).evaluate_all("each => each.map(link => link.href)")
            assert len(links) > 30
            add = "async href => { const a = new Audio(href); await a.play(); return a.duration }"
            assert page.evaluate(add, links[0]) == pytest.approx(2.0, abs=0.2)
            page.get_by_role("heading", name="Worst misses").first.scroll_into_view_if_needed()
            page.screenshot(path=tmp_path / "report.png")
        finally:
            server.shutdown()
